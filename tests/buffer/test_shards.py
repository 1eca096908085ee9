"""Shards that are filled unevenly: counting their rows by ``shard_weight``, sources, tasks and steps have the chances that
they have in one log which holds everything."""

import collections
import dataclasses

import numpy as np
import pytest

from buffer.draw import Fill, draw_part
from buffer.sampler import Sampler
from fleet.batch import Adaptive, BatchNeeds, Filter, Priority, Split
from fleet.robot import Source
from tests.buffer.chi_square import Z, assert_drawn_as
from tests.buffer.runs import feed_back
from tests.buffer.sampler_model import STATE, TASKS, Recorder

P, O, S, D = Source.POLICY, Source.OPERATOR, Source.SCRIPT, Source.DEMO  # noqa: E741
SHARDS = (
    {(D, 0): 60, (D, 1): 6, (O, 0): 9, (P, 0): 30},  # the policy's steps are here only, and task 1 has few
    {(D, 0): 12, (D, 1): 33, (O, 0): 3, (O, 1): 24},  # corrections of task 1 are here only
)
RULES = {
    "two groups": {"shares": {(D,): 0.5, (O, P): 0.5}},
    "three groups": {"shares": {(D,): 0.2, (O,): 0.3, (P,): 0.5}},
    "one is nowhere": {"shares": {(D,): 0.3, (S,): 0.4, (O,): 0.3}},
    "one is in one shard": {"shares": {(P,): 0.6, (D,): 0.4}},
    "steps alike": {"shares": {(D, O): 0.25, (P,): 0.75}, "by_task": False},
    "one task": {"shares": {(D,): 0.3, (O, P): 0.7}, "filter": Filter(tasks=(TASKS[1],))},
    "adaptive": {"shares": {}, "adaptive": Adaptive(window=2)},
}


def make_needs(rule, size):
    return BatchNeeds(size, 1, (STATE,), **RULES[rule])


def record(folder, *shards):
    """A log of the steps of some shards. A step's state begins with the number of its shard."""
    recorder = Recorder(folder)
    for shard in shards:
        for episode, ((source, task), count) in enumerate(SHARDS[shard].items()):
            recorder.fragment(shard, episode, [source] * count, task=TASKS[task], opened={})
    recorder.commit()
    recorder.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    for name, shards in (("0", (0,)), ("1", (1,)), ("both", (0, 1))):
        record(root / name, *shards)
    return root


@pytest.fixture
def samplers(folders):
    """Of one log that holds everything; of two shards with 1 and 2 ranks of which the first of each is given."""
    one = Sampler(folders / "both", TASKS, 3)
    two = [Sampler(folders / str(s), TASKS, 3, split=Split(s, (0, 1, 1))) for s in (0, 1)]
    for sampler in (one, *two):
        sampler.poll()
    counts_SKT = np.stack([sampler.counts() for sampler in two])
    np.testing.assert_array_equal(counts_SKT.sum(0), one.counts())
    for sampler in two:
        sampler.balance(counts_SKT)
    one.balance(one.counts()[None])
    yield one, two
    for sampler in (one, *two):
        sampler.close()


def model(needs, online_share=None):
    """The chance of each step by (shard, episode, frame), in one log that holds everything: plain loops."""
    kinds = [(shard, episode, *key) for shard, sizes in enumerate(SHARDS) for episode, key in enumerate(sizes)]
    kinds = [kind for kind in kinds if not needs.filter.tasks or TASKS[kind[3]] in needs.filter.tasks]
    chances = collections.Counter()

    def spread(chance, chosen):
        steps = [(shard, episode, f) for shard, episode, *key in chosen for f in range(SHARDS[shard][tuple(key)])]
        chances.update(dict.fromkeys(steps, chance / len(steps)))

    tasks = {kind[3] for kind in kinds}
    if needs.adaptive:
        for task in tasks:
            for sources, share in (((P, O), online_share[task]), ((D, S), 1 - online_share[task])):
                spread(share / len(tasks), [kind for kind in kinds if kind[3] == task and kind[2] in sources])
        return chances
    groups = {g: share for g, share in needs.shares.items() if any(kind[2] in g for kind in kinds)}
    for group, share in groups.items():
        mine, share = [kind for kind in kinds if kind[2] in group], share / sum(groups.values())
        of_group = {kind[3] for kind in mine}
        if not needs.by_task:
            spread(share, mine)
        for task in of_group if needs.by_task else ():
            spread(share / len(of_group), [kind for kind in mine if kind[3] == task])
    return chances


