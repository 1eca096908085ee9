"""Several ranks make one batch: their rows put together are the rows of one rank, whatever the rule of the draw."""

import dataclasses

import numpy as np
import pytest

from buffer.image_cache import ImageCache
from buffer.mixture import loss_table
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.batch import Adaptive, BatchNeeds, Filter, Outcome, Priority, Split, Within
from fleet.errors import LearnerError, NoData
from fleet.robot import Source
from tests.buffer.runs import feed_back
from tests.buffer.sampler_model import IMAGE, STATE, TASKS, Recorder

P, O, D = int(Source.POLICY), int(Source.OPERATOR), int(Source.DEMO)  # noqa: E741
GROUPS = {(Source.DEMO,): 0.5, (Source.OPERATOR, Source.POLICY): 0.5}
NEEDS = BatchNeeds(41, 3, (STATE, IMAGE), GROUPS, offsets=(-1, 0, 2), within=Within.EPISODE, replay=("log_prob_T",))
SPLITS = [(0, 0), (0, 0, 0), (0,) * 45]  # 45 ranks are more than there are rows


def record(folder, seed=0):
    """Some 200 steps of two tasks with images and policy calls."""
    recorder, rng = Recorder(folder, image="jpeg", segment_bytes=60_000), np.random.default_rng(seed)
    for number in range(12):
        robot, task = number % 3, TASKS[number % 2]
        for part in range(3):
            sources = [D] * 6 if number % 4 < 2 else rng.choice([P, O], 6).tolist()
            opened, closed = {"seed": number} if part == 0 else None, "success" if part == 2 and number % 3 else None
            options = {"new_chunk": number, "rewards": rng.random(6).tolist()} if P in sources else {}
            recorder.fragment(robot, number, sources, task=task, opened=opened, closed=closed, **options)
        recorder.commit()
    recorder.close()
    return recorder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    record(folder)
    return folder


@pytest.fixture
def sampler_of(folder):
    """Makes samplers, and closes them."""
    made = []

    def sampler_of(shards=(0,), rank=0, of=folder, **options):
        sampler = Sampler(of, TASKS, 3, split=Split(rank, shards), threads=1, **options)
        sampler.poll()
        made.append(sampler)
        return sampler

    yield sampler_of
    for sampler in made:
        sampler.close()


def loss_of(windows):
    """Different for each step, and for demonstrations another one than for the others."""
    return (1 + windows.frame_B + 20 * (windows.source_B == D)).astype(np.float64)


def assert_put_together(parts, whole, path=""):
    """The rows of ``parts``, in order, are those of ``whole``; lists of numbers may be padded further there."""
    if isinstance(whole, dict):
        assert all(part.keys() == whole.keys() for part in parts), path
        for key in whole:
            assert_put_together([part[key] for part in parts], whole[key], f"{path}/{key}")
    elif isinstance(whole, float):
        assert all(part == whole for part in parts), path
    else:
        if path.startswith("/replay"):
            parts = [np.pad(part, ((0, 0), (0, whole.shape[1] - part.shape[1]))) for part in parts]
        assert all(part.dtype == whole.dtype for part in parts), path
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=path)


RULES = {
    "plain": {},
    "filter": {"filter": Filter(tasks=("reach",), outcomes=(Outcome.SUCCESS,), max_version_age=8)},
    "priority": {"priority": Priority(1.0, 0.7)},
    "adaptive": {"adaptive": Adaptive(window=4), "shares": {}},
    "cached": {"cached_share": 0.6, "priority": Priority()},
}


