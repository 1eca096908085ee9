"""LeRobot's policies keep the Policy contract: the tests of every family, where they apply."""

import inspect
from functools import partial

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

from tests.algorithms.policies import cases, test_conformance
from tests.lerobot.tiny_policies import READS, VECTORS, tiny

ALL = (
    "test_shapes_and_dtypes",
    "test_a_chunk_is_a_function_of_observation_and_noise",
    "test_rows_do_not_depend_on_each_other",
    "test_log_prob_is_that_of_act_to_the_bit",
    "test_imitation_loss_is_of_valid_actions_only",
    "test_every_trained_weight_has_a_gradient",
    "test_parts_of_a_batch_sum_to_the_whole",
    "test_it_learns_one_batch_by_heart",
    "test_a_release_holds_all_that_acting_needs",
    "test_statistics_are_checked_and_travel",
    "test_mixed_precision_is_finite_and_near",
    "test_a_gpu_gives_what_the_cpu_gives",
    "test_an_average_can_be_kept_of_it",
    "test_images_are_moved_by_noise_alone",
)
NOT = {  # and why
    ("act", "test_a_chunk_is_a_function_of_observation_and_noise"): "it draws nothing when it acts",
    ("act", "test_every_trained_weight_has_a_gradient"): "its decoder's first layer attends to zeros (LeRobot's, and ACT's)",
}
NAMES = {
    "act": tiny("act", reads=VECTORS),
    "diffusion": tiny("diffusion", reads=VECTORS),
    "smolvla": tiny("smolvla", shift_pixels=2),
    "smolvla, lora": tiny("smolvla", lora={"r": 2, "alpha": 8, "train": ["model.action_out_proj", "model.action_in_proj"]}),
}
assert set(READS) != set(VECTORS)


@pytest.fixture(autouse=True)
def known_cases(monkeypatch):
    for name, config in NAMES.items():
        monkeypatch.setitem(cases.CASES, name, ("lerobot", config))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("test", ALL)
def test_the_contract(test, name, scale, monkeypatch):
    if (name, test) in NOT:
        pytest.skip(NOT[name, test])
    if test == "test_an_average_can_be_kept_of_it":  # torch rounds otherwise where a weight wants no gradient
        monkeypatch.setattr(test_conformance, "assert_same", partial(test_conformance.assert_same, **test_conformance.CLOSE))
    function = getattr(test_conformance, test)
    wants_gpu = any(mark.name == "skipif" and mark.args[0] for mark in getattr(function, "pytestmark", []))
    if wants_gpu:
        pytest.skip("needs a GPU")
    given = {"name": name, "scale": scale, "monkeypatch": monkeypatch}
    function(**{argument: given[argument] for argument in inspect.signature(function).parameters})


def test_no_test_of_the_contract_is_forgotten():
    elsewhere = {"test_decision_mask", "test_advantage", "test_prefix", "test_every_family_has_a_case"}
    elsewhere.add("test_whatever_it_is_given_comes_to_its_device")  # LeRobot's processors read numbers of tensors
    assert {name for name in dir(test_conformance) if name.startswith("test_")} - elsewhere == set(ALL)
