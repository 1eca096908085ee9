"""Iterations that begin at the run's first release again (``learner.restart_every``)."""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from fleet.errors import ConfigError, LearnerError, PolicyError
from fleet.server.releases import ReleaseStore
from learner.checkpoint import Checkpoints
from learner.policy import go_back
from learner.ranks import RankPlace, Ranks
from tests.learner_toys import MemorySource, make_run, make_tables, make_toy_loop, state_of, train_toy
from tests.rank_processes import on_ranks

START, EVERY, STEPS = 10, 15, 55


def tables_of(**learner):
    tables = make_tables(**{"steps": STEPS, "start_steps": START, "restart_every": EVERY, "publish_every": 2, **learner})
    tables["start"].name, tables["start"].config = "bc", {"batch_size": 16, "learning_rate": 0.01}
    tables["algorithm"].config = {"batch_size": 16, "learning_rate": 0.01, "start_steps": 0}
    return tables


def releases(run):
    store = ReleaseStore(run.releases)
    return {store.manifest(version).step: load(bytes(store.load(version))) for version in store.versions()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def watched(loop):
    """What each phase begins with: (phase, step, weights, average, optimizer's state)."""
    seen, enter = [], loop._enter

    def entered(phase):
        enter(phase)
        state = state_of(loop)
        parts = [
            {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("parts/policy/", "algorithm/ema/")
        ]
        seen.append((loop.progress.phase, loop.progress.step, *parts, [n for n in state if n.startswith("optimizers/")]))

    loop._enter = entered
    return seen


def test_each_iteration_begins_at_the_first_release_with_new_optimizers_and_has_one_release(tmp_path):
    run = make_run(tmp_path / "run")
    loop = make_toy_loop(run, tables_of(), MemorySource(1000))
    seen = watched(loop)
    loop.run(lambda: False)
    published = releases(run)
    assert list(published) == [START, START + EVERY, START + 2 * EVERY, STEPS]
    assert [(phase, step) for phase, step, *_ in seen] == [
        ("start", 0),
        ("iteration 1", START),
        ("iteration 2", START + EVERY),
        ("iteration 3", START + 2 * EVERY),
    ]
    first = published[START]
    for _, _, weights, average, optimizer in seen[1:]:
        assert equal(weights, first) and equal(average, first) and not optimizer
    assert all(not equal(published[step], first) for step in list(published)[1:])


def test_an_iteration_trains_on_all_data_so_far(tmp_path):
    """Nothing else tells two iterations apart but the data and the numbers of their updates."""
    grown = []
    for more in (0, 500):
        run, source = make_run(tmp_path / f"run{more}"), MemorySource(1000)
        loop = make_toy_loop(run, tables_of(), source)
        enter = loop._enter

        def entered(phase, enter=enter, source=source, more=more):
            enter(phase)
            if phase == 2 and more:
                source.add(more)
                source.poll()

        loop._enter = entered
        loop.run(lambda: False)
        grown.append(releases(run))
    assert equal(grown[0][START + EVERY], grown[1][START + EVERY])
    assert not equal(grown[0][START + 2 * EVERY], grown[1][START + 2 * EVERY])


@pytest.mark.parametrize("stop_at", [START, START + EVERY - 3, START + EVERY, STEPS - 1])
def test_a_run_that_is_stopped_anywhere_and_resumed_comes_to_the_same(tmp_path, stop_at):
    straight_run, run = make_run(tmp_path / "straight"), make_run(tmp_path / "cut")
    straight = train_toy(straight_run, tables_of())
    loop = make_toy_loop(run, tables_of(), MemorySource(1000))
    loop.run(lambda: loop.progress.step >= stop_at)
    assert Checkpoints(run.checkpoints).steps()[-1] == stop_at
    resumed = train_toy(run, tables_of())
    assert equal(state_of(resumed), state_of(straight))
    for step, weights in releases(straight_run).items():
        assert equal(releases(run)[step], weights), step


def test_a_learner_that_is_killed_goes_on_from_an_older_checkpoint(tmp_path):
    """No checkpoint at the end: the newest one is of step 20, in the midst of the first iteration; two releases are newer."""
    straight = train_toy(make_run(tmp_path / "straight"), tables_of())
    run = make_run(tmp_path / "killed")
    tables = tables_of(checkpoint_every=20)
    loop = make_toy_loop(run, tables, MemorySource(1000))
    keep, kept = loop._keep, loop._keep.checkpoint
    keep.checkpoint = lambda *args: kept(*args) if args[2] <= 20 else None
    loop.run(lambda: loop.progress.step >= START + 2 * EVERY + 2)
    assert Checkpoints(run.checkpoints).steps() == [20]
    before = releases(run)
    resumed = train_toy(run, tables)
    assert equal(state_of(resumed), state_of(straight))
    after = releases(run)
    assert list(after) == [START, START + EVERY, START + 2 * EVERY, STEPS]  # none twice
    assert all(equal(after[step], before[step]) for step in before)


def test_the_first_release_outlives_retention(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, tables_of(steps=START + 14 * 2, restart_every=2, keep_releases=10))
    steps = list(releases(run))
    assert steps == [START, *range(START + 5 * 2, START + 15 * 2, 2)]


def test_a_release_for_which_there_was_no_room_comes_before_the_iteration(tmp_path):
    run = make_run(tmp_path / "run")
    loop = make_toy_loop(run, tables_of(), MemorySource(1000))
    publish, due = loop._keep.publish, []
    loop._keep.publish = lambda *args: publish(*args) if due else due.append(args[2])
    loop.run(lambda: False)
    assert due == [START] and list(releases(run)) == [START, START + EVERY, START + 2 * EVERY, STEPS]


def test_the_rate_holds_iterations_as_one(tmp_path):
    """32 windows a step, batches of 16: with 1000 steps and a lead of 20 batches there are 20 updates after the start."""
    run, source = make_run(tmp_path / "run"), MemorySource(1000)
    loop = make_toy_loop(run, tables_of(samples_per_insert=32, error_buffer=20 * 16), source)
    held = []
    loop.run(lambda: bool(loop.progress.waiting and held.append(loop.progress.step)) or len(held) > 1)
    assert held[0] == START + 20


def test_a_run_without_its_first_release_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    loop = train_toy(run, tables_of())
    policy, store = loop._algorithm.parts["policy"].module, ReleaseStore(run.releases)
    alone = Ranks(RankPlace())
    store.prune(2)
    with pytest.raises(LearnerError, match=f"no release of step {START}"):
        go_back(policy, run, START, alone)
    with pytest.raises(PolicyError, match="do not fit"):
        go_back(torch.nn.Linear(1, 1).requires_grad_(False), run, STEPS, alone)


def test_a_policy_that_acted_as_best_of_several_is_found_in_its_release(tmp_path):
    from algorithms.critics import build_critic
    from algorithms.policies.best_of import BestOf
    from algorithms.policies.registry import build, describe, published
    from learner.tensor_file import dumps

    run = make_run(tmp_path / "run")
    sizes = {"reads": {"observation.state": [3]}, "action_dim": 2, "horizon": 4, "instruction_dim": 4}
    policy = build("mlp", {**sizes, "width": 8})
    best = BestOf.around(policy, build_critic("mlp", {**sizes, "width": 8}), num_samples=2)
    ReleaseStore(run.releases, run.keys).publish(
        dumps(published(best)), algorithm="toy", step=7, metrics={}, policy=describe(best)
    )
    other = build("mlp", {**sizes, "width": 8})
    assert not equal(other.state_dict(), policy.state_dict())
    go_back(other, run, 7, Ranks(RankPlace()))
    assert equal(other.state_dict(), policy.state_dict())


@pytest.mark.parametrize(
    "learner", [{"restart_every": -1}, {"restart_every": 7}, {"restart_every": 55, "start_steps": 0}, {"restart_every": 60}]
)
def test_refusals(learner):
    with pytest.raises(ConfigError, match=f"restart_every = {learner['restart_every']}"):
        tables_of(**learner)["learner"].check()
    tables_of()["learner"].check()


def two_ranks(ranks, folder, run):
    """Each rank begins with another policy; the first one has the files."""
    torch.manual_seed(ranks.rank)
    policy = torch.nn.Linear(3, 2)
    policy.family = "linear"
    go_back(policy, run if ranks.first else make_run(folder / f"other{ranks.rank}"), 3, ranks)
    return policy.state_dict()


@pytest.mark.timeout(150)  # beyond what on_ranks waits: its message names the rank
def test_all_ranks_go_back_to_what_the_first_one_reads(tmp_path):
    from learner.tensor_file import dumps

    run, saved = make_run(tmp_path / "run"), torch.nn.Linear(3, 2)
    described = {"family": "linear", "config": {}, "spec": {}}
    store = ReleaseStore(run.releases, run.keys)
    store.publish(dumps(saved.state_dict()), algorithm="toy", step=3, metrics={}, policy=described)
    for weights in on_ranks(2, two_ranks, tmp_path, run):
        assert all(np.array_equal(weights[name], saved.state_dict()[name]) for name in weights)
