import datetime
import os
import time

import numpy as np
import pytest
import torch.distributed as dist

from fleet.errors import ConfigError, FleetError, LearnerError
from learner.ranks import RankPlace, Ranks
from tests.rank_processes import on_ranks


def exchange(ranks):
    table = ranks.gather([ranks.rank, 0.5])
    first = ranks.broadcast_bytes(b"from 0" if ranks.first else b"")
    second = ranks.broadcast_bytes(b"" if ranks.rank != 1 else bytes(range(200)), source=1)
    return table, first, second, ranks.gather_bytes(b"x" * ranks.rank), ranks.shard_leader


def test_ranks_exchange_numbers_and_bytes():
    answers = on_ranks(3, exchange, shards=(0, 0, 1))
    for table, first, second, every, _ in answers:
        np.testing.assert_array_equal(table, [[0, 0.5], [1, 0.5], [2, 0.5]])
        assert (first, second, every) == (b"from 0", bytes(range(200)), [b"", b"x", b"xx"])
    assert [answer[-1] for answer in answers] == [True, False, True]


def test_one_rank_exchanges_with_nobody():
    ranks = Ranks(RankPlace())
    table, _, _, every, leader = exchange(ranks)
    np.testing.assert_array_equal(table, [[0, 0.5]])
    assert every == [b""] and leader and ranks.broadcast_bytes(b"mine") == b"mine"


def test_rows_of_a_batch_are_split_without_gap_or_overlap():
    for shards in ((0,), (0, 0, 0), (0, 0, 1), (0, 1, 1, 2)):
        splits = [RankPlace(rank, shards).split() for rank in range(len(shards))]
        assert [row for split in splits for row in split.rows(32)] == list(range(32))
        for split in splits:
            same = [row for other in splits if other.shard == split.shard for row in other.rows(32)]
            assert same == list(split.shard_rows(32)) and set(split.rows(32)) <= set(same)
    with pytest.raises(ConfigError):
        RankPlace(0, (0, 2)).split()
    with pytest.raises(ConfigError):
        RankPlace(1, (0,)).split()


def test_a_rank_that_meets_nobody_says_so():
    with pytest.raises(LearnerError, match="rank 1 of 2"):
        Ranks(RankPlace(1, (0, 0), "tcp://127.0.0.1:9", timeout_s=1.0))


def read_slowly(ranks):
    """Rank 0 takes longer than a rank waits for an answer; then it fails so."""
    ranks.gather([0])
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))

    def work(fails=False):
        time.sleep(2.5 if ranks.first else 0.1)
        if fails and ranks.first:
            raise ConfigError("rank 0 cannot")
        return ranks.rank + 10

    answer = ranks.patiently(work)
    with pytest.raises(FleetError) as caught:
        ranks.patiently(lambda: work(fails=True))
    ranks.fail(caught.value)
    return answer, str(caught.value), caught.value.code


def test_what_takes_longer_on_one_rank_than_others_wait_is_waited_for():
    zero, one = on_ranks(2, read_slowly)
    assert zero == (10, "rank 0 cannot", "config") and one == (11, "rank 0: rank 0 cannot", "config")


def lose_one(ranks, how):
    """What rank 0 raises, and after how long, when rank 1 ends in an exchange."""
    ranks.gather([0])
    if ranks.rank == 1:
        if how == "killed":
            os._exit(9)
        ranks.fail(ConfigError("no such thing", rule="things exist", remedy="make one"))
        return None
    began = time.monotonic()
    with pytest.raises(LearnerError) as caught:
        for _ in range(3):
            ranks.gather([0])
    return str(caught.value), caught.value.code, time.monotonic() - began


def test_who_waits_for_a_rank_that_failed_hears_why():
    (text, code, seconds), _ = on_ranks(2, lose_one, "failed")
    assert text == "rank 1: no such thing; rule: things exist; remedy: make one" and code == "config" and seconds < 5


def test_a_rank_that_was_killed_is_missed_at_once():
    (text, code, seconds), _ = on_ranks(2, lose_one, "killed", lost=[1])
    assert "rank 0 lost another rank" in text and code == "learner" and seconds < 10
