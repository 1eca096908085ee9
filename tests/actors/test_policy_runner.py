import dataclasses

import numpy as np
import pytest
import torch
from loop_bench import run_episodes
from safetensors.torch import save

from actors.config import ActorConfig
from actors.operators import make_operator
from actors.policy_runner import PolicyRunner
from actors.robots.toy import ToyRobot
from algorithms.policies.registry import build
from fleet.errors import ConfigError, PolicyError
from fleet.releases import Manifest
from fleet.robot import Source
from tests.actors.odd_policies import Jumpy

CONFIG = {"reads": {"observation.state": [6]}, "action_dim": 2, "instruction_dim": 4}
EMBEDDINGS = {"reach": [0.5, 0.5, 0.5, 0.5]}


def release(version=1, config=CONFIG, change=lambda policy: None, family="mlp"):
    torch.manual_seed(version)
    policy = build(family, config)
    change(policy)
    described = {"family": family, "config": config, "spec": {}}
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


def test_a_camera_of_another_size_is_refused_by_name():
    robot = ToyRobot(images=32)
    config = {**CONFIG, "reads": {"observation.images.top": [48, 48, 3]}, "width": 16, "vision_width": 16, "image_dims": 8}
    with pytest.raises(PolicyError, match=r"observation\.images\.top.*\(32, 32, 3\)"):
        PolicyRunner(robot.spec, EMBEDDINGS).load(*release(config=config, family="cnn"))


def test_a_chunk_shorter_than_what_is_executed_of_it_is_refused():
    with pytest.raises(PolicyError, match=r"horizon of 8.*at least the 9"):
        PolicyRunner(ToyRobot().spec, EMBEDDINGS, execute=9).load(*release())


def test_actions_of_another_unit_are_refused():
    def in_degrees(policy):
        policy.scale.center_A.fill_(90.0)

    with pytest.raises(PolicyError, match=r"'action' from -1 to 1"):
        PolicyRunner(ToyRobot().spec, EMBEDDINGS).load(*release(config=dict(CONFIG, normalise_actions=True), change=in_degrees))


def test_embeddings_of_another_encoder_are_refused_before_the_robot_moves(runner):
    runner.load(*release(1))
    runner.set_embeddings({"reach": [1.0, 0.0]})
    with pytest.raises(PolicyError, match="embedding of 2 elements"):
        runner.load(*release(2))
    with pytest.raises(PolicyError, match="embedding of 2 elements"):
        runner.act(0, 0, "reach", observation())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_is_named(runner, bad):
    runner.load(*release())
    obs = {name: np.array(value) for name, value in observation().items()}
    obs["observation.state"][3] = bad
    with pytest.raises(PolicyError, match=rf"'observation\.state' is {bad} at \(3,\)"):
        runner.act(0, 0, "reach", obs)
    assert runner.act(0, 4, "reach", observation()).version == 1  # and the next one is as good as any


class Liar(Jumpy):
    """Says that it has a density to replay, and has none."""

    def __init__(self, config):
        super().__init__(config)
        self.spec = dataclasses.replace(self.spec, replay={"replay.tokens": (4,)}, density=True)


class Broken(Jumpy):
    def act(self, obs, noise=None, guidance=1.0):
        raise ValueError("index out of range")


@pytest.mark.parametrize(("family", "said"), [("Liar", r"replay\.tokens"), ("Broken", "index out of range")])
def test_a_policy_that_is_not_what_it_says_fails_its_test(family, said):
    manifest, data = release(config={}, family=f"tests.actors.test_policy_runner:{family}")
    with pytest.raises(PolicyError, match=said):
        PolicyRunner(ToyRobot().spec, EMBEDDINGS, sample=True).load(manifest, data)


def test_a_prefix_longer_than_the_policy_can_continue_is_said_once(caplog):
    runner = PolicyRunner(ToyRobot().spec, EMBEDDINGS)
    runner.load(*release(config={"max_delay": 2}, family="tests.actors.odd_policies:Jumpy"))
    obs, prefix_DA = observation(), np.arange(6, dtype=np.float32).reshape(3, 2)
    whole, *others = (runner.act(0, n, "reach", obs, prefix_DA[:k]).actions_HA for n, k in enumerate((2, 3, 3)))
    for actions_HA in (whole, *others):
        np.testing.assert_array_equal(actions_HA[:2], prefix_DA[:2])
    assert len(caplog.records) == 1 and "the 2 ticks that release 1" in caplog.text


def test_a_policy_that_fails_at_work_costs_chunks_and_neither_the_robot_nor_its_operator(caplog):
    runner = PolicyRunner(ToyRobot().spec, EMBEDDINGS)
    runner.load(*release(config={"fails_from": 3}, family="tests.actors.odd_policies:Jumpy"))  # its test is the first call
    corrections = make_operator("scripted", expert="toy", gate_distance=0.0, keep="episode")
    tables, _, courier = run_episodes(runner, operator=corrections)
    assert [row["frame_index"] for row in tables["chunks"]] == [0]
    assert courier.counters.failed_chunks > 3 and tables["episodes"][-1]["outcome"] == "success"
    assert Source.OPERATOR in {step["source"] for step in tables["steps"]}
    assert len(caplog.records) == 1 and "CUDA out of memory" in caplog.text and "odd_policies.py" in caplog.text


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(PolicyError, match=rf"actor\.device = '{device}'"):
        PolicyRunner(ToyRobot().spec, EMBEDDINGS, device=device).load(*release())


@pytest.mark.parametrize("wrong", [{"guidance": 2.0}, {"chunking": "ensemble"}])
def test_only_what_has_the_policys_density_is_drawn(wrong):
    ActorConfig(sample=True).check()
    with pytest.raises(ConfigError, match="sample = True"):
        ActorConfig(sample=True, **wrong).check()
    with pytest.raises(ConfigError, match="chunking = 'rtc'"):
        ActorConfig(chunking="rtc").check()
