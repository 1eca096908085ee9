"""Which steps may be drawn, as the chance to keep one that is proposed."""

from __future__ import annotations

import numpy as np

from buffer.draw import Accept
from buffer.index import StepIndex
from buffer.takeovers import takeover_in
from fleet.batch import Filter
from fleet.robot import Source


def passing(index: StepIndex, wanted: Filter, newest_version: int) -> Accept | None:
    """Which steps pass a filter, except for its tasks; None: all. Episodes that were excluded by a label never do.

    Args:
        newest_version: Newest release; -1: the newest one behind a step of the index.
    """
    max_age = wanted.max_version_age
    allowed = index.episodes.allowed(wanted.outcomes, wanted.robots)
    of_others = index.episodes.allowed((), wanted.robots)
    if max_age is None and not wanted.before_takeover and allowed.all():
        return None
    newest = newest_version if newest_version >= 0 else index.newest_version

    def accept(steps: np.ndarray) -> np.ndarray:
        episode, source = index.episode[index.fragment[steps]], index.source[steps]
        kept: np.ndarray = allowed[episode]
        if wanted.outcomes_of:
            kept |= of_others[episode] & ~np.isin(source, wanted.outcomes_of)
        if wanted.before_takeover:
            own = np.flatnonzero(kept & (source == Source.POLICY))
            kept[own] = takeover_in(index, steps[own], wanted.before_takeover) < 0
        if max_age is not None:
            version = index.version[steps]
            kept = kept & ((version < 0) | (newest - version <= max_age))
        return kept

    return accept


def both(a: Accept | None, b: Accept | None) -> Accept | None:
    """The chance that both keep a step."""
    if a is None or b is None:
        return a or b
    return lambda steps: a(steps) * b(steps)
