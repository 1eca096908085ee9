"""The live view of a run: a FleetState in, tables on a terminal or one plain line now and then out.

Pure rendering: where the state comes from is the caller's business.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESH_S = 0.25
PLAIN_EVERY_S = 5.0
MAX_ROBOTS, MAX_MESSAGES = 16, 5


@dataclasses.dataclass
class RobotState:
    """One robot. ``lag``: releases published but not yet loaded; ``spool``: fragments not yet acknowledged; None: not known."""

    robot: str
    state: str
    task: str = ""
    version: int | None = None
    lag: int | None = None
    operator_acts: bool = False
    steps: int = 0
    spool: int | None = None


@dataclasses.dataclass
class TaskState:
    """One task. ``success``: recent share of episodes that succeeded without an operator, in [0, 1]; None: no episode yet."""

    task: str
    episodes: int = 0
    success: float | None = None
    interventions: int = 0


@dataclasses.dataclass
class LearnerState:
    """The learner. ``version``: the newest release; ``loss``: None before the first update."""

    state: str = "not started"
    step: int = 0
    updates_per_s: float = 0.0
    loss: float | None = None
    version: int | None = None


@dataclasses.dataclass
class FleetState:
    """Everything that is shown. ``latencies_ms``: name -> (P50, P99)."""

    phase: str
    elapsed_s: float
    robots: list[RobotState] = dataclasses.field(default_factory=list)
    learner: LearnerState = dataclasses.field(default_factory=LearnerState)
    tasks: list[TaskState] = dataclasses.field(default_factory=list)
    latencies_ms: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)


class LiveView:
    """Shows what ``snapshot`` returns, in place on a terminal, else a plain line every few seconds.

        with LiveView(snapshot) as view:
            while working:
                view.refresh()      # as often as one likes

    Args:
        snapshot: Called at most every ``REFRESH_S``, and never on a plain stream when no line is due.
        console: Where to draw; default: standard output.
        plain_every_s: Seconds between plain lines. A new phase is always told.
    """

    def __init__(
        self, snapshot: Callable[[], FleetState], console: Console | None = None, plain_every_s: float = PLAIN_EVERY_S
    ) -> None:
        self._snapshot, self._console, self._plain_every_s = snapshot, console or Console(), plain_every_s
        self._live: Live | None = None
        self._last, self._phase, self._told = float("-inf"), "", float("-inf")

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.refresh(force=True)
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def refresh(self, force: bool = False) -> None:
        """Draws the newest state, unless the last drawing is only just over."""
        now = time.monotonic()
        if not force and now - self._last < REFRESH_S:
            return
        self._last = now
        state = self._snapshot()
        if self._live is not None:
            self._live.update(render(state), refresh=True)
        elif force or state.phase != self._phase or now - self._told >= self._plain_every_s:
            self._told, self._phase = now, state.phase
            self._console.print(plain_line(state), markup=False, highlight=False, soft_wrap=True)


def plain_line(state: FleetState) -> str:
    """The state in one line of text, for logs."""
    learner = state.learner
    parts = [f"[{_clock(state.elapsed_s)}] {state.phase}"]
    if state.robots:
        working = sum(robot.state not in ("left", "lost") for robot in state.robots)
        acting = sum(robot.operator_acts for robot in state.robots)
        parts.append(f"robots {working}/{len(state.robots)}" + (f" ({acting} by operator)" if acting else ""))
    if learner.step:
        loss = "" if learner.loss is None else f" loss {learner.loss:.4f}"
        parts.append(f"step {learner.step} {learner.updates_per_s:.0f}/s{loss} release {_or_dash(learner.version)}")
    parts += [f"{task.task} {_percent(task.success)} of {task.episodes}" for task in state.tasks]
    parts += [f"{name} P50 {_ms(p50)} P99 {_ms(p99)}" for name, (p50, p99) in state.latencies_ms.items()]
    return " | ".join(parts)


def render(state: FleetState) -> RenderableType:
    """The state as tables."""
    parts: list[RenderableType] = [Text(f"{_clock(state.elapsed_s)}  {state.phase}", style="bold"), _learner(state.learner)]
    if state.tasks:
        parts.append(_tasks(state.tasks))
    if state.robots:
        parts.append(_robots(state.robots))
    if state.latencies_ms:
        parts.append(_latencies(state.latencies_ms))
    parts += [
        Text(f"  {message}", style="dim", overflow="ellipsis", no_wrap=True) for message in state.messages[-MAX_MESSAGES:]
    ]
    return Group(*parts)


def _learner(learner: LearnerState) -> Text:
    loss = "-" if learner.loss is None else f"{learner.loss:.4f}"
    return Text(
        f"learner: {learner.state}, step {learner.step:,}, {learner.updates_per_s:.0f} updates/s, loss {loss}, "
        f"release {_or_dash(learner.version)}"
    )


def _tasks(tasks: list[TaskState]) -> Table:
    table = Table("task", title="success without an operator, recent episodes", title_justify="left", title_style="dim")
    for heading in ("success", "episodes", "interventions"):
        table.add_column(heading, justify="right")
    for task in tasks:
        table.add_row(Text(task.task), _bar(task.success), str(task.episodes), str(task.interventions))
    return table


def _robots(robots: list[RobotState]) -> Table:
    table = Table("robot", "state", "task", "acts")
    for heading in ("release", "lag", "steps", "spool"):
        table.add_column(heading, justify="right")
    for robot in robots[:MAX_ROBOTS]:
        acts = Text("operator", style="bold yellow") if robot.operator_acts else Text("policy", style="dim")
        state = Text(robot.state, style="red" if robot.state in ("lost", "refused") else "")
        numbers = (_or_dash(robot.version), _or_dash(robot.lag), f"{robot.steps:,}", _or_dash(robot.spool))
        table.add_row(Text(robot.robot), state, Text(robot.task), acts, *numbers)
    if len(robots) > MAX_ROBOTS:
        table.add_row(f"and {len(robots) - MAX_ROBOTS} more", "", "", "", "", "", "", "")
    return table


def _latencies(latencies_ms: dict[str, tuple[float, float]]) -> Table:
    table = Table("latency")
    for heading in ("P50", "P99"):
        table.add_column(heading, justify="right")
    for name, (p50, p99) in latencies_ms.items():
        table.add_row(name, _ms(p50), _ms(p99))
    return table


def _bar(share: float | None) -> Text:
    if share is None:
        return Text("-")
    filled = round(10 * share)
    return Text(f"{'█' * filled}{'░' * (10 - filled)} {_percent(share):>5}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 10_000 else f"{milliseconds / 1000:.1f} s"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:d}:{int(seconds) % 60:02d}"
