"""What a run's policy begins as: read off robots, tasks and data, and refused where they do not fit together."""

import numpy as np
import pytest
import torch

from algorithms.policies.registry import build
from buffer.ingest import Ingest
from buffer.log import Log
from fleet.batch import BatchNeeds
from fleet.errors import LearnerError, NoData, PolicyError
from fleet.robot import Source
from fleet.server.releases import ReleaseStore
from fleet.spec import Feature, RobotSpec
from learner.fit import fit_statistics
from learner.main import PolicyConfig
from learner.policy import check_fits, complete_policy
from learner.ranks import RankPlace, Ranks
from learner.tensor_file import pack
from learner.train import train
from tests.buffer.fragments import make_spec, message
from tests.learner_toys import MemorySource, make_run, make_tables, train_toy

BOOT, STATE, TOP = "c" * 16, "observation.state", "observation.images.top"
CNN = {"horizon": 4, "width": 16, "num_layers": 1, "image_dims": 8, "vision_width": 8}


def robot(kind="toy", action=2, **features):
    return RobotSpec(kind, 20, {"action": Feature("float32", (action,)), STATE: Feature("float32", (3,)), **features})


def camera(name="top", size=16):
    return {f"observation.images.{name}": Feature("uint8", (size, size, 3), codec="jpeg")}


def reads(family, specs, **config):
    return complete_policy(PolicyConfig(family, config), specs, 4)["config"]["reads"]


def test_cameras_are_read_where_a_family_wants_them_or_a_list_says_so():
    arm = robot(**camera())
    assert reads("mlp", [arm]) == reads("flow", [arm]) == {STATE: [3]}
    assert reads("cnn", [arm]) == {STATE: [3], TOP: [16, 16, 3]}
    assert reads("flow", [arm], reads=[TOP]) == {TOP: [16, 16, 3]}
    assert reads("cnn", [arm, robot("other", **camera())], reads=[STATE, TOP]) == {STATE: [3], TOP: [16, 16, 3]}
    given = {STATE: [3]}
    assert reads("cnn", [arm], reads=given) == given


def test_cameras_that_robots_do_not_share_are_refused_by_name():
    arm, bare, large = robot(**camera()), robot("bare"), robot("large", **camera(size=84))
    with pytest.raises(LearnerError, match=r"type bare have no camera.*family 'cnn' reads images"):
        reads("cnn", [bare])
    with pytest.raises(LearnerError, match=r"'observation.images.top', which is \(16, 16, 3\) .* 'toy', missing .* 'bare'"):
        reads("cnn", [arm, bare])
    with pytest.raises(LearnerError, match=r"\(16, 16, 3\) on robots of type 'toy', \(84, 84, 3\) on robots of type 'large'"):
        reads("cnn", [arm, large])
    with pytest.raises(LearnerError, match=r"'observation.image.top'.*did you mean 'observation.images.top'"):
        reads("flow", [arm], reads=["observation.image.top"])


def test_policies_that_do_not_fit_robots_or_tasks_are_refused_by_name():
    config = {"reads": {STATE: [3], TOP: [16, 16, 3]}, "action_dim": 2, "instruction_dim": 4, **CNN}
    policy = build("cnn", config)
    check_fits(policy, [robot(**camera())], 4, normalised=False)
    for spec, said in (
        (robot(), "observation.images.top"),
        (robot(**camera(size=20)), "20, 20"),
        (robot(action=3, **camera()), "actions"),
    ):
        with pytest.raises(PolicyError, match=said):
            check_fits(policy, [spec], 4, normalised=False)
    with pytest.raises(PolicyError, match=r"'instruction' of shape \(4,\).*32 elements.*run.instruction_encoder"):
        check_fits(policy, [robot(**camera())], 32, normalised=False)
    degrees = RobotSpec("deg", 20, {**robot(**camera()).features, "action": Feature("float32", (2,), "deg", -1e-3, 1e-3)})
    check_fits(policy, [degrees], 4, normalised=False)
    with pytest.raises(PolicyError, match=r"trained on actions from -1 to 1.*'deg' accepts"):
        check_fits(policy, [degrees], 4, normalised=True)


def test_a_policy_of_another_instruction_size_does_not_begin(tmp_path):
    tables = make_tables()
    tables["policy"].config |= {"instruction_dim": 7}
    with pytest.raises(PolicyError, match=r"'instruction' of shape \(7,\)"):
        train_toy(make_run(tmp_path / "run"), tables)


def fill_images(run, episodes=2):
    log = Log(run.buffer)
    ingest, spec = Ingest(log), make_spec(image="jpeg")
    seq = ingest.admit("r1", BOOT, spec)
    for i in range(episodes):
        seq += 1
        ingest.offer(
            "r1", *message("r1", BOOT, seq, i, 0, [Source.DEMO] * 20, spec=spec, task="left", opened=True, closed=True)
        )
    ingest.commit()
    log.close()


