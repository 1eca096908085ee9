import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.draw import draw_part, split_by_share
from fleet.batch import Adaptive, BatchNeeds, Filter
from fleet.errors import NoData
from fleet.robot import Source
from tests.buffer.chi_square import assert_drawn_as, statistic

P, O, S, D = Source.POLICY, Source.OPERATOR, Source.SCRIPT, Source.DEMO  # noqa: E741
SIZES = {(D, 0): 7, (D, 1): 40, (O, 0): 21, (O, 1): 3, (P, 1): 12}
HALVES = {(D,): 0.5, (O,): 0.5}
ALL = {tuple(Source): 1.0}


def draw_windows(pools, needs, accept, online_share, rng, cached=None):
    """A whole batch of one log."""
    steps_B, due = draw_part(pools, needs, accept, online_share, rng, cached, needs.batch_size, None)
    assert due == 1.0
    return steps_B


def make_pools(sizes=SIZES):
    """Pools whose steps are mixed in the log, by source and task."""
    order = np.random.default_rng(1).permutation(sum(sizes.values())).astype(np.int64)
    ends = np.cumsum(list(sizes.values()))
    return {key: np.sort(part) for key, part in zip(sizes, np.split(order, ends[:-1]), strict=True)}


POOLS = make_pools()
NUM = sum(SIZES.values())


def needs(shares, size=20000, **options):
    return BatchNeeds(size, 1, (), shares, **options)


def chances(rows):
    """Chance of each step, from the chance of each pool; by the step's weight within it."""
    out = np.zeros(NUM)
    for key, chance, weight in rows:
        within = np.ones(len(POOLS[key])) if weight is None else weight[POOLS[key]]
        out[POOLS[key]] += chance * within / within.sum()
    return out


def check(wanted, want, accept=None, online_share=None, cached=None, scale=1):
    """A large batch, and many small ones: how often proposals run out differs."""
    rng = np.random.default_rng(5)
    large = [draw_windows(POOLS, wanted, accept, online_share, rng, cached) for _ in range(scale)]
    few = dataclasses.replace(wanted, batch_size=5)
    small = [draw_windows(POOLS, few, accept, online_share, rng, cached) for _ in range(2000 * scale)]
    for drawn in (large, small):
        assert_drawn_as(np.bincount(np.concatenate(drawn), minlength=NUM), want)


def test_every_step_alike(scale):
    check(needs(ALL, by_task=False), np.ones(NUM), scale=scale)


def test_every_task_alike_within_a_group_and_every_step_within_a_task(scale):
    # Task 0 has 28 steps of two sources, task 1 has 55 of three.
    want = chances([(key, 0.5 * size / {0: 28, 1: 55}[key[1]], None) for key, size in SIZES.items()])
    check(needs(ALL), want, scale=scale)


def test_shares_of_sources(scale):
    shares = {(D,): 0.25, (O, P): 0.75}
    want = chances([((D, 0), 0.125, None), ((D, 1), 0.125, None), ((O, 0), 0.375, None)])
    want += chances([((O, 1), 0.375 * 3 / 15, None), ((P, 1), 0.375 * 12 / 15, None)])
    check(needs(shares), want, scale=scale)
    half = draw_windows(POOLS, needs(HALVES, 256), None, None, np.random.default_rng(0))
    demos = np.concatenate([POOLS[D, 0], POOLS[D, 1]])
    assert np.isin(half, demos).sum() == 128  # RLPD's symmetric batch, exactly


def test_a_filter_leaves_the_rest_alike_and_the_dead_give_their_share_away(scale):
    odd = np.arange(NUM) % 2
    odd[POOLS[D, 1]] = 0  # a task without an acceptable step
    want = chances([((D, 0), 0.5, odd), ((O, 0), 0.25, odd), ((O, 1), 0.25, odd)])
    check(needs(HALVES), want, lambda steps: odd[steps] > 0, scale=scale)
    odd[POOLS[O, 0]] = odd[POOLS[O, 1]] = 0  # and a group
    check(needs(HALVES), chances([((D, 0), 1.0, odd)]), lambda steps: odd[steps] > 0, scale=scale)


@pytest.mark.parametrize("power", [1, 4])
def test_priorities_also_where_proposals_are_mostly_rejected(power, scale):
    weight = (1 + np.arange(NUM) % 4.0) ** power
    weight[POOLS[O, 0][:3]] = 0
    want = chances([((D, 0), 0.25, weight), ((D, 1), 0.25, weight), ((O, 0), 0.25, weight), ((O, 1), 0.25, weight)])
    check(needs(HALVES, 60000), want, lambda steps: weight[steps] / weight.max(), scale=scale)


