"""Follows a run's journals while they grow, and keeps what the live view shows."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from fleet.runfolder import RunFolder

RECENT = 500


class JournalTail:
    """New lines of one journal at each call."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Whole lines that came since the last call; the beginning of a line waits for its end."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole, newline, _ = data.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # torn by a kill in the middle of a line
                lines.append(json.loads(line))
        return lines


@dataclasses.dataclass
class RobotFacts:
    """What is known of one robot."""

    state: str = "joined"
    version: int = 0
    task: str = ""
    steps: int = 0
    operator_steps: int = 0
    joined_ns: int = 0


@dataclasses.dataclass
class TaskFacts:
    """Finished episodes of one task by the fleet (demonstrations are not counted)."""

    episodes: int = 0
    interventions: int = 0  # episodes in which an operator acted
    recent: collections.deque[bool] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=20))  # success alone


class RunFacts:
    """The state of a run as its journals tell it. ``update`` reads what is new."""

    def __init__(self, run: RunFolder) -> None:
        self._gateway = JournalTail(run.logs / "gateway.jsonl")
        self._learner = JournalTail(run.logs / "learner.jsonl")
        self._learner_since_ns = 0
        self._sampleable: set[tuple[str, str, int]] = set()
        self.robots: dict[str, RobotFacts] = {}
        self.tasks: dict[str, TaskFacts] = {}
        self.version = self.updates = 0
        self.loss = 0.0
        self.operator_steps = self.demo_steps = self.demo_episodes = self.steps = 0
        self.messages: collections.deque[str] = collections.deque(maxlen=5)
        self.latencies: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=RECENT) for name in ("durable", "sampleable", "loaded")
        }

    def update(self) -> None:
        learner = self._learner.read()
        if learner and not self._learner_since_ns:
            self._learner_since_ns = learner[0]["time_ns"]
        for line in self._gateway.read() + learner:
            handler = getattr(self, f"_on_{line['kind']}", None)
            if handler is not None:
                handler(line)

    def percentile(self, name: str, q: float) -> float | None:
        """Percentile in ms of the most recent latencies of one kind; None while there are none."""
        values = sorted(self.latencies[name])
        return values[min(int(q / 100 * len(values)), len(values) - 1)] if values else None

    def _robot(self, line: dict[str, Any]) -> RobotFacts:
        return self.robots.setdefault(line["robot"], RobotFacts())

    def _on_durable(self, line: dict[str, Any]) -> None:
        num_steps = sum(line["steps"].values())
        self._robot(line).steps += num_steps
        self.steps += num_steps
        self.latencies["durable"].extend(line["latency_ms"])

    def _on_sampleable(self, line: dict[str, Any]) -> None:
        key = (line["robot"], line["boot"], line["seq"])
        if key in self._sampleable:
            return  # a learner that starts again reads the log from its beginning
        self._sampleable.add(key)
        # Steps that were executed before the learner was there say nothing of our speed.
        age_ms = (line["time_ns"] - self._learner_since_ns) / 1e6
        self.latencies["sampleable"].extend(ms for ms in line["latency_ms"] if ms <= age_ms)

    def _on_loaded(self, line: dict[str, Any]) -> None:
        robot = self._robot(line)
        robot.version = line["version"]
        published_ns = line["time_ns"] - line["latency_ms"] * 1e6
        if published_ns > robot.joined_ns:  # what was published before it came says nothing of our speed
            self.latencies["loaded"].append(line["latency_ms"])

    def _on_member(self, line: dict[str, Any]) -> None:
        robot = self._robot(line)
        robot.state = line["event"]
        if line["event"] == "joined":
            robot.joined_ns = line["time_ns"]
        self.messages.append(f"{line['robot']} {line['event']}")

    def _on_refused(self, line: dict[str, Any]) -> None:
        self.messages.append(f"{line['robot']} refused: {str(line['error'])[:100]}")

    def _on_episode(self, line: dict[str, Any]) -> None:
        robot = self._robot(line)
        robot.task = line["task"]
        if line["source"] == "demo":
            self.demo_steps += line["length"]
            self.demo_episodes += 1
            return
        robot.operator_steps += line["operator_steps"]
        self.operator_steps += line["operator_steps"]
        facts = self.tasks.setdefault(line["task"], TaskFacts())
        facts.episodes += 1
        facts.interventions += line["operator_steps"] > 0
        if line["outcome"] in ("success", "failure"):
            facts.recent.append(line["outcome"] == "success" and line["operator_steps"] == 0)

    def _on_update(self, line: dict[str, Any]) -> None:
        self.updates, self.loss = line["step"], line["loss"]

    def _on_published(self, line: dict[str, Any]) -> None:
        self.version = line["version"]

    def _on_resumed(self, line: dict[str, Any]) -> None:
        self.messages.append(f"learner resumed at step {line['step']}, release {line['version']}")
