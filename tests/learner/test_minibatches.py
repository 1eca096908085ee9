"""Parts that are updated several times a step, by some minibatches, or not in each step; and what is known of the data."""

import numpy as np
import pytest
import torch

from algorithms.base import Part
from algorithms.policies.base import PolicySpec
from fleet.errors import LearnerError
from learner.fit import data_facts
from learner.minibatches import minibatches
from learner.ranks import RankPlace, Ranks
from tests.batches import make_batch, take_rows
from tests.learner_toys import MemorySource, Pair, make_run, make_tables, train_toy


class Several(Pair):
    """Counts what it is asked."""

    def __init__(self, policy, config, data):
        super().__init__(policy, config)
        self.data, self.asked = data, []
        self.needs = self.needs.__class__(12, 4, self.needs.observations, self.needs.shares)
        self.parts["critic"].minibatches, self.parts["critic"].after_update = 3, lambda: self.asked.append("target")
        self.parts["policy"].minibatches, self.parts["policy"].updates, self.parts["policy"].every = 3, 1, 2
        self.parts = {"critic": self.parts["critic"], "policy": self.parts["policy"]}

    def loss(self, part, micro):
        self.asked.append((part, micro.index_B.tolist()))
        return super().loss(part, micro)


def _batch(size):
    return make_batch({}, torch.zeros(size, 2, 1), step_B=torch.arange(size))


def test_every_row_is_in_one_minibatch_whatever_the_rank():
    batch, part = _batch(12), Part(None, None, minibatches=3)
    whole = [set(micro.index_B.tolist()) for _, micro in minibatches(batch, part)]
    assert whole == [{0, 3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8, 11}]
    halves = [list(minibatches(take_rows(batch, rows), part)) for rows in (range(6), range(6, 12))]
    assert [set(a.index_B.tolist()) | set(b.index_B.tolist()) for (_, a), (_, b) in zip(*halves, strict=True)] == whole
    for rows_N, micro in halves[1]:
        assert (rows_N + 6).tolist() == micro.index_B.tolist()


def test_only_the_last_minibatches_are_used_where_a_part_says_so():
    used = [micro.index_B.tolist() for _, micro in minibatches(_batch(8), Part(None, None, minibatches=4, updates=1))]
    assert used == [[3, 7]]


def test_a_rank_without_a_row_of_a_minibatch_is_told_what_to_change():
    with pytest.raises(LearnerError, match="2 rows on this rank is cut into 3 minibatches"):
        list(minibatches(_batch(2), Part(None, None, minibatches=3)))


def test_the_loop_updates_parts_as_often_as_they_say_and_targets_after_each(tmp_path):
    tables = make_tables(steps=4, start_steps=0)
    tables["algorithm"].name, tables["algorithm"].config = "tests.learner.test_minibatches:Several", {}
    tables["policy"].family, tables["policy"].config = "tests.learner_toys:LinearPolicy", {}
    loop = train_toy(make_run(tmp_path / "run"), tables)
    asked = loop._algorithm.asked
    critic = [("critic", list(range(i, 12, 3))) for i in range(3)]
    step = [entry for one in critic for entry in (one, "target")]
    assert asked == 2 * [*step, ("policy", [2, 5, 8, 11]), *step]
    assert {"critic.loss", "policy.loss", "critic.value"} <= set(loop.progress.stats)
    assert loop._algorithm.data.tasks == () and set(loop._algorithm.data.statistics) == {"observation.state", "action"}


class Ended(MemorySource):
    """Each episode is over; the length depends on the task."""

    def batch(self, needs, step, newest_version=-1):
        windows = super().batch(needs, step, newest_version)
        windows.steps_to_go_B = np.where(windows.frame_B % 7 == 0, -1, 100 * (1 + windows.task_B) - windows.frame_B % 100)
        windows.frame_B = windows.frame_B % 100
        windows.obs = {name: windows.obs[name] for name in needs.observations}
        return windows


def test_facts_are_the_statistics_and_the_longest_finished_episodes():
    source = Ended(10_000)
    source.poll()
    spec = PolicySpec({"observation.state": (3,)}, {}, 2, 4)
    facts = data_facts(spec, source, ("left", "right"), Ranks(RankPlace()))
    assert facts.longest_T == (100, 200) and facts.tasks == ("left", "right")
    assert facts.statistics["observation.state"].mean.shape == (3,)
    unfinished = data_facts(spec, MemorySourceReady(100), ("left", "right"), Ranks(RankPlace()))
    assert unfinished.longest_T == (0, 0)


class MemorySourceReady(MemorySource):
    def __init__(self, num_steps):
        super().__init__(num_steps)
        self.poll()
