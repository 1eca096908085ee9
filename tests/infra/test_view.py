from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from infra.view import FleetState, LearnerState, LiveView, RobotState, TaskState, plain_line, render

STATE = FleetState(
    phase="the fleet works",
    elapsed_s=125.4,
    robots=[
        RobotState("sim-00", "working", "push-v3", version=7, lag=1, operator_acts=True, steps=1234, spool=2),
        RobotState("sim-01", "lost", "[red]odd", version=None),
    ],
    learner=LearnerState("training", step=4200, updates_per_s=180.4, loss=0.0312, version=8),
    tasks=[TaskState("push-v3", episodes=20, success=0.85, interventions=3), TaskState("door-open-v3")],
    latencies_ms={"executed -> durable": (310.2, 640.0), "published -> loaded": (52.0, 12_345.0)},
    messages=[f"message {i}" for i in range(9)],
)


def drawn(state: FleetState) -> str:
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    console.print(render(state))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_shows_every_fact() -> None:
    text = drawn(STATE)
    for fact in (
        "2:05",
        "the fleet works",
        "4,200",
        "180 updates/s",
        "0.0312",
        "release 8",
        "85 %",
        "1,234",
        "310 ms",
        "12.3 s",
    ):
        assert fact in text, fact
    robot = next(line for line in text.splitlines() if "sim-00" in line)
    assert "operator" in robot and "push-v3" in robot
    assert "[red]odd" in text  # text from a robot is shown, not interpreted
    assert "message 8" in text and "message 3" not in text


def test_shows_an_empty_state_and_a_large_fleet() -> None:
    assert "not started" in drawn(FleetState("starting", 0.0))
    assert "and 84 more" in drawn(FleetState("working", 0.0, robots=[RobotState(f"r{i}", "working") for i in range(100)]))


def test_plain_line_has_the_main_facts() -> None:
    line = plain_line(STATE)
    assert "\n" not in line
    for fact in (
        "[2:05] the fleet works",
        "robots 1/2 (1 by operator)",
        "step 4200",
        "push-v3 85 % of 20",
        "door-open-v3 - of 0",
    ):
        assert fact in line, fact


def test_without_a_terminal_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state, out = FleetState("starting", 0.0), io.StringIO()
    with LiveView(lambda: state, Console(file=out), plain_every_s=5) as view:
        for tick in range(100):  # 10 s, ten times a second; the phase changes after 7 s
            now[0], state.elapsed_s = tick / 10, tick / 10
            if tick == 70:
                state.phase = "working"
            view.refresh()
    lines = out.getvalue().splitlines()
    assert [line.split("|")[0] for line in lines] == ["[0:00] starting", "[0:05] starting", "[0:07] working", "[0:09] working"]


def test_on_a_terminal_it_draws_tables_in_place() -> None:
    out = io.StringIO()
    with LiveView(lambda: STATE, Console(file=out, force_terminal=True, width=110)) as view:
        view.refresh()
    assert "sim-00" in out.getvalue() and "\x1b[" in out.getvalue()


def test_an_error_inside_gets_out() -> None:
    with pytest.raises(ValueError), LiveView(lambda: STATE, Console(file=io.StringIO())):
        raise ValueError
