import json
import threading
import time

import pytest
import torch

from learner import budget as module
from learner.budget import Budget

CPU = torch.device("cpu")


class Clock:
    """Time that passes when it is told to: what a busy machine adds is not counted."""

    now_s = 0.0

    def perf_counter(self):
        return self.now_s

    def pass_s(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_seconds_are_counted_by_part(clock):
    budget = Budget(CPU)
    for _ in range(3):
        with budget.timed("forward"):
            clock.pass_s(0.01)
    with budget.timed("a name of its own"):
        pass
    assert budget.seconds["forward"] == pytest.approx(0.03)
    assert budget.seconds["a name of its own"] == budget.seconds["backward"] == 0.0


def test_the_time_is_that_of_the_machine():
    budget = Budget(CPU)
    start = time.perf_counter()
    with budget.timed("forward"):
        time.sleep(0.01)
    assert 0.01 <= budget.seconds["forward"] <= time.perf_counter() - start


def test_a_part_inside_another_is_not_counted_twice(clock):
    budget = Budget(CPU)
    with budget.timed("checkpoint"):
        clock.pass_s(0.01)
        with budget.timed("poll"):
            clock.pass_s(0.06)
            with budget.timed("exchange"):
                clock.pass_s(0.02)
        with budget.timed("exchange"):
            clock.pass_s(0.03)
    seconds = {part: budget.seconds[part] for part in ("checkpoint", "poll", "exchange")}
    assert seconds == pytest.approx({"checkpoint": 0.01, "poll": 0.06, "exchange": 0.05})


def test_a_part_that_raises_is_counted_and_left(clock):
    budget = Budget(CPU)
    with pytest.raises(ValueError, match="x"), budget.timed("publish"), budget.timed("poll"):
        clock.pass_s(0.01)
        raise ValueError("x")
    with budget.timed("forward"):
        clock.pass_s(0.02)
    assert budget.seconds["poll"] == pytest.approx(0.01) and budget.seconds["publish"] == 0.0
    assert budget.seconds["forward"] == pytest.approx(0.02), "nothing is taken for the part around it any more"


def traced(path, num_steps, updates):
    budget = Budget(CPU, path, num_steps, rank=3)
    for step in range(updates):
        with budget.timed("forward"), budget.timed("poll"):
            pass
        budget.step(step + 1)
    return budget


def wait_for(path):
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return json.loads(path.read_text())["traceEvents"]


def test_a_trace_shows_the_first_updates(tmp_path):
    path, before = tmp_path / "trace-3.json", time.time()
    budget = traced(path, 5, 20)
    events = wait_for(path)
    spans = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in spans] == ["poll", "forward"] * 5
    inner, outer = spans[:2]
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.2
    assert before - 1 <= inner["ts"] / 1e6 <= time.time() + 1, "in times of the wall clock"
    assert [event["name"] for event in events if event["ph"] == "i"] == [f"step {n}" for n in range(1, 6)]
    assert {event["pid"] for event in events} == {3}
    budget.close()
    assert sum(event["ph"] == "X" for event in wait_for(path)) == 10


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    budget = traced(tmp_path / "trace.json", 100, 2)
    assert not (tmp_path / "trace.json").exists()
    budget.close()
    assert len([event for event in wait_for(tmp_path / "trace.json") if event["ph"] == "i"]) == 2


def test_jobs_beside_the_updates_have_their_own_track(tmp_path):
    budget = Budget(CPU, tmp_path / "trace.json", 1)

    def job():
        with budget.beside("write checkpoint"):
            time.sleep(0.02)

    thread = threading.Thread(target=job)
    with budget.timed("forward"):
        thread.start()
        thread.join()
    budget.step(1)
    spans = {event["name"]: event for event in wait_for(tmp_path / "trace.json") if event["ph"] == "X"}
    assert spans["write checkpoint"]["tid"] != spans["forward"]["tid"] and spans["write checkpoint"]["dur"] >= 20_000
    assert "write checkpoint" not in budget.seconds and budget.seconds["forward"] >= 0.02


def test_a_trace_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SPANS", 10)
    budget = Budget(CPU, tmp_path / "trace.json", 1000)
    for _ in range(50):  # waits for data for hours
        with budget.timed("wait"):
            pass
    budget.step(1)
    assert sum(event["ph"] == "X" for event in wait_for(tmp_path / "trace.json")) == 10


@pytest.mark.parametrize("num_steps", [2, 9])
def test_a_disk_without_room_for_the_trace_is_said_and_ends_nothing(tmp_path, caplog, num_steps):
    traced(tmp_path / "missing" / "trace.json", num_steps, 5).close()
    for thread in threading.enumerate():
        if thread.name == "learner-trace":
            thread.join()
    assert "trace.json failed" in caplog.text


def test_without_a_trace_nothing_is_kept():
    budget = Budget(CPU)
    for step in range(100):
        with budget.timed("forward"):
            pass
        budget.step(step)
    budget.close()
    assert budget._trace is None and not budget._pending


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_time_is_the_devices(tmp_path):
    device = torch.device("cuda")
    budget = Budget(device, tmp_path / "trace.json", 100)
    matrix = torch.randn(8192, 8192, device=device)
    start = time.perf_counter()
    with budget.timed("forward"):
        for _ in range(10):
            with budget.timed("prepare"):
                matrix @ matrix
        handed_s = time.perf_counter() - start
    budget.step(1)
    assert budget.seconds["forward"] == 0.0 and handed_s < 0.05, "nothing waited for the device"
    torch.cuda.synchronize()
    elapsed_s = time.perf_counter() - start
    budget.step(2)
    assert 0.5 * elapsed_s < budget.seconds["prepare"] <= elapsed_s
    assert budget.seconds["forward"] < 0.2 * elapsed_s, "what is inside is counted once"
    budget.close()
    tracks = {event["tid"] for event in wait_for(tmp_path / "trace.json") if event["ph"] == "X"}
    assert tracks == {0, 2}