def test_a_policy_with_cameras_is_trained_from_a_log(tmp_path):
    run = make_run(tmp_path / "run")
    fill_images(run)
    tables = make_tables(steps=6, start_steps=2, publish_every=2)
    tables["policy"].family, tables["policy"].config = "cnn", CNN
    progress = train(run, tables, stop=lambda: False, report=lambda progress: None)
    manifest = ReleaseStore(run.releases).manifest(ReleaseStore(run.releases).newest())
    assert progress.step == 6 and manifest.policy["spec"]["reads"] == {STATE: [3], TOP: [16, 16, 3]}
    tables["learner"].steps = 8
    tables["policy"].config = {**CNN, "reads": [TOP]}
    with pytest.raises(LearnerError, match=r"policy.config.reads = \['observation.images.top'\], but the checkpoint of step 6"):
        train(run, tables, stop=lambda: False, report=lambda progress: None)
    tables["policy"] = PolicyConfig()  # whoever leaves the family out says mlp
    with pytest.raises(LearnerError, match=r"policy.family = 'mlp', but the checkpoint of step 6 has 'cnn'"):
        train(run, tables, stop=lambda: False, report=lambda progress: None)
    tables["policy"] = PolicyConfig("cnn", {**CNN, "reads": [TOP, STATE]})
    assert train(run, tables, stop=lambda: False, report=lambda progress: None).step == 8


class Rows(MemorySource):
    """Steps whose state is ``values``, with the shard's weight."""

    def __init__(self, values, weight=1.0):
        super().__init__(len(values))
        self.poll()
        self.values, self.weight = np.asarray(values, np.float32), weight

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1):
        windows = super().batch(BatchNeeds(len(self.values), needs.horizon, needs.observations, needs.shares), step)
        windows.obs[STATE] = self.values
        windows.actions_BHA[:] = self.values[:, None, :2]
        windows.shard_weight = self.weight
        return windows


class Pretended(Ranks):
    """Two ranks, of which the other one says what ``source`` would make it say."""

    def __init__(self, other):
        super().__init__(RankPlace())
        self.size, self._other = 2, other

    def gather_bytes(self, data):
        windows = self._other.batch(BatchNeeds(1, 1, (STATE,), {(Source.DEMO,): 1.0}), 0)
        weight = np.full(len(windows.step_B), windows.shard_weight)
        return [data, pack({STATE: windows.obs[STATE], "action": windows.actions_BHA[:, 0], "weight": weight})]


class Normalised(torch.nn.Module):
    """Keeps what it is told."""

    spec = build("mlp", {"reads": {STATE: [3]}, "action_dim": 2}).spec

    def set_statistics(self, statistics):
        self.told = statistics


def fitted(source, ranks=None):
    policy = Normalised()
    fit_statistics(policy, source, ranks or Ranks(RankPlace()))
    return policy.told


def test_statistics_are_of_the_rows_of_all_ranks_by_what_their_shards_weigh():
    mine, other = np.random.default_rng(0).normal(size=(40, 3)), np.random.default_rng(1).normal(3.0, size=(10, 3))
    alone = fitted(Rows(mine))
    np.testing.assert_allclose(alone[STATE].mean, mine.mean(0), atol=1e-6)
    np.testing.assert_allclose(alone["action"].max, mine[:, :2].max(0), atol=1e-6)
    both = fitted(Rows(mine, 0.5), Pretended(Rows(other, 2.0)))
    np.testing.assert_allclose(both[STATE].mean, (0.5 * mine.sum(0) + 2 * other.sum(0)) / 40, atol=1e-6)
    nothing = fitted(Rows(mine, 1.0), Pretended(Rows(other, 0.0)))  # borrowed rows weigh nothing
    np.testing.assert_allclose(nothing[STATE].mean, alone[STATE].mean)
    assert set(both) == {STATE, "action"}


def test_data_that_is_not_finite_is_refused_by_name():
    values = np.zeros((10, 3))
    values[4:6, 2] = np.nan, np.inf
    with pytest.raises(LearnerError, match=r"'observation.state' is not finite in 2 of 10 steps .* elements \[2\]"):
        fitted(Rows(values))
    with pytest.raises(LearnerError, match=r"'observation\.state' is not finite"):
        fitted(Rows(np.zeros((3, 3))), Pretended(Rows(values)))


def test_only_policies_that_normalise_need_data():
    fit_statistics(torch.nn.Linear(1, 1), MemorySource(0), Ranks(RankPlace()))
    with pytest.raises(NoData):
        fit_statistics(Normalised(), MemorySource(0), Ranks(RankPlace()))
