import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from actors.ring import Ring, RingClosed, make_pipe

RECORD = np.dtype([("number", np.int64), ("image", np.uint8, (64, 64, 3))], align=True)


def _produce(name, pipe, count):
    ring = Ring(RECORD, 8, pipe, name)
    ring.produces_here()
    sent = 0
    while sent < count:
        record = ring.reserve()
        if record is None:
            time.sleep(0.0005)
            continue
        record["number"], record["image"] = sent, sent % 251
        ring.commit()
        sent += 1
    if count < 0:
        time.sleep(60)


def _start(count):
    context, pipe = multiprocessing.get_context("spawn"), make_pipe()
    ring = Ring(RECORD, 8, pipe)
    process = context.Process(target=_produce, args=(ring.name, pipe, count))
    process.start()
    ring.consumes_here()
    return ring, process


def test_every_record_arrives_once_whole_and_in_order():
    ring, process = _start(2000)
    seen = []
    with pytest.raises(RingClosed):
        while True:
            if ring.wait(10):
                record = ring.peek()
                assert (record["image"] == record["number"] % 251).all()
                seen.append(int(record["number"]))
                ring.release()
    process.join()
    ring.close()
    assert seen == list(range(2000))


def test_a_full_ring_says_so_and_frees_up():
    ring = Ring(RECORD, 4, make_pipe())
    for number in range(4):
        ring.reserve()["number"] = number
        ring.commit()
    assert ring.reserve() is None
    assert ring.wait(0)
    assert ring.peek()["number"] == 0
    ring.release()
    assert ring.reserve() is not None
    ring.close()


def test_an_empty_ring_times_out():
    ring = Ring(RECORD, 4, make_pipe())
    start = time.monotonic()
    assert not ring.wait(0.05)
    assert time.monotonic() - start < 1
    ring.close()


def test_a_killed_producer_is_noticed_at_once():
    ring, process = _start(5)
    for _ in range(5):
        assert ring.wait(10)
        ring.release()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RingClosed):
        ring.wait(5)
    process.join()
    ring.close()


def test_a_consumer_that_is_gone_is_noticed_by_the_producer():
    pipe = make_pipe()
    ring = Ring(RECORD, 4, pipe)
    ring.produces_here()
    ring.reserve()
    with pytest.raises(RingClosed):
        ring.commit()
    ring.close()
