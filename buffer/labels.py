"""What is said of episodes later: an operator's mark, a correction of an outcome, an exclusion. Nothing is ever changed.

Labels are rows of the ``labels`` table in a second log, ``buffer/labels/``, to which anybody on this machine may append while
a gateway writes the first one. Of each field the newest label counts when data is read; of two with the same time that of
this log before a robot's own, then the later one in the log.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from buffer.log import Log
from buffer.reader import LogReader
from buffer.segment import EpisodeKey
from fleet.batch import Outcome
from fleet.errors import EpisodeError, FragmentRefused, RunFolderError
from fleet.lookup import nearest
from fleet.schema import LABELS, decode_fragment, encode_fragment

OUTCOME, EXCLUDED = "outcome", "excluded"
FIELDS: dict[str, tuple[str, ...]] = {
    OUTCOME: tuple(outcome.name.lower() for outcome in Outcome if outcome is not Outcome.OPEN),
    EXCLUDED: ("true", "false"),
}
BY_ROBOT, AFTERWARDS = 0, 1  # ranks: of two labels with the same time the higher one counts
SEGMENT_BYTES = 1024 * 1024
WRITER = ("labels", "labels")  # instead of robot and boot; the keys of this log are gapless like those of the first
_ROWS = 5000  # of one fragment
_RETRY_S = 0.05


@dataclasses.dataclass(frozen=True)
class Label:
    """One fact about one episode. ``time_ns``: wall clock of the judge."""

    robot_id: str
    boot_id: str
    episode_id: int
    field: str
    value: str
    judge: str
    time_ns: int

    @property
    def episode(self) -> EpisodeKey:
        return self.robot_id, self.boot_id, self.episode_id


def labels_folder(buffer: Path) -> Path:
    return buffer / "labels"


def check_label(field: str, value: str) -> None:
    """Raises EpisodeError where no label may say this."""
    if field not in FIELDS:
        raise EpisodeError(f"field {field!r}", rule="a label says something that is known", remedy=nearest(field, FIELDS))
    if value not in FIELDS[field]:
        raise EpisodeError(
            f"{field} = {value!r}", rule=f"one of {', '.join(FIELDS[field])}", remedy=nearest(value, FIELDS[field])
        )


def append_labels(buffer: Path, labels: Sequence[Label], *, wait_s: float = 10.0) -> None:
    """Makes labels durable; readers see them at their next poll.

    Args:
        buffer: The run's buffer folder. A gateway may be writing to it.
        wait_s: How long to wait for another process that appends labels.

    Raises:
        EpisodeError: A label says what none may say; none of them is stored.
        RunFolderError: Another process kept the labels for that long.
        DiskFull, StorageError: Some or none of them are stored.
    """
    for label in labels:
        check_label(label.field, label.value)
    log = _open_log(labels_folder(buffer), wait_s)
    try:
        for first in range(0, len(labels), _ROWS):
            rows = [dataclasses.asdict(label) for label in labels[first : first + _ROWS]]
            tables, payload = encode_fragment({"labels": pa.RecordBatch.from_pylist(rows, schema=LABELS)})
            log.append(*WRITER, log.last(*WRITER).seq + 1, "", tables, payload)
        log.commit()
    finally:
        log.close()


def _open_log(folder: Path, wait_s: float) -> Log:
    until_s = time.monotonic() + wait_s
    while True:
        try:
            return Log(folder, segment_bytes=SEGMENT_BYTES)
        except RunFolderError:
            if time.monotonic() >= until_s:
                raise
            time.sleep(_RETRY_S)


class LabelReader:
    """Follows the labels that were appended, in their order. Read-only, from any process.

    Args:
        skipped: Is counted on where it is given.

    Attributes:
        skipped: Fragments that could not be read, by the error's code.
    """

    def __init__(self, buffer: Path, skipped: collections.Counter[str] | None = None) -> None:
        self._reader = LogReader(labels_folder(buffer))
        self.skipped: collections.Counter[str] = collections.Counter() if skipped is None else skipped

    @property
    def num_records(self) -> int:
        """Fragments read so far."""
        return self._reader.num_records

    def poll(self) -> list[Label]:
        """Labels since the last call. Never waits.

        Raises:
            OSError, StorageError: The log cannot be read.
        """
        found: list[Label] = []
        for record in self._reader.poll():
            try:
                rows = decode_fragment(record.tables, record.payload).tables["labels"].to_pylist()
            except (FragmentRefused, KeyError) as error:
                self.skipped[getattr(error, "code", FragmentRefused.code)] += 1
                continue
            found += (label_of(row) for row in rows)
        return found

    def close(self) -> None:
        self._reader.close()


def label_of(row: dict[str, Any]) -> Label:
    """A row of a labels table."""
    return Label(**{field.name: row[field.name] for field in dataclasses.fields(Label)})


class Judged:
    """What the labels of one episode say, in whatever order they are read. Of a field the newest by the judge's clock counts;
    of two with one time that with the higher rank, then the one that was read later. What no label may say counts for nothing.

    Args:
        labels: Of one rank, in the order in which they were read.
    """

    __slots__ = ("_newest",)

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self._newest: dict[str, tuple[tuple[int, int], Label]] = {}
        for label in labels:
            self.add(label)

    def add(self, label: Label, rank: int = BY_ROBOT) -> None:
        """One more label: ``BY_ROBOT``, or ``AFTERWARDS`` for one of the labels' own log."""
        if label.value not in FIELDS.get(label.field, ()):
            return
        order, known = (label.time_ns, rank), self._newest.get(label.field)
        if known is None or order >= known[0]:
            self._newest[label.field] = order, label

    @property
    def outcome(self) -> Label | None:
        """The label by which the outcome goes; None: what the robot said stands."""
        return self._newest[OUTCOME][1] if OUTCOME in self._newest else None

    @property
    def excluded(self) -> bool:
        return EXCLUDED in self._newest and self._newest[EXCLUDED][1].value == "true"
