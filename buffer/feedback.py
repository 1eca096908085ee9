"""What the learner tells the sampler: scores of steps, and losses from which shares follow. Kept across restarts.

A sampler that begins anew may number steps otherwise (retention ran meanwhile), so scores are kept by segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from buffer.mixture import OnlineShare
from buffer.priority import Scores
from fleet.batch import Adaptive, BatchNeeds, Priority, Windows

Span = tuple[str, int, int]
"""A segment's file, the number of the first step of a run of its steps, and how many there are. Runs of a file in order."""


class Feedback:
    """Scores and shares of all needs that a sampler is asked for."""

    def __init__(self) -> None:
        self._scores: dict[Priority, Scores] = {}
        self._shares: dict[Adaptive, OnlineShare] = {}
        self._loaded: Mapping[str, Any] = {}

    def scores(self, needs: BatchNeeds, num_steps: int, spans: Callable[[], Sequence[Span]]) -> Scores | None:
        """Scores of steps up to ``num_steps``; None where these needs have no priority."""
        if needs.priority is None:
            return None
        found = self._scores.get(needs.priority)
        if found is None:
            found = self._scores[needs.priority] = Scores(needs.priority)
            saved = self._loaded.get("scores", {}).get(repr(needs.priority))
            if saved is not None:
                found.load_state({"values": _moved(saved, num_steps, spans())})
        found.grow(num_steps)
        return found

    def online_share(self, needs: BatchNeeds) -> Callable[[int], float] | None:
        """By task; None where these needs have no adaptive mixture."""
        if needs.adaptive is None:
            return None
        found = self._shares.get(needs.adaptive)
        if found is None:
            found = self._shares[needs.adaptive] = OnlineShare(needs.adaptive)
            saved = self._loaded.get("shares", {}).get(repr(needs.adaptive))
            if saved is not None:
                found.load_state(saved)
        return found.share

    def add(self, windows: Windows, loss_B: np.ndarray, there_B: np.ndarray) -> None:
        """Takes the losses of a batch.

        Args:
            there_B: False for steps that retention took away since they were drawn.

        Raises:
            LearnerError: A loss is not finite, or below 0 where steps are drawn by score.
        """
        for scores in self._scores.values():
            scores.set(windows.step_B[there_B], loss_B[there_B])
        for share in self._shares.values():
            share.add(windows.task_B, windows.source_B, loss_B)

    def drop(self, steps: np.ndarray) -> None:
        """These steps are gone."""
        for scores in self._scores.values():
            scores.drop(steps[steps < scores.num_steps])

    def move(self, steps: np.ndarray, first: int) -> None:
        """These steps have new numbers, counting up from ``first``, the end of all numbers so far."""
        for scores in self._scores.values():
            scores.move(steps, first)

    def state(self, spans: Sequence[Span]) -> dict[str, Any]:
        """Plain dicts, lists, numbers and numpy arrays."""
        kept = [list(span) for span in spans]
        scores = {repr(key): {**value.state(), "spans": kept} for key, value in self._scores.items()}
        shares = {repr(key): value.state() for key, value in self._shares.items()}
        return {
            "scores": {**self._loaded.get("scores", {}), **scores},
            "shares": {**self._loaded.get("shares", {}), **shares},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state`` returned, for needs as they are asked for."""
        self._loaded, self._scores, self._shares = state, {}, {}


def _moved(saved: Mapping[str, Any], num_steps: int, spans: Sequence[Span]) -> np.ndarray:
    """Saved values by the numbers that the same steps have now; a step that was not there then gets the highest of these."""
    old = np.asarray(saved["values"], np.float64)
    values = np.full(num_steps, -1.0)
    before = _numbers(saved["spans"])
    for file, numbers in _numbers(spans).items():
        was = before.get(file, numbers[:0])[: len(numbers)]
        was = was[was < len(old)]
        values[numbers[: len(was)]] = old[was]
    highest = values.max(initial=-1.0)
    return np.where(values < 0, highest if highest > 0 else 1.0, values)


def _numbers(spans: Sequence[Span]) -> dict[str, np.ndarray]:
    """The steps of each file, in its order."""
    runs: dict[str, list[np.ndarray]] = {}
    for file, first, count in spans:
        runs.setdefault(file, []).append(np.arange(first, first + count))
    return {file: np.concatenate(of_file) for file, of_file in runs.items()}
