"""What the learner tells the sampler: scores of steps, and losses from which shares follow. Kept across restarts.

A sampler that begins anew may number steps otherwise (retention ran meanwhile), so scores are kept by segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from buffer.index import StepIndex
from buffer.mixture import OnlineShare
from buffer.priority import Scores
from fleet.batch import Adaptive, BatchNeeds, Priority, Windows

Span = tuple[str, int, int]
"""A segment's file, the number of the first step of a run of its steps, and how many there are. Runs of a file in order."""


_Key = tuple[Priority, tuple[int, ...]]  # with the sources that are drawn from


class Feedback:
    """Scores and shares of all needs that a sampler is asked for.

    Args:
        index: Of the steps.
    """

    def __init__(self, index: StepIndex) -> None:
        self._index = index
        self._scores: dict[_Key, Scores] = {}
        self._shares: dict[Adaptive, OnlineShare] = {}
        self._loaded: Mapping[str, Any] = {}

    def scores(self, needs: BatchNeeds, spans: Callable[[], Sequence[Span]]) -> Scores | None:
        """Scores of all steps; None where these needs have no priority."""
        if needs.priority is None:
            return None
        key, first = (needs.priority, _sources(needs)), self._index.fragment.first
        if key not in self._scores:
            scores = self._scores[key] = Scores(needs.priority, first)
            saved = self._loaded.get("scores", {}).get(repr(key))
            if saved is not None:
                steps = np.arange(first, self._index.end)
                values = _moved(saved, steps, spans(), self._index.may_be_drawn(steps, key[1]))
                scores.load_state({"first": first, "values": values})
        self.grow()
        return self._scores[key]

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

    def add(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray, there_B: np.ndarray) -> None:
        """Takes losses: of these windows for their scores, and of a table for the shares.

        Args:
            table: ``buffer.mixture.loss_table`` of the whole batch.
            there_B: False for steps that retention took away since they were drawn.

        Raises:
            LearnerError: A loss is not finite, or below 0 where steps are drawn by score.
        """
        self.grow()
        for (_, sources), scores in self._scores.items():
            mine_B = there_B & np.isin(windows.source_B, sources)
            scores.set(windows.step_B[mine_B], loss_B[mine_B])
        for share in self._shares.values():
            share.add(table)

    def grow(self) -> None:
        """Takes in the steps that the index has got."""
        for (_, sources), scores in self._scores.items():
            if scores.end < self._index.end:
                scores.grow(self._index.may_be_drawn(np.arange(scores.end, self._index.end), sources))

    def drop(self, steps: np.ndarray) -> None:
        """These steps will be gone."""
        self.grow()
        for scores in self._scores.values():
            scores.drop(steps)

    def move(self, steps: np.ndarray) -> None:
        """These steps have new numbers, counting up from the end of all numbers so far."""
        for scores in self._scores.values():
            scores.move(steps)

    def release(self) -> None:
        """Lets go of what the index let go of."""
        for scores in self._scores.values():
            scores.release(self._index.fragment.first)

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


def _sources(needs: BatchNeeds) -> tuple[int, ...]:
    groups = needs.shares if needs.adaptive is None else (needs.adaptive.online, needs.adaptive.offline)
    return tuple(sorted({int(source) for group in groups for source in group}))


def _moved(saved: Mapping[str, Any], steps: np.ndarray, spans: Sequence[Span], drawn: np.ndarray) -> np.ndarray:
    """Saved values of the same steps, by the numbers ``steps`` that they have now; one that was not there or not drawn then
    gets the highest of these, one that is not drawn now -1."""
    old, first = np.asarray(saved["values"], np.float64), steps[0] if len(steps) else 0
    values = np.full(len(steps), -1.0)
    before = _numbers(saved["spans"])
    for file, numbers in _numbers(spans).items():
        was = before.get(file, numbers[:0])[: len(numbers)] - saved["first"]
        was = was[was < len(old)]
        values[numbers[: len(was)] - first] = old[was]
    highest = values.max(initial=-1.0, where=drawn)
    return np.where(drawn, np.where(values < 0, highest if highest > 0 else 1.0, values), -1.0)


def _numbers(spans: Sequence[Span]) -> dict[str, np.ndarray]:
    """The steps of each file, in its order."""
    runs: dict[str, list[np.ndarray]] = {}
    for file, first, count in spans:
        runs.setdefault(file, []).append(np.arange(first, first + count))
    return {file: np.concatenate(of_file) for file, of_file in runs.items()}
