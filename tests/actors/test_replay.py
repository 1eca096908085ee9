"""What a robot records of chunks that were drawn: a learner gets it back, and finds the densities that they were drawn with."""

import numpy as np
import pytest
import torch
from loop_bench import run_episodes
from safetensors.torch import save

from actors.fragments import encode_rows
from actors.policy_runner import PolicyRunner
from actors.robots.toy import IMAGE, ToyRobot
from algorithms.policies.base import Chunk, acting_conditions
from algorithms.policies.registry import build, describe, published
from algorithms.policies.statistics import Statistics
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds
from fleet.releases import Manifest
from fleet.robot import Source
from fleet.spec import ACTION, STATE

H, A = 8, 2
EMBEDDING = np.array([0.5, -0.5, 0.5, 0.5], np.float32)
SMALL = {"action_dim": A, "horizon": H, "instruction_dim": 4, "width": 32}
STATES, IMAGES = {STATE: [6]}, {STATE: [6], IMAGE: [32, 32, 3]}
FLOW = {**SMALL, "num_layers": 1, "num_heads": 2, "num_steps": 4, "noise_level": 0.5}
TOKEN = {**SMALL, "num_heads": 2, "num_layers": 1, "num_bins": 9}
CASES = {
    "mlp": ("mlp", {**SMALL, "reads": STATES}),
    "cnn": ("cnn", {**SMALL, "reads": IMAGES, "vision_width": 16, "image_dims": 16}),
    "flow": ("flow", {**FLOW, "reads": STATES, "advantage": True}),
    "flow with images": ("flow", {**FLOW, "reads": IMAGES, "stochastic": "one"}),
    "flow with a prefix": ("flow", {**FLOW, "reads": STATES, "max_delay": 3}),
    "token, autoregressive": ("token", {**TOKEN, "reads": STATES, "decoding": "autoregressive"}),
    "token, diffusion": ("token", {**TOKEN, "reads": STATES, "decoding": "diffusion", "num_rounds": 3}),
}


def make(name):
    torch.manual_seed(0)
    policy = build(*CASES[name])
    rng = np.random.default_rng(0)
    policy.set_statistics({n: Statistics.of(rng.normal(size=(50, k))) for n, k in ((STATE, 6), (ACTION, A))})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # nothing that begins at zero hides a mistake
    return policy.eval()


def runner_of(policy, spec, **settings):
    runner = PolicyRunner(spec, {"reach": EMBEDDING}, execute=4, **settings)
    runner.load(Manifest(3, None, "grpo", 0, 0, {}, describe(policy), {}, ()), save(published(policy)))
    return runner


def logged(folder, spec, tables):
    log = Log(folder)
    ingest = Ingest(log)
    seq = ingest.admit("toy-1", "b" * 16, spec)
    directory, payload = encode_rows(spec, tables)
    ingest.offer("toy-1", {"boot_id": "b" * 16, "seq": seq + 1, "spec_hash": spec.hash, "tables": directory}, payload)
    ingest.commit()
    log.close()
    sampler = Sampler(folder, ["reach"], seed=0)
    sampler.poll()
    return sampler


class WithPrefix:
    """Stands between a courier and its runner: every chunk but the first has to continue two actions."""

    ready = True

    def __init__(self, runner):
        self._runner = runner

    def act(self, episode_id, frame_index, task, obs, prefix_DA=None):
        prefix_DA = np.full((2, A), 0.25, np.float32) if frame_index else None
        return self._runner.act(episode_id, frame_index, task, obs, prefix_DA)


