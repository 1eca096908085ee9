"""Threads that share a batch's rows: every row once, errors reach the caller, and only after all threads are done."""

from __future__ import annotations

import threading
import time

import pytest

from buffer.team import LEAST_ROWS, Team


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 2 * LEAST_ROWS - 1, 2 * LEAST_ROWS, 1000])
def test_every_row_is_done_once(num_threads, num_rows):
    team, done = Team(num_threads), {"many": [0] * num_rows, "one": [0], "none": []}

    def task(name):
        def work(first, end):
            for row in range(first, end):
                done[name][row] += 1

        return len(done[name]), work

    team.share([task("one"), task("none"), task("many")])
    team.close()
    assert done == {"many": [1] * num_rows, "one": [1], "none": []}


def test_rows_are_shared_at_the_same_time():
    team, together = Team(3), threading.Barrier(3)
    team.share([(3 * LEAST_ROWS, lambda first, end: together.wait(10))])  # one thread alone would wait for ever
    team.close()
    assert not together.broken


@pytest.mark.parametrize("bad_row", [0, 999])
def test_an_error_comes_when_nobody_writes_any_more(bad_row):
    team, running = Team(2), [0]

    def work(first, end):
        if first <= bad_row < end:
            raise ValueError("a bad row")
        running[0] += 1
        time.sleep(0.05)
        running[0] -= 1

    with pytest.raises(ValueError, match="a bad row"):
        team.share([(1000, work)])
    assert running == [0]
    team.close()
