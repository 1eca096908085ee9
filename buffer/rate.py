"""How often the learner may draw what robots insert, in the terms of Reverb's SampleToInsertRatio (arXiv 2102.04736,
section 3.3): an insert is one step that became durable, a sample is one window in a batch.

The cursor is ``inserts * samples_per_insert - samples``, counted from ``begin``: what is in the buffer then stands for
Reverb's ``min_size_to_sample`` inserts, so the middle of its range is 0 and the range is [-error_buffer, error_buffer].
Below the range the learner is ahead and waits. Above it the robots are ahead; there Reverb blocks inserts, here nobody
is held: a robot never waits for the learner. It is only said.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any

from fleet.errors import ConfigError


class State(enum.Enum):
    """What holds. A side that is ahead is so from an end of the cursor's range to its middle, so that it is said once."""

    IN_RANGE = "in range"
    TOO_SMALL = "buffer too small"
    LEARNER_AHEAD = "learner ahead"
    ROBOTS_AHEAD = "robots ahead"


class RateLimiter:
    """Counts inserts and samples, and says when sampling has to wait. No clock, no threads.

    Args:
        samples_per_insert: Windows that are drawn for each new step, on average; 0: as many as the machine makes.
        min_size_to_sample: Steps in the buffer before anything is drawn, >= 1.
        error_buffer: Windows by which the cursor may be off in both directions, so that robots that send their steps
            in bits do not make the learner stutter.

    Attributes:
        inserts, samples: Since ``begin``.
        state: What holds.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(self, samples_per_insert: float, min_size_to_sample: int, error_buffer: float) -> None:
        smallest = max(1.0, samples_per_insert)
        reason = "a single step must not take the cursor from one end of its range over the other"
        for name, value, holds, rule in (
            ("samples_per_insert", samples_per_insert, 0 <= samples_per_insert < math.inf, "samples_per_insert >= 0, finite"),
            ("min_size_to_sample", min_size_to_sample, min_size_to_sample >= 1, "min_size_to_sample >= 1"),
            (
                "error_buffer",
                error_buffer,
                smallest <= error_buffer < math.inf,
                f"error_buffer >= max(1, samples_per_insert) = {smallest:g}, finite: {reason}",
            ),
        ):
            if not holds:
                raise ConfigError(f"{name} = {value!r}", rule=rule)
        self.samples_per_insert, self.error_buffer = float(samples_per_insert), float(error_buffer)
        self.min_size_to_sample = min_size_to_sample
        self.inserts = self.samples = 0
        self.state = State.IN_RANGE
        self._news: list[dict[str, Any]] = []

    @property
    def cursor(self) -> float:
        """Windows that are still to be drawn of what was inserted; below 0 the learner has drawn more than its ratio."""
        return self.inserts * self.samples_per_insert - self.samples

    def begin(self) -> None:
        """Counts anew from what is in the buffer now."""
        self.inserts = self.samples = 0
        self.state = State.IN_RANGE

    def insert(self, num_steps: int) -> None:
        """Steps became durable."""
        self.inserts += max(num_steps, 0)

    def sample(self, num_windows: int) -> None:
        """Windows were drawn."""
        self.samples += num_windows

    def wait_for(self, size: int, num_windows: int) -> str | None:
        """What has to be waited for before ``num_windows`` more are drawn, in words; None when they may be.

        Args:
            size: Steps in the buffer.
        """
        missing = num_windows - self.error_buffer - self.cursor if self.samples_per_insert else 0.0
        too_small = size < self.min_size_to_sample
        self._look(size, too_small, missing > 0)
        if too_small:
            return f"the learner waits for data: {size} steps in the buffer, min_size_to_sample is {self.min_size_to_sample}"
        if missing <= 0:
            return None
        return (
            f"the learner waits for robots: {num_windows} more windows need {math.ceil(missing / self.samples_per_insert)} "
            f"more steps ({self._numbers()})"
        )

    def news(self) -> list[dict[str, Any]]:
        """What began or ended since the last call, as fields of a journal line: ``state``, ``why`` and the numbers."""
        news, self._news = self._news, []
        return news

    def counts(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        counts = {"samples_per_insert": self.samples_per_insert, "inserts": self.inserts, "samples": self.samples}
        return {**counts, "state": self.state.value}

    def load(self, counts: Mapping[str, Any]) -> None:
        """Goes on from ``counts()``. What was counted for another ratio means nothing here: then it counts anew."""
        self.begin()
        if counts["samples_per_insert"] == self.samples_per_insert:
            self.inserts, self.samples = int(counts["inserts"]), int(counts["samples"])
            self.state = State(counts["state"])

    def _look(self, size: int, too_small: bool, held: bool) -> None:
        cursor, state = self.cursor, self.state
        if too_small:
            if state is not State.TOO_SMALL:
                self._say(State.TOO_SMALL, f"the learner waits for data: {size} steps of {self.min_size_to_sample} are there")
            return
        if state is State.TOO_SMALL:
            self._say(State.IN_RANGE, f"the buffer has its {self.min_size_to_sample} steps")
        elif state is State.LEARNER_AHEAD and cursor >= 0:
            self._say(State.IN_RANGE, "the learner no longer waits for robots")
        elif state is State.ROBOTS_AHEAD and (cursor <= 0 or held):
            self._say(State.IN_RANGE, "robots are no longer ahead of the learner")
        if held and self.state is not State.LEARNER_AHEAD:
            self._say(State.LEARNER_AHEAD, "the learner is ahead and waits for robots, again and again until the cursor is 0")
        elif self.samples_per_insert and cursor > self.error_buffer and self.state is not State.ROBOTS_AHEAD:
            less = "new steps are drawn less often than samples_per_insert says, and no robot is held"
            self._say(State.ROBOTS_AHEAD, f"robots are ahead of the learner: {less}")

    def _say(self, state: State, what: str) -> None:
        self.state = state
        numbers = {"inserts": self.inserts, "samples": self.samples, "cursor": round(self.cursor, 1)}
        self._news.append({"state": state.value, "why": f"{what} ({self._numbers()})", **numbers})

    def _numbers(self) -> str:
        return (
            f"{self.inserts} steps came, {self.samples} windows were drawn, samples_per_insert {self.samples_per_insert:g}: "
            f"cursor {self.cursor:g}, error_buffer {self.error_buffer:g}"
        )
