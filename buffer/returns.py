"""Discounted sums of rewards from each step to its episode's end, computed once for each finished episode."""

from __future__ import annotations

import numpy as np

from buffer.columns import Column
from buffer.index import StepIndex

_DONE = np.iinfo(np.int64).max


class Returns:
    """Returns-to-go of one discount.

    Args:
        index: Whose steps they are of.
        discount: In (0, 1].
    """

    def __init__(self, index: StepIndex, discount: float) -> None:
        self._index, self._discount = index, discount
        self._value = Column(np.float32, np.nan)
        self._tried = Column(np.int64, -1)  # by fragment: how many fragments there were when its end was missing, or _DONE

    def of(self, steps_B: np.ndarray) -> np.ndarray:
        """(B,) float32; NaN where the episode is open, or where steps of it up to its end are missing."""
        index = self._index
        for column, first, end in (
            (self._value, index.fragment.first, index.end),
            (self._tried, index.num_steps.first, index.num_fragments),
        ):
            column.extend_to(end)
            column.release(first)
        fragments = np.unique(index.fragment[steps_B])
        finished = index.episodes.finished[index.episode[fragments]]
        for fragment in fragments[finished & (self._tried[fragments] < index.num_fragments)].tolist():
            if self._tried[fragment] < index.num_fragments:  # what is missing may have been read since
                self._compute(fragment)
        values: np.ndarray = self._value[steps_B]
        return values

    def _compute(self, fragment: int) -> None:
        """All fragments of the episode that are joined to this one."""
        index = self._index
        while (before := self._neighbour(fragment, index.prev[index.first_step[fragment]])) >= 0:
            fragment = before
        fragments = [fragment]
        while (behind := self._neighbour(fragment, index.next[self._last(fragment)])) >= 0:
            fragments.append(fragment := behind)
        has_end = index.first_frame[fragment] + index.num_steps[fragment] == index.episodes.length[index.episode[fragment]]
        self._tried[np.array(fragments)] = _DONE if has_end else index.num_fragments
        if has_end:
            steps = np.concatenate([np.arange(index.first_step[f], self._last(f) + 1) for f in fragments])
            self._value[steps] = discounted(index.reward[steps], self._discount)

    def _neighbour(self, fragment: int, step: int) -> int:
        """The fragment of a step, -1 where it is of another episode or there is none."""
        if step < 0:
            return -1
        other = int(self._index.fragment[step])
        return other if self._index.episode[other] == self._index.episode[fragment] else -1

    def _last(self, fragment: int) -> int:
        return int(self._index.first_step[fragment] + self._index.num_steps[fragment] - 1)


def discounted(rewards_T: np.ndarray, discount: float) -> np.ndarray:
    """G_t = r_t + discount G_{t+1}, float64 (T,)."""
    rewards_T = rewards_T.astype(np.float64)
    if discount == 1.0 or not rewards_T.any():
        return rewards_T[::-1].cumsum()[::-1]
    sums, total = [], 0.0
    for reward in reversed(rewards_T.tolist()):
        total = reward + discount * total
        sums.append(total)
    return np.array(sums[::-1])
