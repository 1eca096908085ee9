"""Follows a log from any process: read-only, by memory maps, up to the committed length. Needs no server.

A killed reader leaves nothing behind. A writer that was killed and restarted, segments that end, and segments that
retention takes away are nothing special: the reader goes on with the next one. A file that is unlinked stays in memory
as long as anything that was read from it.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.manifest import ManifestView, pick_live
from buffer.segment import KIND_FRAGMENT, SegmentName, SegmentState, list_segments, read_state
from fleet.record import ALIGNMENT, Damage, Record, scan

_FOLDER_TIME_NS = 2_000_000_000  # the coarsest clock of a file system's folder times


class SegmentMap:
    """A segment in memory. Lives as long as anything points into it.

    Attributes:
        buffer: All of it for Arrow, without a copy.
        bytes: The same as uint8, read-only, cut to a multiple of 64.
        address: Where it starts in this process.
    """

    def __init__(self, name: SegmentName, data: mmap.mmap) -> None:
        self.name, self.number = name, name.number
        self.data = data
        self.buffer = pa.py_buffer(data)
        self.bytes = np.frombuffer(data, np.uint8, len(data) - len(data) % ALIGNMENT)
        self.address = int(self.buffer.address)


@dataclasses.dataclass(frozen=True)
class LogRecord:
    """A committed fragment. ``payload`` points into the mapped segment, at ``payload_at`` from its start."""

    robot_id: str
    boot_id: str
    seq: int
    spec_hash: str
    tables: dict[str, int]
    recv_ns: int
    segment: SegmentMap
    payload_at: int
    payload_length: int

    @property
    def payload(self) -> pa.Buffer:
        return self.segment.buffer.slice(self.payload_at, self.payload_length)


class LogReader:
    """Reads each committed fragment once, in the order of the log.

    Args:
        folder: The run's buffer folder; it may not exist yet.
        verify: Check the payloads' checksums too.
        replacements: Also read what retention left of segments that were read before, for a reader that drops what it
            has of the numbers in ``take_retired``. False: no fragment is returned twice, and a segment that was begun is
            read to its end, whatever becomes of it.

    Attributes:
        num_records: Fragments read so far: the position in the log.
        damaged: Runs of bytes inside of the committed length that are no valid record, with their segments.
    """

    def __init__(self, folder: Path, *, verify: bool = True, replacements: bool = False) -> None:
        self._folder, self._verify, self._replacements = folder, verify, replacements
        self._view, self._listed_ns = ManifestView(folder), -1
        self._lengths: dict[str, int] = {}  # by file, as the manifest has them
        self._queue: list[SegmentName] = []  # not read to their end, in order
        self._begun: dict[int, SegmentName] = {}  # read, wholly or in part
        self._open: dict[int, _OpenSegment] = {}
        self._retired: list[int] = []
        self.num_records = 0
        self.damaged: list[tuple[int, Damage]] = []

    def poll(self, limit: int | None = None) -> list[LogRecord]:
        """Fragments that were committed since the last call, at most ``limit``. Never waits.

        Raises:
            OSError, StorageError: The segments cannot be read.
        """
        self._refresh()
        found: list[LogRecord] = []
        while limit is None or len(found) < limit:
            place = self._first()
            if place is None:
                break
            ended = place.read(found, limit, self)
            if place.at:
                self._begun[place.name.number] = place.name
            # What another segment follows has ended, also where the disk did not take the note that says so.
            if not ended and (len(self._queue) == 1 or not place.is_at_end):
                break
            self._finish(place.name)
        self.num_records += len(found)
        return found

    def next_sealed(self) -> SegmentName | None:
        """The segment that ``poll`` would begin next, if it is sealed: for a reader that knows a quicker way to what it
        holds and then says ``pass_over``."""
        self._refresh()
        place = self._first()
        return place.name if place is not None and not place.at and place.is_sealed() else None

    def opened(self, name: SegmentName) -> tuple[SegmentMap | None, int]:
        """The segment that ``next_sealed`` named, None where the file is empty, and its length."""
        return self._open[name.number].whole

    def pass_over(self, name: SegmentName, num_records: int) -> None:
        """Takes the segment that ``next_sealed`` named as read."""
        self.num_records += num_records
        self._finish(name)

    def take_retired(self) -> list[int]:
        """Numbers of segments that were read, wholly or in part, and count no more; empty without ``replacements``. To be
        asked after each ``poll`` or ``next_sealed``, before their result is taken in, which comes after."""
        retired, self._retired = self._retired, []
        return retired

    def close(self) -> None:
        """Lets go of the files. Records that were read stay valid."""
        for number in list(self._open):
            self._open.pop(number).close()

    def _refresh(self) -> None:
        """Lists the folder anew where it changed."""
        try:
            changed_ns = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return
        if changed_ns == self._listed_ns:
            return
        # A folder that changed just now may change again and keep its time.
        self._listed_ns = changed_ns if time.time_ns() - changed_ns > _FOLDER_TIME_NS else -1
        manifest = self._view.refresh()  # before the listing: a file that replaces a retired one is in it then
        self._lengths = {entry.file: entry.length for entry in manifest.segments}
        live = {name.number: name for name in pick_live(list_segments(self._folder), manifest)}
        for number, begun in list(self._begun.items()):
            if live.get(number) != begun:
                if self._replacements:
                    self._retired.append(number)
                    self._forget(number)
                else:
                    live[number] = begun
        self._queue = sorted(n for n in live.values() if n.number not in self._begun or n.number in self._open)

    def _first(self) -> _OpenSegment | None:
        """The place in the first segment that was not read to its end."""
        while self._queue:
            name = self._queue[0]
            place = self._open.get(name.number)
            if place is not None and place.name == name:
                return place
            self._forget(name.number)
            try:
                place = _OpenSegment.open(name, self._lengths.get(name.path.name))
            except FileNotFoundError:  # unlinked since the listing, so something else may stand for it now
                self._queue.pop(0)
                self._listed_ns = -1
                if self._replacements:  # what is retired is told before anything that replaces it is read: by the next call
                    return None
                self._refresh()
                continue
            if place is not None:
                self._open[name.number] = place
            return place
        return None

    def _finish(self, name: SegmentName) -> None:
        self._forget(name.number)
        self._begun[name.number] = name
        self._queue.remove(name)

    def _forget(self, number: int) -> None:
        self._begun.pop(number, None)
        if number in self._open:
            self._open.pop(number).close()


class _OpenSegment:
    """The reader's place in one segment.

    Attributes:
        at: Bytes that were read.
    """

    def __init__(self, name: SegmentName, state_fd: int, state: SegmentState) -> None:
        self.name, self.at = name, 0
        self._state_fd, self._state = state_fd, state
        self._map = map_segment(name)

    @classmethod
    def open(cls, name: SegmentName, length: int | None) -> _OpenSegment | None:
        """None while the writer is still making it, or while its state is lost and the log was not opened since.

        Args:
            length: Of a sealed segment, where the manifest knows it.

        Raises:
            FileNotFoundError: The segment is not there any more.
        """
        state = SegmentState(0, False) if length is None else SegmentState(length, True)
        try:
            state_fd = os.open(name.state_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not state.sealed and name.path.exists():
                return None
            return cls(name, -1, state)
        try:
            return cls(name, state_fd, state)
        except OSError:
            os.close(state_fd)
            raise

    @property
    def whole(self) -> tuple[SegmentMap | None, int]:
        """All of the segment, and its committed length."""
        return self._map, self._state.length

    @property
    def is_at_end(self) -> bool:
        return self.at == self._state.length

    def is_sealed(self) -> bool:
        if not self._state.sealed:
            self._state = read_state(self._state_fd) or self._state
        return self._state.sealed

    def read(self, found: list[LogRecord], limit: int | None, reader: LogReader) -> bool:
        """Adds new records to ``found``; True when the segment has ended and was read to its end."""
        ended, length = self.is_sealed(), self._state.length
        if length > self.at and self._map is not None:
            data = self._map.data
            for item in scan(data, self.at, min(length, len(data)), self.name.salt, verify=reader._verify):
                if limit is not None and len(found) >= limit:
                    return False
                self.at = item.end
                if isinstance(item, Damage):
                    reader.damaged.append((self.name.number, item))
                elif item.kind == KIND_FRAGMENT:
                    found.append(log_record(item, self._map))
        self.at = length
        return ended

    def close(self) -> None:
        if self._state_fd >= 0:
            os.close(self._state_fd)
            self._state_fd = -1


def map_segment(name: SegmentName) -> SegmentMap | None:
    """All of a segment; it has its full size from the start. None where it is empty."""
    with name.path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return None
        return SegmentMap(name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def log_record(record: Record, segment: SegmentMap) -> LogRecord:
    """A scanned record of a mapped segment as what it stores."""
    key: dict[str, Any] = record.key
    return LogRecord(
        robot_id=key["robot"],
        boot_id=key["boot"],
        seq=key["seq"],
        spec_hash=key["spec_hash"],
        tables=key["tables"],
        recv_ns=key["recv_ns"],
        segment=segment,
        payload_at=record.payload_at,
        payload_length=record.payload_length,
    )
