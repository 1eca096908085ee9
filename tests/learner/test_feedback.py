"""Losses go back to the sampler: what is drawn next depends on them, each sample's on its own source's."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from algorithms.hg_dagger import HgDagger, HgDaggerConfig
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.batch import Adaptive, Priority
from fleet.errors import ConfigError, LearnerError
from fleet.journal import Journal
from fleet.robot import Source
from learner.train import make_loop
from tests.buffer.fragments import make_spec, message
from tests.learner_toys import INSTRUCTIONS_KE, TASKS, MemorySource, make_run, make_tables, make_toy_loop

D, O = Source.DEMO, Source.OPERATOR  # noqa: E741


class Recorded:
    """A source of batches that notes how many of each batch are operator steps, and what is fed back."""

    def __init__(self, inner):
        self._inner, self.shares, self.losses = inner, [], []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def batch(self, needs, step, newest_version=-1):
        windows = self._inner.batch(needs, step, newest_version)
        if needs.adaptive:
            self.shares.append(float((windows.source_B == O).mean()))
        return windows

    def feed_back(self, windows, loss_B, table):
        self.losses.append([float(loss_B[windows.source_B == source].mean()) for source in (D, O)])
        self._inner.feed_back(windows, loss_B, table)


def write_log(run):
    """Demonstrations whose actions are small, and operator steps whose actions are hard to learn: numbers near 1000."""
    ingest = Ingest(Log(run.buffer))
    for robot, episode, source in (("r0", 0, D), ("r1", 1, O)):
        ingest.admit(robot, "b" * 16, make_spec())
        ingest.offer(robot, *message(robot, "b" * 16, 1, episode, 0, [source] * 12, task="left", opened=True, closed=True))
    ingest.commit()


def make_source(run, depth):
    sampler = Sampler(run.buffer, TASKS, 3)
    return Recorded(Prefetcher(sampler, depth=depth) if depth is not None else sampler), sampler


def adaptive_loop(run, depth, **learner):
    tables = make_tables(start_steps=0, **learner)
    tables["algorithm"].config |= {"batch_size": 40, "mixture": "adaptive"}
    source, sampler = make_source(run, depth)
    source.poll()
    journal = Journal(run.logs / "learner.jsonl")
    return source, sampler, make_loop(run, tables, source, [make_spec()], INSTRUCTIONS_KE, journal, lambda progress: None)


@pytest.mark.parametrize("depth", [None, 2])
def test_the_mixture_moves_by_the_losses_of_each_side_and_goes_on_after_a_restart(tmp_path, depth):
    run = make_run(tmp_path / "run")
    write_log(run)
    source, sampler, loop = adaptive_loop(run, depth, steps=20)
    with contextlib.closing(sampler), contextlib.closing(source):
        loop.run(lambda: False)
    assert len(source.losses) == 20
    demo, operator = np.array(source.losses).T
    assert (operator > 5 * demo).all()  # one loss of the whole batch for both sides is what must not happen
    behind = 1 + (depth or 0)  # batches that were drawn before the first losses
    assert source.shares == [0.5] * behind + [0.8] * (20 - behind)

    source, sampler, loop = adaptive_loop(run, depth, steps=24)
    with contextlib.closing(sampler), contextlib.closing(source):
        loop.run(lambda: False)
    assert source.shares[0] == 0.8 and len(source.losses) == 4


def test_what_is_hard_is_drawn_more_often_where_there_is_a_priority(tmp_path):
    run = make_run(tmp_path / "run")
    write_log(run)
    source, sampler, loop = adaptive_loop(run, 2, steps=30)
    seen = []
    with contextlib.closing(sampler), contextlib.closing(source):
        loop._enter(0)
        demos = {(D,): 1.0}
        loop._algorithm.needs = dataclasses.replace(
            loop._algorithm.needs, shares=demos, adaptive=None, priority=Priority(1.0, 0.5)
        )
        source.feed_back = lambda windows, *losses: (seen.append(windows), source._inner.feed_back(windows, *losses))
        loop.run(lambda: False)
    # The loss of a demonstration's step is about its frame, 0 to 11: in proportion to it the mean is 7.7, uniformly 5.5.
    first, last = (np.concatenate([windows.frame_B for windows in some]) for some in (seen[:3], seen[10:]))
    assert abs(first.mean() - 5.5) < 1 and last.mean() > 6.5
    weight_B, frame_B = seen[-1].weight_B, seen[-1].frame_B
    assert weight_B.max() == 1 and weight_B[frame_B == 11].mean() < weight_B[frame_B < 8].mean()


def test_fixed_shares_ask_for_no_losses(tmp_path):
    source = Recorded(MemorySource(100))
    make_toy_loop(make_run(tmp_path / "run"), make_tables(), source).run(lambda: False)
    assert source.losses == []


def test_micro_batches_give_the_same_losses_sample_by_sample(tmp_path):
    losses = []
    for micro_batch in (0, 7):
        run = make_run(tmp_path / str(micro_batch))
        write_log(run)
        source, sampler, loop = adaptive_loop(run, None, steps=1, engine={"micro_batch": micro_batch})
        with contextlib.closing(sampler):
            source.feed_back = lambda windows, loss_B, table: losses.append(loss_B)
            loop.run(lambda: False)
    assert losses[0].shape == (40,) and len(set(losses[0].tolist())) > 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_losses_that_are_not_one_a_window_are_refused(tmp_path):
    run = make_run(tmp_path / "run")
    write_log(run)
    source, sampler, loop = adaptive_loop(run, None, steps=3)
    with contextlib.closing(sampler):
        loop._enter(0)
        loop._engine.per_sample = lambda part: torch.ones(13)
        with pytest.raises(LearnerError, match=r"losses of shape \(13,\) for 40 windows"):
            loop.run(lambda: False)
    assert source.losses == []


def test_needs_of_the_adaptive_mixture():
    class Spec:
        horizon, reads = 4, {"observation.state": (3,)}

    policy = torch.nn.Linear(1, 1)
    policy.spec = Spec()
    assert HgDagger(policy, HgDaggerConfig()).needs.adaptive is None
    needs = HgDagger(policy, HgDaggerConfig(mixture="adaptive", adaptive_alpha=2.0)).needs
    assert needs.adaptive == Adaptive(online=(O,), offline=(D,), alpha=2.0)
    with pytest.raises(ConfigError, match="half and half"):
        HgDagger(policy, HgDaggerConfig(mixture="half and half"))