@pytest.mark.parametrize("shards", SPLITS, ids=len)
@pytest.mark.parametrize("rule", RULES)
def test_the_rows_of_all_ranks_are_those_of_one(sampler_of, rule, shards):
    needs, cache = dataclasses.replace(NEEDS, **RULES[rule]), ImageCache(1 << 20)
    one = sampler_of(cache=cache)
    for step in range(3):
        windows = one.batch(needs, step)
        feed_back(one, windows, loss_of(windows))
    ranks = [sampler_of(shards, rank, cache=cache) for rank in range(len(shards))]
    for rank in ranks:
        assert rank.load_state(one.state()) == 0
    draws = [sampler.draw(needs, 7) for sampler in (one, *ranks)]  # before the cache has more in it
    whole, *parts = [sampler.gather(draw) for sampler, draw in zip((one, *ranks), draws, strict=True)]
    assert [len(part.step_B) for part in parts] == [len(Split(r, shards).rows(41)) for r in range(len(shards))]
    assert_put_together([vars(part) for part in parts], vars(whole))
    assert whole.index_B.tolist() == list(range(41)) and whole.shard_weight == 1.0
    assert len(set(loss_of(whole))) > 5 and (rule != "priority" or len(set(whole.weight_B.tolist())) > 5)


@pytest.mark.parametrize("rule", ["priority", "cached"])
def test_shares_of_the_whole_are_exact_whatever_each_rank_has_scored_and_cached(sampler_of, rule):
    needs = dataclasses.replace(NEEDS, **RULES[rule], shares={(Source.DEMO,): 0.5, (Source.OPERATOR,): 0.5})
    ranks = [sampler_of((0, 0, 0), rank, cache=ImageCache(1 << 20)) for rank in range(3)]
    for step in range(8):
        parts = [rank.batch(needs, step) for rank in ranks]
        for rank, part in zip(ranks, parts, strict=True):
            feed_back(rank, part, loss_of(part) ** 2)
        source_B, task_B = (np.concatenate([getattr(part, name) for part in parts]) for name in ("source_B", "task_B"))
        counts = [((source_B == source) & (task_B == task)).sum() for source in (D, O) for task in range(2)]
        assert set(counts) <= {10, 11}, "each leaf has a quarter of the batch, rounded"


def test_tables_of_ranks_add_up_to_that_of_one_and_move_all_mixtures_alike(sampler_of):
    needs = dataclasses.replace(NEEDS, **RULES["adaptive"], observations=(STATE,))
    one, ranks = sampler_of(), [sampler_of((0,) * 43, rank) for rank in range(43)]  # two of them without a row
    moved = []
    for step in range(6):
        whole = one.batch(needs, step)
        parts = [rank.batch(needs, step) for rank in ranks]
        assert_put_together([vars(part) for part in parts], vars(whole))
        table = loss_table(whole, loss_of(whole), len(TASKS))
        by_hand = [[loss_of(whole)[(whole.task_B == t) & (whole.source_B == s)] for s in Source] for t in range(len(TASKS))]
        np.testing.assert_allclose(table, [[[some.sum(), len(some)] for some in row] for row in by_hand], rtol=1e-12)
        tables = [loss_table(part, loss_of(part), len(TASKS)) for part in parts]
        np.testing.assert_allclose(np.sum(tables, 0), table, rtol=1e-12)
        feed_back(one, whole, loss_of(whole))
        for rank, part in zip(ranks, parts, strict=True):
            rank.feed_back(part, loss_of(part), np.sum(tables, 0))
        moved.append((whole.source_B == D).mean())
    assert abs(moved[0] - 0.5) < 0.03 and moved[-1] > 0.6


def test_scores_are_those_of_a_ranks_own_rows(sampler_of):
    needs = dataclasses.replace(NEEDS, **RULES["priority"], observations=(STATE,))
    ranks = [sampler_of((0, 0), rank) for rank in range(2)]
    parts = [rank.batch(needs, 0) for rank in ranks]
    for rank, part in zip(ranks, parts, strict=True):
        feed_back(rank, part, np.zeros(len(part.step_B)))
    for rank, part in zip(ranks, parts, strict=True):
        later = np.concatenate([rank.draw(needs, step).facts["step_B"] for step in range(1, 20)])
        assert not np.isin(part.step_B, later).any(), "a step with score 0 is not drawn any more"
    heir = sampler_of()
    heir.load_state(ranks[1].state())
    later = np.concatenate([heir.draw(needs, step).facts["step_B"] for step in range(1, 20)])
    assert not np.isin(parts[1].step_B, later).any() and np.isin(parts[0].step_B, later).any()


