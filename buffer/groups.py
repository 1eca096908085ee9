"""Which episodes belong together: groups for GRPO, pairs for DPO and TPO.

Both are made of whole episodes with a known end, judged success or failure, not excluded by a label, in which no operator
acted: what is compared is the policy.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from buffer.columns import Column
from fleet.batch import Outcome
from fleet.errors import NoData


class Episodes(Protocol):
    """Columns by episode number: a Column, an array or a list. ``buffer.episodes.EpisodeTable`` has them, and says what
    they hold."""

    task: Any
    outcome: Any
    group_id: Any
    start: Any
    first_version: Any
    last_version: Any
    num_operator_steps: Any
    excluded: Any
    finished: Any
    first_step: Any


def groups(
    episodes: Episodes, *, min_size: int = 2, one_version: bool = True, drop_uniform: bool = True, with_operator: bool = False
) -> list[np.ndarray]:
    """Groups of episodes: same task and same ``group_id``; an episode without one is in no group.

    Args:
        min_size: Of a group.
        one_version: A group is of one policy version: episodes in which it changed are left out, and episodes of one
            ``group_id`` under two versions are two groups. False: versions are mixed.
        drop_uniform: Leaves out groups that succeeded, or failed, as a whole: their advantages are 0.
        with_operator: Also takes episodes in which an operator acted.

    Returns:
        Arrays of episode numbers, rising; groups in the order of their first episodes.

    Raises:
        NoData: There is no such group.
    """
    success = _values(episodes.outcome) == Outcome.SUCCESS
    first, last = _values(episodes.first_version), _values(episodes.last_version)
    usable = _usable(episodes, with_operator)
    if one_version:
        usable &= (first == last) & (first >= 0)
    tasks, ids = _values(episodes.task), _values(episodes.group_id)
    found: dict[Hashable, list[int]] = {}
    for number in np.flatnonzero(usable).tolist():
        if ids[number]:
            version = int(first[number]) if one_version else -1
            found.setdefault((int(tasks[number]), ids[number], version), []).append(number)
    whole = [np.array(members, np.int64) for members in found.values() if len(members) >= max(min_size, 1)]
    chosen = [members for members in whole if not drop_uniform or 0 < int(success[members].sum()) < len(members)]
    if not chosen:
        raise NoData(
            f"no group among {int(usable.sum())} usable of {len(usable)} episodes: {len(found)} groups were begun, "
            f"{len(whole)} of them have {min_size} episodes or more",
            rule=f"a group has {min_size} finished episodes with the same group_id"
            + (", under one policy version" if one_version else "")
            + (", not all with one outcome" if drop_uniform else ""),
            remedy="wait for robots, or let them repeat a start several times with one group_id",
        )
    return chosen


def pairs(episodes: Episodes, rng: np.random.Generator, num: int, *, with_operator: bool = False) -> np.ndarray:
    """Pairs of a success and a failure of the same task from the same start (where it is not known: same ``group_id``).

    All such pairs are equally likely, drawn with replacement.

    Returns:
        (num, 2) episode numbers: success, failure. A function of the arguments and the state of ``rng``.

    Raises:
        NoData: There is no such pair.
    """
    success = _values(episodes.outcome) == Outcome.SUCCESS
    usable = _usable(episodes, with_operator)
    tasks, starts, ids = _values(episodes.task), _values(episodes.start), _values(episodes.group_id)
    found: dict[Hashable, tuple[list[int], list[int]]] = {}
    for number in np.flatnonzero(usable).tolist():
        common = ("start", starts[number]) if starts[number] else ("group", ids[number])
        if common[1]:
            found.setdefault((int(tasks[number]), *common), ([], []))[0 if success[number] else 1].append(number)
    both = [(np.array(won), np.array(lost)) for won, lost in found.values() if won and lost]
    if not both:
        raise NoData(
            f"no pair among {int(usable.sum())} usable of {len(usable)} episodes, from {len(found)} starts",
            rule="a pair is a success and a failure of one task from one start or group",
            remedy="wait for robots, or let them repeat starts",
        )
    ends = np.cumsum([len(won) * len(lost) for won, lost in both])
    at = rng.integers(ends[-1], size=num)
    out = np.empty((num, 2), np.int64)
    which = np.searchsorted(ends, at, side="right")
    for number in np.unique(which).tolist():
        mine, (won, lost) = which == number, both[number]
        within = at[mine] - (ends[number] - len(won) * len(lost))
        out[mine, 0], out[mine, 1] = won[within // len(lost)], lost[within % len(lost)]
    return out


def _usable(episodes: Episodes, with_operator: bool) -> np.ndarray:
    """Finished, judged, not excluded, of a task that is asked for, with steps; unless ``with_operator`` no operator acted."""
    usable: np.ndarray = np.isin(_values(episodes.outcome), (Outcome.SUCCESS, Outcome.FAILURE))
    usable &= _values(episodes.finished).astype(bool) & ~_values(episodes.excluded).astype(bool)
    usable &= (_values(episodes.task) >= 0) & (_values(episodes.first_step) >= 0)
    return usable if with_operator else usable & (_values(episodes.num_operator_steps) == 0)


def _values(column: Column | np.ndarray | Sequence[Any]) -> np.ndarray:
    if isinstance(column, Column):
        return column.view
    return np.array(column, object) if len(column) and isinstance(column[0], str) else np.asarray(column)
