"""Prefetching from a real log: the same batches as without, in order; errors and lost threads reach who waits."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Filter
from fleet.errors import FleetError, LearnerError, NoData, StorageError
from fleet.robot import Source
from tests.buffer import runs
from tests.buffer.fragments import make_spec, message

SPEC = make_spec(image="jpeg")
IMAGE = "observation.images.top"
NEEDS = BatchNeeds(16, 4, ("observation.state", IMAGE), {(Source.DEMO,): 1.0}, offsets=(0, 3))
OTHER = dataclasses.replace(NEEDS, batch_size=8, observations=("observation.state",))


class Writer:
    """A gateway's end of the log: ``add`` makes episodes of 20 steps durable."""

    def __init__(self, folder):
        self.log, self.seq = Log(folder), 0
        self.ingest = Ingest(self.log)
        self.ingest.admit("r1", "b" * 16, SPEC)

    def add(self, episodes=1, source=Source.DEMO):
        for _ in range(episodes):
            self.seq += 1
            options = {"spec": SPEC, "opened": True, "closed": True}
            self.ingest.offer("r1", *message("r1", "b" * 16, self.seq, self.seq, 0, [source] * 20, **options))
        self.ingest.commit()


@pytest.fixture
def writer(tmp_path):
    writer = Writer(tmp_path)
    writer.add(5)
    yield writer
    writer.log.close()


@pytest.fixture
def make(writer, tmp_path):
    """Makes prefetchers over samplers of the log, and closes them."""
    made = []

    def make(cls=Sampler, **options):
        sampler = cls(tmp_path, ["reach"], 0)
        prefetcher = Prefetcher(sampler, **options)
        made.append((prefetcher, sampler))
        prefetcher.poll()
        return prefetcher

    yield make
    for prefetcher, sampler in made:
        prefetcher.close()
        sampler.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("buffer-")]


def fields(windows):
    """All arrays of a batch by name."""
    found = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        else:
            found[name] = np.asarray(value)

    walk(vars(windows), "")
    return found