def test_the_state_of_another_shard_gives_no_scores_and_makes_all_steps_new(sampler_of, tmp_path):
    recorder = record(tmp_path / "other", seed=1)
    needs = dataclasses.replace(NEEDS, **RULES["priority"], observations=(STATE,))
    mine, other = sampler_of((0, 1), 0), sampler_of((0, 1), 1, tmp_path / "other")
    windows = other.batch(needs, 0)
    feed_back(other, windows, np.zeros(len(windows.step_B)))
    assert other.load_state(other.state()) == 0
    assert other.reads(other.state()) and not mine.reads(other.state())
    assert mine.load_state(other.state()) == mine.num_steps() == len(recorder.drawable())
    assert all((mine.draw(needs, step).facts["weight_B"] == 1).all() for step in range(20)), "no step has a score yet"


def test_the_state_of_a_longer_log_is_known_to_be_another(sampler_of, tmp_path):
    longer = Recorder(tmp_path / "longer", segment_bytes=4000)
    for number in range(100):
        longer.fragment(0, number, [D] * 2, opened={"seed": number}, closed="success")
        longer.commit()
    longer.close()
    mine, other = sampler_of(), sampler_of(of=tmp_path / "longer")
    assert other.state()["read"]["segment"] > mine.state()["read"]["segment"]
    assert mine.load_state(other.state()) == mine.num_steps() > 0


def test_shards_draw_differently_and_ranks_of_one_alike(sampler_of):
    shards = (0, 0, 1)
    rows = [sampler_of(shards, rank).draw(NEEDS, 5).facts["index_B"].tolist() for rank in range(3)]
    assert np.concatenate(rows).tolist() == list(range(41))
    needs = dataclasses.replace(NEEDS, batch_size=40)
    one_each = [sampler_of((0, 1), rank).batch(needs, 5) for rank in range(2)]
    assert not np.array_equal(one_each[0].step_B, one_each[1].step_B)
    two_each = [sampler_of((0, 0, 1, 1), rank).batch(needs, 5) for rank in range(4)]
    for shard, whole in enumerate(one_each):
        assert len(whole.step_B) == 20
        assert_put_together([vars(part) for part in two_each[2 * shard : 2 * shard + 2]], vars(whole))


def test_a_prefetcher_counts_and_balances(sampler_of):
    sampler = sampler_of((0, 1), 1)
    plain, posted = sampler_of((0, 1), 1), []
    sampler.balance = lambda counts_SKT: (posted.append(counts_SKT), Sampler.balance(sampler, counts_SKT))
    prefetcher = Prefetcher(sampler, depth=2)
    prefetcher.poll()
    try:
        counts_KT = prefetcher.counts()
        np.testing.assert_array_equal(counts_KT, plain.counts())
        assert counts_KT.shape == (len(Source), 2) and counts_KT.sum() == prefetcher.num_steps() == plain.num_steps()
        assert counts_KT[D].sum() == prefetcher.num_steps(Source.DEMO) > 0
        for factor in (1, 1, 3):
            prefetcher.balance(np.stack([factor * counts_KT, counts_KT]))
        assert prefetcher.batch(NEEDS, 0).shard_weight == pytest.approx(0.25 / (21 / 41)) and len(posted) == 2
        prefetcher.balance(counts_KT[None])
        with pytest.raises(LearnerError, match=r"\(1, 4, 2\).*"):
            for step in range(1, 9):
                prefetcher.batch(NEEDS, step)
    finally:
        prefetcher.close()


def test_a_shard_without_what_is_asked_for_has_no_data(sampler_of, tmp_path):
    Recorder(tmp_path / "empty").close()
    empty = sampler_of((0, 1), 1, tmp_path / "empty")
    full = sampler_of((0, 1), 0)
    counts_SKT = np.stack([full.counts(), empty.counts()])
    for sampler in (full, empty):
        sampler.balance(counts_SKT)
    with pytest.raises(NoData, match="the log has nothing"):
        empty.draw(NEEDS, 0)
    assert full.draw(NEEDS, 0).facts["shard_weight"] == pytest.approx(41 / 20)
    with pytest.raises(NoData, match="no step of \\['script'\\]"):
        full.draw(dataclasses.replace(NEEDS, shares={(Source.SCRIPT,): 1.0}), 0)
