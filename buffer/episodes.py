"""What became of each episode: facts of its opened and closed rows, of its steps, and of labels that came later.

An episode is (robot, boot, episode_id). Its number is given when it is first heard of and never changes. One whose
robot began another without closing it stays open. Labels may come before or after what they speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from buffer.columns import Column
from buffer.labels import Judged, Label
from buffer.segment import EpisodeKey
from fleet.batch import Outcome

_OUTCOMES = {outcome.name.lower(): outcome for outcome in Outcome if outcome is not Outcome.OPEN}


class EpisodeTable:
    """One row an episode, by its number.

    Attributes:
        keys: (robot_id, boot_id, episode_id).
        robot, boot, task: Indices into ``robots``, ``boots`` and the index's task names; task -1 for one that is not asked
            for.
        outcome: Outcome, by its newest label, else as the robot said.
        length: Steps as the robot said at the end, else up to the newest one that was read.
        first_version, last_version: Policy versions that acted, -1 for none.
        num_operator_steps: Steps under an operator.
        excluded: By a label. finished: Its end is known. terminated: Its newest step says that the task ended.
        first_step: Number of the first step that is there, -1 for none.
        group_id: "" for none. start: ``reset_state_id``, or "seed:<n>", or "".
    """

    def __init__(self) -> None:
        self.keys: list[EpisodeKey] = []
        self.robots: list[str] = []
        self.boots: list[tuple[str, str]] = []
        self.robot, self.boot, self.task = Column(np.int32), Column(np.int32), Column(np.int32)
        self.outcome, self.length = Column(np.int8), Column(np.int32)
        self.first_version, self.last_version = Column(np.int64), Column(np.int64)
        self.num_operator_steps = Column(np.int32)
        self.excluded, self.finished, self.terminated = Column(bool), Column(bool), Column(bool)
        self.first_step = Column(np.int64)
        self.group_id: list[str] = []
        self.start: list[str] = []
        self._numbers: dict[EpisodeKey, int] = {}
        self._robot_numbers: dict[str, int] = {}
        self._boot_numbers: dict[tuple[str, str], int] = {}
        self._said = Column(np.int8)  # outcome as the robot said
        self._num_seen = Column(np.int32)  # frames that were read; what retention wrote anew is read again
        self._judged: dict[EpisodeKey, Judged] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, key: EpisodeKey) -> int:
        """The episode's number; a new one where it was not heard of before."""
        known = self._numbers.get(key)
        return self._add(key) if known is None else known

    def find(self, key: EpisodeKey) -> int | None:
        return self._numbers.get(key)

    def robot_number(self, robot_id: str) -> int:
        number = self._robot_numbers.setdefault(robot_id, len(self.robots))
        if number == len(self.robots):
            self.robots.append(robot_id)
        return number

    def boot_number(self, robot_id: str, boot_id: str) -> int:
        number = self._boot_numbers.setdefault((robot_id, boot_id), len(self.boots))
        if number == len(self.boots):
            self.boots.append((robot_id, boot_id))
        return number

    def add_row(self, boot: tuple[str, str], row: dict[str, Any], task: int) -> None:
        """A row of the episodes table that this boot sent; ``task`` is the index of its task."""
        number = self.number((*boot, row["episode_id"]))
        self.task[number] = task
        self.group_id[number] = row["group_id"] or self.group_id[number]
        start = row["reset_state_id"] or (f"seed:{row['seed']}" if row["seed"] >= 0 else "")
        self.start[number] = start or self.start[number]
        if row["event"] != "closed":
            return
        self.finished[number] = True
        self.length[number] = max(self.length[number], row["length"])
        self.first_version[number], self.last_version[number] = row["first_version"], row["last_version"]
        self._said[number] = _OUTCOMES.get(row["outcome"], Outcome.UNKNOWN)
        self._judge(number)

    def add_steps(
        self, number: int, task: int, first_step: int, count: int, last_frame: int, num_operator: int, terminated: bool
    ) -> None:
        """A run of ``count`` steps of the episode, of which an operator acted in ``num_operator``; ``terminated`` is what the
        last of them says."""
        self.task[number] = task
        if self.first_step[number] < 0:
            self.first_step[number] = first_step
        if last_frame >= self._num_seen[number]:
            self.num_operator_steps[number] += num_operator
            self.terminated[number] = terminated
            self._num_seen[number] = last_frame + 1
        self.length[number] = max(self.length[number], last_frame + 1)

    def add_version(self, number: int, version: int) -> None:
        """A version that acted in an episode whose end is not known."""
        if not self.finished[number]:
            first, last = self.first_version[number], self.last_version[number]
            self.first_version[number] = version if first < 0 else min(first, version)
            self.last_version[number] = max(last, version)

    def add_label(self, label: Label, rank: int) -> None:
        """A label; its rank is one of those of ``buffer.labels``."""
        key = label.episode
        self._judged.setdefault(key, Judged()).add(label, rank)
        number = self._numbers.get(key)
        if number is not None:
            self._judge(number)

    def allowed(self, outcomes: Sequence[Outcome], robots: Sequence[str]) -> np.ndarray:
        """By number, which ones are not excluded and have one of the outcomes and robots; empty ones allow all."""
        allowed = ~self.excluded.view
        if outcomes:
            allowed &= np.isin(self.outcome.view, outcomes)
        if robots:
            allowed &= np.isin(self.robot.view, [i for i, name in enumerate(self.robots) if name in robots])
        return allowed

    def _add(self, key: EpisodeKey) -> int:
        number = self._numbers[key] = len(self.keys)
        self.keys.append(key)
        self.group_id.append("")
        self.start.append("")
        values = [
            (self.robot, self.robot_number(key[0])),
            (self.boot, self.boot_number(key[0], key[1])),
            (self.outcome, Outcome.OPEN),
            (self._said, Outcome.OPEN),
        ]
        zeros = (self.length, self.num_operator_steps, self._num_seen, self.excluded, self.finished, self.terminated)
        missing = (self.task, self.first_version, self.last_version, self.first_step)
        for column, value in [*values, *((c, 0) for c in zeros), *((c, -1) for c in missing)]:
            column.extend(value, 1)
        self._judge(number)
        return number

    def _judge(self, number: int) -> None:
        judged = self._judged.get(self.keys[number])
        label = None if judged is None else judged.outcome
        self.outcome[number] = self._said[number] if label is None else _OUTCOMES[label.value]
        self.excluded[number] = judged is not None and judged.excluded
