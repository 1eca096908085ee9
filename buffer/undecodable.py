"""Images that were accepted and cannot be decoded: a run goes on without them, and says which they are.

A window with such an image is replaced by the next window of its batch that has none: one robot's broken camera ends no
learning. Where they are more than half the batch is no longer what was asked for, and it is refused. Of a rank's few rows
half may be so by chance: then others of the same batch (``Draw.wider``) are looked at too, and those count together.

Shape suffix: B batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fleet.batch import Windows
from fleet.errors import StorageError
from fleet.journal import Journal

MAX_SHARE = 0.5  # of a batch
ENOUGH = 64  # windows of which more than MAX_SHARE are not bad by chance
_SAID = 1000  # windows that are named in the journal, each once
_OF_THE_PLACE = ("index_B", "shard_weight")  # fields that say where in the batch a window is, not which one it is


class Undecodable:
    """Counts what was left out. For several threads at once.

    Args:
        keys: (robot, boot, episode_id) by the number of the episode.

    Attributes:
        num_windows: Windows that were replaced, those that were drawn again included.
    """

    def __init__(self, keys: Sequence[tuple[str, str, int]], journal: Journal | None = None) -> None:
        self._keys, self._journal = keys, journal
        self._said: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self.num_windows = 0

    def too_many(self, windows: Windows, bad: Mapping[int, str]) -> bool:
        """Whether ``leave_out`` would refuse."""
        return len(bad) > MAX_SHARE * len(windows.step_B)

    def leave_out(self, windows: Windows, bad: Mapping[int, str]) -> None:
        """Replaces windows in place.

        Args:
            bad: Why, by the window's place in the batch.

        Raises:
            StorageError: They are more than ``MAX_SHARE`` of the batch; names the first one's robot, episode and frame.
        """
        num_windows, first = len(windows.step_B), min(bad)
        if self.too_many(windows, bad):
            raise StorageError(
                f"{len(bad)} of the {num_windows} windows of a batch have an image that cannot be decoded, the first is "
                f"{self._name(windows, first)}: {bad[first]}",
                rule=f"at most {MAX_SHARE:.0%} of a batch are left out for that",
                remedy="`fleet data exclude` these episodes, and look at the robot's camera",
            )
        places = np.array(sorted(bad))
        good = np.setdiff1d(np.arange(num_windows), places)
        stand_ins = good[np.searchsorted(good, places) % len(good)]
        with self._lock:
            self.num_windows += len(bad)
            for place in places.tolist():
                self._say(windows, place, bad[place])
        for array in _arrays(_of_windows(windows)):
            array[places] = array[stand_ins]

    def _say(self, windows: Windows, place: int, why: str) -> None:
        window = int(windows.episode_B[place]), int(windows.frame_B[place])
        if self._journal is not None and window not in self._said and len(self._said) < _SAID:
            self._said.add(window)
            self._journal.write("undecodable", why=f"{self._name(windows, place)} is left out: {why}")

    def _name(self, windows: Windows, place: int) -> str:
        robot, boot, episode = self._keys[windows.episode_B[place]]
        return f"the window at frame {windows.frame_B[place]} of episode {episode} of {robot} (boot {boot})"


def put_first(windows: Windows, wider: Windows) -> None:
    """Gives windows what the first ones of others have, in place."""
    num_windows = len(windows.step_B)
    windows.replay = {name: value[:num_windows] for name, value in wider.replay.items()}
    for array, other in zip(_arrays(_of_windows(windows)), _arrays(_of_windows(wider)), strict=True):
        array[:] = other[:num_windows]


def _of_windows(windows: Windows) -> dict[str, Any]:
    return {name: value for name, value in vars(windows).items() if name not in _OF_THE_PLACE}


def _arrays(values: Mapping[Any, Any]) -> Iterator[np.ndarray]:
    for value in values.values():
        if isinstance(value, dict):
            yield from _arrays(value)
        else:
            yield value
