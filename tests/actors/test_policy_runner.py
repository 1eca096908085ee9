import numpy as np
import pytest
import torch
from safetensors.torch import save

from actors.policy_runner import PolicyRunner
from actors.robots.toy import ToyRobot
from algorithms.policies.registry import build
from fleet.errors import PolicyError
from fleet.releases import Manifest

CONFIG = {"reads": {"observation.state": [6]}, "action_dim": 2, "instruction_dim": 4}
EMBEDDINGS = {"reach": [0.5, 0.5, 0.5, 0.5]}


def release(version=1, config=CONFIG, change=lambda policy: None):
    torch.manual_seed(version)
    policy = build("mlp", config)
    change(policy)
    described = {"family": "mlp", "config": config, "spec": {}}
    return Manifest(version, None, "bc", 0, 0, {}, described, {}, ()), save(policy.state_dict())


@pytest.fixture
def runner():
    return PolicyRunner(ToyRobot().spec, EMBEDDINGS)


def observation():
    return ToyRobot().reset("reach", 1)


def test_a_chunk_carries_where_it_came_from(runner):
    runner.load(*release(3))
    first, second = (runner.act(5, frame, "reach", observation()) for frame in (0, 4))
    assert (first.episode_id, first.frame_index, first.version) == (5, 0, 3)
    assert second.chunk_id == first.chunk_id + 1
    assert first.actions_HA.shape == (8, 2) and first.actions_HA.dtype == np.float32
    np.testing.assert_array_equal(first.actions_HA, second.actions_HA)  # deterministic


def test_a_release_from_the_cache_is_loaded_before_the_gateway_answers():
    runner = PolicyRunner(ToyRobot().spec, {})
    runner.load(*release())
    assert runner.ready
    with pytest.raises(PolicyError, match="catalogue"):
        runner.act(0, 0, "reach", observation())
    runner.set_embeddings(EMBEDDINGS)
    assert runner.act(0, 0, "reach", observation()).version == 1


def test_nan_weights_do_not_replace_what_acts(runner):
    def spoil(policy):
        for parameter in policy.parameters():
            parameter.data.fill_(float("nan"))

    runner.load(*release(1))
    with pytest.raises(PolicyError, match="nan"):
        runner.load(*release(2, change=spoil))
    assert runner.version == 1


def test_a_policy_for_another_robot_names_both_sides(runner):
    with pytest.raises(PolicyError, match=r"observation\.force") as error:
        runner.load(*release(config={**CONFIG, "reads": {"observation.force": [3]}}))
    assert "toy_two_joint" in str(error.value)


def test_weights_of_another_shape_are_refused(runner):
    manifest, _ = release()
    _, other = release(config={**CONFIG, "horizon": 4})
    with pytest.raises(PolicyError, match="do not fit"):
        runner.load(manifest, other)


def test_acting_before_a_release_is_an_error(runner):
    with pytest.raises(PolicyError, match="no release"):
        runner.act(0, 0, "reach", observation())