def drawn(sampler, needs, num_draws):
    """How often each step is drawn, by (shard, episode, frame), and the shard's weight, which is always the same."""
    counts, weights = collections.Counter(), set()
    for step in range(num_draws):
        windows = sampler.batch(needs, step)
        counts.update(tuple(state) for state in windows.obs[STATE].astype(int).tolist())
        weights.add(windows.shard_weight)
    (weight,) = weights
    return counts, weight


@pytest.mark.parametrize("rule", RULES)
def test_together_uneven_shards_draw_as_one_log(samplers, rule, scale):
    one, two = samplers
    needs, num_draws = make_needs(rule, 300), 40 * scale
    share = None
    if needs.adaptive:  # the tables of the log that holds everything are those of all ranks together
        for sampler in two:
            for _ in range(2):
                sampler.feed_back(sampler.batch(needs, 0), np.zeros(100), table_of_losses())
        feed = one.batch(needs, 0)
        one.feed_back(feed, np.zeros(300), table_of_losses())
        share = [one._feedback.online_share(needs)(task) for task in range(2)]
        assert share[0] != share[1] and 0.2 < share[1] < 0.5 < share[0] < 0.8
    chances = model(needs, share)
    assert sum(chances.values()) == pytest.approx(1)
    counts, weight = drawn(one, needs, num_draws)
    assert_drawn_as([counts[key] for key in chances], list(chances.values()))
    assert weight == 1.0 and set(counts) <= set(chances)
    seen, variance = collections.Counter(), collections.Counter()
    for shard, (sampler, fraction) in enumerate(zip(two, (1 / 3, 2 / 3), strict=True)):
        mine = {key: chance for key, chance in chances.items() if key[0] == shard and chance > 0}
        counts, weight = drawn(sampler, needs, num_draws)
        assert_drawn_as([counts[key] for key in mine], list(mine.values()))
        assert set(counts) <= set(mine)
        due = sum(mine.values())
        assert weight == pytest.approx(due / fraction)
        num_rows = 100 * num_draws  # of one rank, which stands for all rows of its shard
        for (_, episode, _), count in counts.items():
            seen[list(SHARDS[shard])[episode]] += count / num_rows * fraction * weight
        for (_, episode, _), chance in mine.items():
            variance[list(SHARDS[shard])[episode]] += due * chance / num_rows
    for kind in {key for sizes in SHARDS for key in sizes}:
        want = sum(chance for (s, e, _), chance in chances.items() if list(SHARDS[s])[e] == kind)
        assert abs(seen[kind] - want) <= Z * np.sqrt(variance[kind]), f"{kind}: {seen[kind]:.4f}, not {want:.4f}"


def table_of_losses():
    """(tasks, sources, 2): the online side is better in task 1, worse in task 0."""
    table = np.zeros((2, len(Source), 2))
    table[0, [P, O, D]] = [[40, 20], [20, 10], [18, 10]]
    table[1, [O, D]] = [[10, 10], [20, 10]]
    return table


