"""Follows a log from any process: read-only, by memory maps, up to the committed length. Needs no server.

A killed reader leaves nothing behind. A writer that was killed and restarted, and segments that end, are nothing
special: the reader goes on with the next segment.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.segment import KIND_FRAGMENT, SegmentName, SegmentState, list_segments, read_state
from fleet.record import ALIGNMENT, Damage, Record, scan


class SegmentMap:
    """A segment in memory. Lives as long as anything points into it.

    Attributes:
        buffer: All of it for Arrow, without a copy.
        bytes: The same as uint8, read-only, cut to a multiple of 64.
        address: Where it starts in this process.
    """

    def __init__(self, name: SegmentName, data: mmap.mmap) -> None:
        self.number = name.number
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
        verify: Check the payloads' checksums too; 0.03 ms for 100 kB.

    Attributes:
        num_records: Fragments read so far: the position in the log.
        damaged: Runs of bytes inside of the committed length that are no valid record, with their segments.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self._folder, self._verify = folder, verify
        self._segment: _OpenSegment | None = None
        self._last_number = 0
        self.num_records = 0
        self.damaged: list[tuple[int, Damage]] = []

    def poll(self, limit: int | None = None) -> list[LogRecord]:
        """Fragments that were committed since the last call, at most ``limit``. Never waits.

        Raises:
            OSError: The segments cannot be read.
        """
        found: list[LogRecord] = []
        while limit is None or len(found) < limit:
            segment = self._segment or self._open_next()
            if segment is None:
                break
            self._segment = segment
            ended = segment.read(found, limit, self)
            if not ended:
                break
            segment.close()
            self._last_number, self._segment = segment.name.number, None
        self.num_records += len(found)
        return found

    def close(self) -> None:
        """Lets go of the files. Records that were read stay valid."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _open_next(self) -> _OpenSegment | None:
        if not self._folder.is_dir():
            return None
        for name in list_segments(self._folder):
            if name.number > self._last_number:
                return _OpenSegment.open(name)
        return None


class _OpenSegment:
    """The reader's place in one segment."""

    def __init__(self, name: SegmentName, state_fd: int) -> None:
        self.name, self._state_fd = name, state_fd
        self._at = 0
        self._state = SegmentState(0, False)
        self._map: SegmentMap | None = None

    @classmethod
    def open(cls, name: SegmentName) -> _OpenSegment | None:
        """None while the writer is still making it, or while its state is lost and the log was not opened since."""
        try:
            return cls(name, os.open(name.state_path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None

    def read(self, found: list[LogRecord], limit: int | None, reader: LogReader) -> bool:
        """Adds new records to ``found``; True when the segment has ended and was read to its end."""
        self._state = read_state(self._state_fd) or self._state
        length = self._state.length
        if length > self._at:
            segment = self._mapped()
            for item in scan(segment.data, self._at, min(length, len(segment.data)), self.name.salt, verify=reader._verify):
                if limit is not None and len(found) >= limit:
                    return False
                self._at = item.end
                if isinstance(item, Damage):
                    reader.damaged.append((self.name.number, item))
                elif item.kind == KIND_FRAGMENT:
                    found.append(_log_record(item, segment))
            self._at = length
        return self._state.sealed

    def _mapped(self) -> SegmentMap:
        if self._map is None:
            with self.name.path.open("rb") as file:
                self._map = SegmentMap(self.name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._map

    def close(self) -> None:
        os.close(self._state_fd)


def _log_record(record: Record, segment: SegmentMap) -> LogRecord:
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