def test_one_acceptable_step_in_a_million_is_found_and_nothing_else():
    pools = {(D, 0): np.arange(1_000_000), (O, 0): np.arange(1_000_000, 2_000_000)}
    asked = []

    def accept(steps):
        asked.append(len(steps))
        return steps == 765_432

    drawn = draw_windows(pools, needs(HALVES, 64), accept, None, np.random.default_rng(0))
    assert drawn.tolist() == [765_432] * 64
    assert sum(asked) < 2_010_000  # gone through once, after a thousand proposals or two


def test_a_rare_step_beside_common_ones_gets_no_more_than_its_part(scale):
    # Proposals first, then the whole leaf: what was kept before the change must not depend on how many it were.
    weight = np.full(NUM, 0.004)
    weight[POOLS[D, 1][0]] = 1.0
    rng, few = np.random.default_rng(3), needs({(D,): 1.0}, 3, by_task=False)
    drawn = [draw_windows(POOLS, few, lambda steps: weight[steps], None, rng) for _ in range(3000 * scale)]
    rare = np.mean(np.concatenate(drawn) == POOLS[D, 1][0])
    assert abs(rare - 1 / 1.184) < 4 * np.sqrt(0.16 * 0.84 / (9000 * scale))


def test_adaptive_shares_are_within_each_task(scale):
    share = {0: 0.3, 1: 0.8}
    wanted = needs({}, adaptive=Adaptive(online=(P, O), offline=(D, S)))
    want = chances([((D, 0), 0.35, None), ((O, 0), 0.15, None), ((D, 1), 0.1, None)])
    want += chances([((O, 1), 0.4 * 3 / 15, None), ((P, 1), 0.4 * 12 / 15, None)])
    check(wanted, want, online_share=share.__getitem__, scale=scale)
    # A task whose online side has nothing acceptable is offline alone; it still weighs one half.
    online = np.concatenate([POOLS[O, 0]])
    want = chances([((D, 0), 0.5, None), ((D, 1), 0.1, None), ((O, 1), 0.4 * 3 / 15, None), ((P, 1), 0.4 * 12 / 15, None)])
    check(wanted, want, lambda steps: ~np.isin(steps, online), share.__getitem__, scale=scale)


def total_variation(one, other):
    return np.abs(one / one.sum() - other / other.sum()).sum() / 2


@pytest.mark.parametrize("beta", [0.2, 0.7])
def test_preferring_cached_steps_moves_the_distribution_by_beta_at_most(beta, scale):
    weight = 1 + np.arange(NUM) % 3.0
    cached = np.zeros(NUM)
    cached[POOLS[D, 0][:4]] = cached[POOLS[D, 1][:10]] = cached[POOLS[O, 0][:5]] = 1  # none of (operator, task 1)
    pools = [(D, 0), (D, 1), (O, 0), (O, 1)]
    rule = chances([(key, 0.25, weight) for key in pools])
    want = chances([(key, 0.25 * (1 - beta), weight) for key in pools])
    want += chances([(key, 0.25 * beta, weight * cached if key != (O, 1) else weight) for key in pools])
    wanted = needs(HALVES, 60000, cached_share=beta)
    check(wanted, want, lambda steps: weight[steps] / 3, cached=lambda steps: cached[steps] > 0, scale=scale)
    assert total_variation(want, rule) <= beta
    for key in pools:  # the bound holds in each leaf, so shares of sources and tasks do not move
        assert want[POOLS[key]].sum() == pytest.approx(0.25)
    seen, critical = statistic(
        np.bincount(draw_windows(POOLS, wanted, None, None, np.random.default_rng(0), lambda s: cached[s] > 0), minlength=NUM),
        chances([(key, 0.25, None) for key in pools]),
    )
    assert seen > critical  # it does prefer


def test_without_cached_steps_or_without_the_wish_the_rule_is_kept(scale):
    want = chances([(key, 0.25, None) for key in [(D, 0), (D, 1), (O, 0), (O, 1)]])
    check(needs(HALVES, cached_share=0.9), want, cached=lambda steps: np.zeros(len(steps), bool), scale=scale)
    check(needs(HALVES), want, cached=lambda steps: steps == 3, scale=scale)


def test_no_data_names_what_there_is():
    with pytest.raises(NoData) as error:
        draw_windows(POOLS, needs({(S,): 1.0}), None, None, np.random.default_rng(0))
    assert error.value.what == "no step of ['script']; the log has {'policy': 12, 'operator': 24, 'demo': 47}"
    assert error.value.rule and error.value.remedy
    filtered = needs(HALVES, filter=Filter(robots=("r9",)))
    with pytest.raises(NoData, match="no step of \\['demo', 'operator'\\] passes the filter"):
        draw_windows(POOLS, filtered, lambda steps: np.zeros(len(steps), bool), None, np.random.default_rng(0))
    with pytest.raises(NoData, match="the log has nothing"):
        draw_windows({}, needs({}, adaptive=Adaptive()), None, None, np.random.default_rng(0))


