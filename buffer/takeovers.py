"""When an operator takes over, seen from the steps before it."""

from __future__ import annotations

import numpy as np

from buffer.index import StepIndex
from fleet.robot import Source


def takeover_in(index: StepIndex, steps_B: np.ndarray, within: int) -> np.ndarray:
    """Steps from each of these to the first operator's step of its episode at or behind it: (B,) int64, 0 for an operator's
    step, -1 where there is none within so many steps, or where ``within`` is 0. Frames that are missing end the search."""
    found_B = np.full(len(steps_B), -1)
    if not within:
        return found_B
    episode_B = index.episode[index.fragment[steps_B]]
    row, now = np.arange(len(steps_B)), steps_B  # of those where the search goes on
    for distance in range(within + 1):
        by_operator = index.source[now] == Source.OPERATOR
        found_B[row[by_operator]] = distance
        row, now = row[~by_operator], index.next[now[~by_operator]]
        row, now = row[now >= 0], now[now >= 0]
        inside = index.episode[index.fragment[now]] == episode_B[row]
        row, now = row[inside], now[inside]
    return found_B