@pytest.mark.parametrize("name", CASES)
def test_the_learner_finds_the_density_that_a_chunk_was_drawn_with(name, tmp_path):
    policy = make(name)
    spec = policy.spec
    robot = ToyRobot(max_steps=24, images=32 if spec.images else 0, codec="jpeg" if spec.images else "raw")
    runner = WithPrefix(runner_of(policy, robot.spec, stream="toy-1/b", sample=True))
    tables, _, _ = run_episodes(runner, robot=robot, execute=4)
    columns = ("frame_index", "actions_HA", "log_prob_T", *spec.replay)
    needs = BatchNeeds(256, H, tuple(spec.reads), {(Source.POLICY,): 1.0}, replay=columns)
    windows = logged(tmp_path, robot.spec, tables).batch(needs, 0)
    first = windows.frame_B == windows.replay["frame_index"]  # where the step's observation is the chunk's
    assert len(set(windows.frame_B[first])) == 6 and set(windows.version_B) == {3}

    obs = {n: torch.from_numpy(value[first]) for n, value in windows.obs.items()}
    obs |= acting_conditions(spec, torch.from_numpy(np.tile(EMBEDDING, (first.sum(), 1))))
    replay = {n: torch.from_numpy(windows.replay[n][first]).reshape(-1, *shape) for n, shape in spec.replay.items()}
    chunk = Chunk(torch.from_numpy(windows.replay["actions_HA"][first]).reshape(-1, H, A), None, replay)
    recorded_BT = torch.from_numpy(windows.replay["log_prob_T"][first])
    with torch.no_grad():
        ratio_BT = (policy.log_prob(obs, chunk) - recorded_BT).exp()
        assert (ratio_BT - 1).abs().max() < 2e-4
        for module in policy.modules():  # and only these weights have it
            if isinstance(module, torch.nn.Linear):
                module.weight.add_(0.05 * torch.randn_like(module.weight))
        assert ((policy.log_prob(obs, chunk) - recorded_BT).exp() - 1).abs().max() > 0.01


def test_a_draw_is_a_function_of_robot_start_and_chunk():
    spec, obs = ToyRobot().spec, ToyRobot().reset("reach", 1)
    policy = make("mlp")
    drawn = {}
    for stream in ("a/1", "a/1", "a/2", "b/1"):
        runner = runner_of(policy, spec, stream=stream, sample=True)
        chunks = [runner.act(0, 0, "reach", obs).actions_HA for _ in range(2)]
        assert not np.array_equal(*chunks)
        np.testing.assert_array_equal(drawn.setdefault(stream, chunks[0]), chunks[0])
    assert len({chunk.tobytes() for chunk in drawn.values()}) == 3


def test_what_is_deployed_is_not_drawn_and_has_no_density_to_record():
    spec, obs = ToyRobot().spec, ToyRobot().reset("reach", 1)
    runner = runner_of(make("flow"), spec)
    first, second = (runner.act(0, frame, "reach", obs) for frame in (0, 4))
    np.testing.assert_array_equal(first.actions_HA, second.actions_HA)
    assert len(first.log_prob_T) == 0 and first.replay == {}


def test_guidance_changes_what_is_deployed():
    spec, obs = ToyRobot().spec, ToyRobot().reset("reach", 1)
    policy = make("flow")
    without, given, twice = (runner_of(policy, spec, guidance=g).act(0, 0, "reach", obs).actions_HA for g in (0.0, 1.0, 2.0))
    assert np.abs(given - without).max() > 1e-4 and np.abs(twice - given).max() > 1e-4


def test_releases_with_and_without_replay_columns_share_a_fragment():
    policy, plain = make("flow"), make("mlp")
    robot = ToyRobot(max_steps=16)
    runner = runner_of(plain, robot.spec, sample=True)
    act = runner.act

    def act_and_change(*args):
        row = act(*args)
        runner.load(Manifest(4, None, "grpo", 0, 0, {}, describe(policy), {}, ()), save(published(policy)))
        return row

    runner.act = act_and_change
    tables, _, _ = run_episodes(runner, robot=robot, execute=4)
    directory, payload = encode_rows(robot.spec, tables)
    assert [row["policy_version"] for row in tables["chunks"]] == [3, 4, 4, 4] and directory["chunks"] > 0 and len(payload)