def assert_same(first, second):
    first, second = fields(first), fields(second)
    assert set(first) == set(second) and len(first) > 15
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def until(condition, what, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Watched(Sampler):
    """Writes down what is called; ``gate`` holds gathers back, ``broken`` are errors by the name of a method."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls, self.gate, self.broken = [], threading.Event(), {}
        self.gate.set()

    def _called(self, name, step=None):
        self.calls.append((name, step))
        if name in self.broken:
            raise self.broken[name]

    def poll(self, limit=None):
        self._called("poll")
        return super().poll(limit)

    def draw(self, needs, step, newest_version=-1):
        self._called("draw", step)
        return super().draw(needs, step, newest_version)

    def gather(self, draw, out=None):
        assert self.gate.wait(10)
        self._called("gather", draw.step)
        return super().gather(draw, out)

    def steps(self, name):
        return [step for called, step in self.calls if called == name]


@pytest.mark.parametrize(("depth", "workers"), [(0, 1), (1, 1), (2, 1), (4, 3)])
def test_batches_are_those_of_the_sampler_in_order(make, tmp_path, depth, workers):
    plain = Sampler(tmp_path, ["reach"], 0)
    plain.poll()
    for allocate in (None, lambda name, shape, dtype: np.empty(shape, dtype)):
        prefetcher = make(depth=depth, workers=workers, allocate=allocate)
        for step in [*range(12), 40, 41, 42]:  # a learner that goes on from elsewhere
            assert_same(prefetcher.batch(NEEDS, step), plain.batch(NEEDS, step))
            assert prefetcher.position == plain.position == 5
        assert_same(prefetcher.batch(OTHER, 43), plain.batch(OTHER, 43))  # another algorithm
    plain.close()


def test_a_batch_is_drawn_when_the_one_depth_before_it_is_asked_for(make):
    prefetcher = make(Watched, depth=2)
    sampler, fed_back = prefetcher._sampler, []
    for step in range(4):
        prefetcher.batch(NEEDS, step)
        until(lambda step=step: sampler.steps("draw") == list(range(step + 3)), "what is ahead is drawn")
        prefetcher.post(lambda step=step: fed_back.append((step, sampler.steps("draw")[-1])))
    # What is fed back after step s is known to the draw of step s + 3, and to none before.
    assert prefetcher.ask(lambda: 7) == 7 and fed_back == [(step, step + 2) for step in range(4)]


def test_batches_are_ready_before_they_are_asked_for(make):
    """A learner that is slower than one thread that gathers finds its batch there, every time."""
    prefetcher = make(Watched, depth=2)
    prefetcher.batch(NEEDS, 0)
    for step in range(1, 6):
        until(lambda: prefetcher.num_ready == 2, "two batches are ahead")
        prefetcher._sampler.gate.clear()  # nothing can be gathered now
        assert len(prefetcher.batch(NEEDS, step).actions_BHA) == NEEDS.batch_size
        prefetcher._sampler.gate.set()


def test_what_is_ahead_is_dropped_when_the_algorithm_changes(make):
    prefetcher = make(Watched, depth=3)
    sampler = prefetcher._sampler
    prefetcher.batch(NEEDS, 0)
    sampler.gate.clear()
    prefetcher.ask(lambda: None)
    thread = threading.Thread(target=prefetcher.batch, args=(OTHER, 1))
    thread.start()
    time.sleep(0.05)
    sampler.gate.set()
    thread.join(10)
    assert not thread.is_alive()
    windows = prefetcher.batch(OTHER, 2)
    assert len(windows.source_B) == 8 and IMAGE not in windows.obs


def test_arrays_are_used_in_turn_and_a_batch_stays_until_the_next_is_asked_for(make):
    made = []

    def allocate(name, shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    prefetcher = make(depth=2, workers=2, allocate=allocate)
    seen = set()
    for step in range(20):
        windows = prefetcher.batch(NEEDS, step)
        before = {name: value.copy() for name, value in fields(windows).items()}
        until(lambda: prefetcher.num_ready == 2, "two batches are ahead")  # as far as it goes: now nothing may move
        for name, value in fields(windows).items():
            np.testing.assert_array_equal(value, before[name], err_msg=f"step {step}: {name}")
        assert any(windows.obs[IMAGE] is array for array in made)
        seen.add(id(windows.obs[IMAGE]))
    assert 2 <= len(seen) <= 4 and len(made) <= 4 * 5  # depth + 2 sets of 5 arrays


def test_new_steps_are_seen_and_no_data_is_an_answer(make, writer):
    prefetcher = make(depth=2)
    needs = dataclasses.replace(NEEDS, shares={(Source.OPERATOR,): 1.0})
    for _ in range(3):
        with pytest.raises(NoData):
            prefetcher.batch(needs, 0)
    writer.add(2, Source.OPERATOR)
    new = []
    until(lambda: new.append(prefetcher.poll()) or sum(new) >= 40, "the new steps are seen")
    assert sum(new) == 40 and prefetcher.num_steps() == 140 and prefetcher.num_steps(Source.OPERATOR) == 40
    assert set(prefetcher.batch(needs, 0).source_B) == {Source.OPERATOR} and prefetcher.position == 7


@pytest.mark.parametrize("depth", [0, 2])
def test_what_came_is_told_once_whatever_a_state_is_loaded_between(make, writer, depth):
    prefetcher = make(depth=depth)

    def wait_until(num_steps):
        while depth and prefetcher.num_steps() < num_steps:
            time.sleep(0.02)

    writer.add(1)
    wait_until(120)  # the thread has read them, nobody has asked
    state = prefetcher.state()
    writer.add(2)
    wait_until(160)
    if not depth:
        assert prefetcher.poll() == 60
    assert prefetcher.load_state(state) == 60
    assert prefetcher.poll() == 0
    writer.add(1)
    wait_until(180)
    assert prefetcher.poll() == 20


def test_no_data_ahead_is_looked_for_again_when_its_turn_comes(make, monkeypatch):
    prefetcher = make(Watched, depth=2)
    sampler = prefetcher._sampler
    prefetcher.batch(NEEDS, 0)
    sampler.broken["draw"] = NoData("nothing now")
    until(lambda: prefetcher.num_ready == 2, "two batches are ahead")
    prefetcher.batch(NEEDS, 1)  # asks for step 3, of which there is nothing
    until(lambda: prefetcher.num_ready == 2, "two batches are ahead")
    sampler.broken.clear()
    for step in (2, 3, 4):
        prefetcher.batch(NEEDS, step)
    assert sampler.steps("draw").count(3) == 2


@pytest.mark.parametrize("where", ["draw", "gather", "poll"])
@pytest.mark.parametrize("error", [StorageError("the disk is gone", rule="it is there"), KeyError("a defect")])
def test_an_error_of_any_thread_reaches_who_asks_for_a_batch(make, where, error):
    prefetcher = make(Watched, depth=2)
    prefetcher.batch(NEEDS, 0)
    prefetcher._sampler.broken[where] = error
    expected = StorageError if isinstance(error, FleetError) else LearnerError
    with pytest.raises(expected, match=r"the disk is gone|a defect") as caught:
        for step in range(1, 1000):
            prefetcher.batch(NEEDS, step)
            time.sleep(0.01)
    assert caught.value.__cause__ is error and caught.value is not error
    if expected is StorageError:
        assert caught.value.rule == "it is there"
    if where != "poll":  # that batch is lost, the threads are not
        prefetcher._sampler.broken.clear()
        prefetcher.batch(NEEDS, 5)


def test_an_error_of_what_was_posted_reaches_who_asks(make):
    prefetcher = make(depth=1)

    def fail():
        raise ZeroDivisionError("scores")

    prefetcher.post(fail)
    with pytest.raises(LearnerError, match="scores") as caught:
        until(lambda: prefetcher.ask(lambda: False), "the error is raised")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("name", ["_own", "_work"])
def test_a_thread_that_is_gone_is_noticed(make, name, monkeypatch):
    """However it went: the learner does not wait for ever."""
    monkeypatch.setattr(Prefetcher, name, lambda self: None)
    prefetcher = make(depth=2)
    started = time.monotonic()
    with pytest.raises(LearnerError, match="is gone"):
        prefetcher.batch(NEEDS, 0)
    assert time.monotonic() - started < 5


def test_closing_ends_the_threads_and_whoever_asks_then_is_told(make):
    prefetcher = make(Watched, depth=2, workers=3)
    prefetcher.batch(NEEDS, 0)
    prefetcher.close()
    with pytest.raises(LearnerError, match="is gone"):
        prefetcher.batch(NEEDS, 9)


def test_arrays_of_batches_that_were_dropped_or_failed_come_back(make):
    """There are depth + 2 sets: after more drops and errors than that there is still one to gather into."""
    allowed = set(range(0, 1000, 10))

    class Held(Watched):
        def gather(self, draw, out=None):
            self.calls.append(("begun", draw.step))
            until(lambda: draw.step in allowed, "it may be gathered")
            return super().gather(draw, out)

    prefetcher = make(Held, depth=2, workers=2, allocate=lambda name, shape, dtype: np.empty(shape, dtype))
    sampler = prefetcher._sampler
    for first in range(0, 80, 10):
        asking = threading.Thread(target=prefetcher.batch, args=(NEEDS, first), daemon=True)
        asking.start()
        until(lambda first=first: prefetcher._ahead and prefetcher._ahead[-1].step >= first + 2, "the older ones are dropped")
        allowed |= set(range(first))
        asking.join(10)
        assert not asking.is_alive()
        until(lambda first=first: {first + 1, first + 2} <= set(sampler.steps("begun")), "two are being gathered")
    allowed |= set(range(1000))
    for _ in range(8):
        sampler.broken["gather"] = StorageError("broken")
        with pytest.raises(StorageError):
            [prefetcher.batch(NEEDS, step) for step in range(100, 110)]
        sampler.broken.clear()
    thread = threading.Thread(target=prefetcher.batch, args=(NEEDS, 500), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_batches_ahead_do_not_outlive_the_release_they_were_drawn_for(tmp_path):
    log = runs.Writer(tmp_path / "log")
    for version in range(1, 6):
        log.episode("arm-0", "b0", version, [Source.POLICY] * 9, version=version)
    log.close()
    sampler = Sampler(tmp_path / "log", ["reach"], 0)
    prefetcher = Prefetcher(sampler, depth=3)
    needs = BatchNeeds(64, 2, ("observation.state",), {(Source.POLICY,): 1.0}, filter=Filter(max_version_age=1))
    try:
        prefetcher.poll()
        for step, newest in enumerate([3, 3, 3, 5, 5, 5]):
            assert (newest - prefetcher.batch(needs, step, newest).version_B <= 1).all(), step
    finally:
        prefetcher.close()
        sampler.close()