def test_a_draw_is_a_function_of_its_arguments_whatever_the_order_of_the_pools():
    def drawn(pools, seed=4):
        accept = lambda steps: (steps % 5) / 4  # noqa: E731
        cached = lambda steps: steps % 2 == 0  # noqa: E731
        shares = {(D,): 0.5, (P, O): 0.5}
        return draw_windows(pools, needs(shares, 64, cached_share=0.5), accept, None, np.random.default_rng(seed), cached)

    first = drawn(POOLS)
    assert np.array_equal(first, drawn(dict(reversed(POOLS.items()))))
    assert not np.array_equal(first, drawn(POOLS, seed=5))


@pytest.mark.parametrize("num_tasks", [1, 100])
def test_the_cost_does_not_depend_on_what_is_stored(num_tasks):
    per_task = 2_000_000 // num_tasks
    pools = {(D, task): np.arange(task * per_task, (task + 1) * per_task) for task in range(num_tasks)}
    asked = []

    def accept(steps):
        asked.append(len(steps))
        return steps % 10 < 3

    draw_windows(pools, needs({(D,): 1.0}, 256), accept, None, np.random.default_rng(0))
    assert sum(asked) < 256 * 12 + 30 * num_tasks


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=7), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_split_by_share_is_exact_in_the_mean(shares, total):
    offsets = (np.arange(4000) + 0.5) / 4000
    counts = np.array([split_by_share(total, shares, offset) for offset in offsets[::8]])
    assert (counts.sum(1) == total).all()
    want = total * np.array(shares) / sum(shares)
    assert (counts >= np.floor(want - 1e-9)).all() and (counts <= np.ceil(want + 1e-9)).all()
    assert np.abs(counts.mean(0) - want).max() <= 2 / 500 + 1e-9


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_is_asked_for_only_acceptable_steps_come_in_their_shares(data):
    sources, tasks = st.sampled_from(list(Source)), st.integers(0, 3)
    sizes = data.draw(st.dictionaries(st.tuples(sources, tasks), st.integers(0, 60), max_size=8))
    pools = make_pools(sizes) if sizes else {}
    groups = st.lists(sources, min_size=1, max_size=3, unique=True).map(tuple)
    shares = data.draw(
        st.dictionaries(groups, st.sampled_from([0.0, 0.2, 1.0]), min_size=1, max_size=3).filter(lambda s: any(s.values()))
    )
    adaptive = data.draw(st.sampled_from([None, Adaptive()]))
    size, by_task = data.draw(st.integers(1, 40)), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 1000))
    chance = np.random.default_rng(seed).choice([0, 0.02, 1], size=sum(sizes.values()), p=[0.7, 0.2, 0.1])
    cached = np.random.default_rng(seed + 1).random(len(chance)) < 0.3
    wanted = needs(shares, size, by_task=by_task, adaptive=adaptive, cached_share=data.draw(st.sampled_from([0, 0.5, 0.99])))
    sides = {adaptive.online: 1, adaptive.offline: 1} if adaptive else shares
    used = [key for key in sizes if any(key[0] in group and share > 0 for group, share in sides.items())]
    reachable = np.concatenate([np.empty(0, np.int64), *(pools[key] for key in used)])
    reachable = reachable[chance[reachable] > 0]
    rng = np.random.default_rng(seed)
    if not len(reachable):
        with pytest.raises(NoData):
            draw_windows(pools, wanted, lambda s: chance[s], lambda task: 0.4, rng, lambda s: cached[s])
        return
    drawn = draw_windows(pools, wanted, lambda s: chance[s], lambda task: 0.4, rng, lambda s: cached[s])
    assert drawn.dtype == np.int64 and drawn.shape == (size,)
    assert np.isin(drawn, reachable).all()
    if not adaptive and by_task:
        alive = [{key[1] for key in used if key[0] in group and (chance[pools[key]] > 0).any()} for group in shares]
        whole = sum(share for share, live in zip(shares.values(), alive, strict=True) if live)
        by_hand = np.zeros(4)
        for share, live in zip(shares.values(), alive, strict=True):
            for task in live:
                by_hand[task] += size * share / whole / len(live)
        counts = [np.isin(drawn, [s for key in used if key[1] == task for s in pools[key].tolist()]).sum() for task in range(4)]
        assert np.abs(counts - by_hand).max() <= len(shares)