def test_without_the_counts_of_others_a_shard_is_a_log_of_its_own(folders):
    needs = make_needs("two groups", 300)
    sampler = Sampler(folders / "1", TASKS, 3, split=Split(2, (0, 1, 1)))
    sampler.poll()
    counts, weight = drawn(sampler, needs, 40)
    sampler.close()
    by_kind = collections.Counter()
    for (_, episode, _), count in counts.items():
        by_kind[list(SHARDS[1])[episode]] += count / 4000
    assert weight == 1.0 and all(by_kind[kind] == pytest.approx(0.25, abs=0.03) for kind in SHARDS[1])


def test_weights_of_a_prioritised_draw_sum_up_to_what_is_due_to_each_shard(folders):
    needs = dataclasses.replace(make_needs("two groups", 300), priority=Priority(1.0, 0.8))
    two = [Sampler(folders / str(shard), TASKS, 3, split=Split(shard, (0, 1))) for shard in (0, 1)]
    assert all(sampler.poll() for sampler in two)
    for shard, sampler in enumerate(two):
        sampler.balance(np.stack([sampler.counts() for sampler in two]))
        due = sum(chance for key, chance in model(needs).items() if key[0] == shard)
        for step in range(5):
            windows = sampler.batch(needs, step)
            assert windows.shard_weight * float(windows.weight_B.sum()) / 300 == pytest.approx(due)
            assert windows.weight_B.max() == 1 and (len(set(windows.weight_B.tolist())) > 3 or not step)
            feed_back(sampler, windows, 0.1 + (windows.frame_B % 7) ** 2)
        sampler.close()


def test_a_filter_that_leaves_nothing_of_a_leaf(scale):
    """Everywhere: as in one log. Here only: a branch without anything is left to the other shards."""
    pools = {(D, 0): np.arange(30), (D, 1): np.arange(30, 60), (O, 0): np.arange(60, 90), (O, 1): np.arange(90, 120)}
    counts_KT = np.zeros((len(Source), 2))
    counts_KT[D], counts_KT[O] = 30, 30
    half = Fill(counts_KT, 2 * counts_KT)
    needs = BatchNeeds(400, 1, (), {(D,): 0.5, (O,): 0.5})

    def shares(passes):
        rng = np.random.default_rng(0)
        parts = [draw_part(pools, needs, lambda s: passes[s], None, rng, None, 400, half) for _ in range(5 * scale)]
        (due,) = {due for _, due in parts}
        steps = np.concatenate([steps for steps, _ in parts])
        return due, [float(np.isin(steps, pools[key]).mean()) for key in pools]

    passes = np.ones(120)
    assert shares(passes) == (0.5, [0.25] * 4)
    passes[90:] = 0  # of task 1 no correction
    assert shares(passes) == (0.5, [0.25, 0.25, 0.5, 0])
    passes[60:] = 0  # no corrections at all: others draw them, so all that is here weighs less
    assert shares(passes) == (0.25, [0.5, 0.5, 0, 0])
    everything = Fill(counts_KT, counts_KT)
    assert draw_part(pools, needs, None, None, np.random.default_rng(1), None, 7, everything)[1] == 1.0


def test_steps_that_came_after_the_counts_wait_for_the_next_ones(folders, tmp_path):
    record(tmp_path / "log", 1)
    sampler = Sampler(tmp_path / "log", TASKS, 3, split=Split(1, (0, 1)))
    sampler.poll()
    first = sampler.counts()
    recorder = Recorder(tmp_path / "log")
    recorder.fragment(7, 0, [P] * 20, opened={})
    recorder.commit()
    assert sampler.poll() == 20
    needs = make_needs("three groups", 100)
    sampler.balance(np.stack([first, first]))
    assert P not in sampler.draw(needs, 0).facts["source_B"]
    sampler.balance(np.stack([first, sampler.counts()]))
    windows = sampler.draw(needs, 0)
    # All of the policy's share, half of the others': 0.5 + 0.25 of the batch, of which this shard makes one half.
    assert (windows.facts["source_B"] == P).sum() in (33, 34) and windows.facts["shard_weight"] == pytest.approx(1.5)
    recorder.close()
    sampler.close()
