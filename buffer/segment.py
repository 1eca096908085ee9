"""A segment: one file of records, written by one process, sealed once, never truncated or appended to again.

    00000001-<salt>.seg      a header record (the marks of every (robot, boot) at its start), then fragments; its key says
                             whether retention left it as a part of an earlier file (generation, kept_for)
    00000001-<salt>.state    32 bytes: committed length, sealed or not; overwritten in place after each fsync

The segment file has its full size from the start (without using disk space), so that a reader maps it once. What
counts is the committed length: readers go up to it and never see bytes that are not on the disk. The state file
itself is fsynced only when a segment is sealed: after a power loss the records say what was valid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import re
import secrets
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack

from fleet.errors import StorageError
from fleet.files import Files, storage_errors
from fleet.record import SALT_BYTES, Damage, Record, crc32c, pack, packed_size, parse, payload_intact, scan

KIND_HEADER = 1
KIND_FRAGMENT = 2
BEGIN_BYTES = 256 * 1024
_NAME = re.compile(r"^(\d{8})-([0-9a-f]{16})\.seg$")
_STATE = struct.Struct("<4sB3xQ12x")
_CHECK = struct.Struct("<I")
_STATE_MAGIC = b"FLS1"
STATE_BYTES = _STATE.size + _CHECK.size

BootKey = tuple[str, str]  # robot_id, boot_id
EpisodeKey = tuple[str, str, int]  # robot_id, boot_id, episode_id


@dataclasses.dataclass(frozen=True)
class Mark:
    """What the log knows of one (robot, boot): the highest seq, and what ingest noted beside that fragment."""

    seq: int = 0
    note: tuple[Any, ...] = ()


Marks = dict[BootKey, Mark]


@dataclasses.dataclass(frozen=True)
class SegmentState:
    """Bytes that readers may see, and whether there will be no more."""

    length: int
    sealed: bool


@dataclasses.dataclass(frozen=True, order=True)
class SegmentName:
    """A segment by its number; the salt in its name is that of its records."""

    number: int
    path: Path
    salt: bytes = dataclasses.field(compare=False)

    @property
    def state_path(self) -> Path:
        return self.path.with_suffix(".state")

    @property
    def index_path(self) -> Path:
        return self.path.with_suffix(".index")


def list_segments(folder: Path) -> list[SegmentName]:
    """All segments of a log by number, also those that count no more: see ``manifest.live_segments``."""
    with os.scandir(folder) as found:
        return sorted(segment_name(folder / entry.name) for entry in found if _NAME.match(entry.name))


def segment_name(path: Path) -> SegmentName:
    """A segment by its file.

    Raises:
        StorageError: This is no name of a segment.
    """
    match = _NAME.match(path.name)
    if match is None:
        raise StorageError(f"{path} is no segment", rule="NNNNNNNN-<salt>.seg")
    return SegmentName(int(match[1]), path, bytes.fromhex(match[2]))


def read_state(fd: int) -> SegmentState | None:
    """The newest state, or None where it is damaged or just being written."""
    data = os.pread(fd, STATE_BYTES, 0)
    if len(data) != STATE_BYTES or _CHECK.unpack_from(data, _STATE.size)[0] != crc32c(data[: _STATE.size]):
        return None
    magic, sealed, length = _STATE.unpack_from(data)
    return SegmentState(length, bool(sealed)) if magic == _STATE_MAGIC else None


def read_state_file(path: Path) -> SegmentState | None:
    """The state in a file; None where the file is missing or damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return read_state(fd)
    finally:
        os.close(fd)


def _pack_state(state: SegmentState) -> bytes:
    data = _STATE.pack(_STATE_MAGIC, state.sealed, state.length)
    return data + _CHECK.pack(crc32c(data))


def pack_marks(marks: Marks) -> bytes:
    data: bytes = msgpack.packb([[robot, boot, mark.seq, mark.note] for (robot, boot), mark in marks.items()])
    return data


def unpack_marks(data: bytes | memoryview) -> Marks:
    return {(robot, boot): Mark(seq, tuple(note)) for robot, boot, seq, note in msgpack.unpackb(data)}


def mark_of(key: dict[str, Any]) -> tuple[BootKey, Mark]:
    """What a fragment's key says about its (robot, boot)."""
    return (key["robot"], key["boot"]), Mark(key["seq"], tuple(key["note"]))


class SegmentWriter:
    """The active segment. After any error it is ``broken``: it takes no more records and is to be sealed.

    Args:
        marks: High-water marks of everything before this segment; its header repeats them.
        capacity: Size of the file in bytes.

    Raises:
        DiskFull, StorageError: The segment could not be made; nothing of it is left.
    """

    def __init__(self, files: Files, folder: Path, number: int, marks: Marks, capacity: int) -> None:
        salt = secrets.token_bytes(SALT_BYTES)
        self.name = SegmentName(number, folder / f"{number:08d}-{salt.hex()}.seg", salt)
        self._files, self._capacity = files, capacity
        self._fds: list[int] = []
        self.written = self.committed = 0
        self.broken = False
        header = pack_header(number, pack_marks(marks), salt)
        try:
            with storage_errors(f"a new segment in {folder}"):
                self._fds.append(files.open_new(self.name.path))
                files.reserve(self._fds[0], capacity)
                files.write(self._fds[0], header)
                files.fsync(self._fds[0])
                self.written = self.committed = sum(len(part) for part in header)
                self._fds.append(files.open_new(self.name.state_path))
                files.write_at(self._fds[1], _pack_state(SegmentState(self.committed, False)), 0)
                files.fsync_dir(folder)
        except StorageError:
            self._remove()
            raise

    def fits(self, key_bytes: int, payload_length: int) -> bool:
        return not self.broken and self.written + packed_size(key_bytes, payload_length) <= self._capacity

    def append(self, key: dict[str, Any], payload: bytes | memoryview) -> None:
        """Hands one fragment to the operating system. O(1) in what is stored.

        Raises:
            DiskFull, StorageError: The fragment is not in the segment, which is broken now.
        """
        record = pack(KIND_FRAGMENT, key, payload, self.name.salt, self.committed)
        try:
            with storage_errors(f"appending to {self.name.path}"):
                self._files.write(self._fds[0], record)
        except StorageError:
            self.broken = True
            raise
        length = sum(len(part) for part in record)
        if length >= BEGIN_BYTES:  # by the time of the fsync most of a large group is on the disk
            self._files.start_writing(self._fds[0], self.written, length)
        self.written += length

    def sync(self) -> None:
        """Makes all appended fragments durable, then lets readers see them.

        Raises:
            DiskFull, StorageError: None of them is; the segment must be abandoned.
        """
        try:
            with storage_errors(f"fsync of {self.name.path}"):
                self._files.fsync(self._fds[0])
                self._files.write_at(self._fds[1], _pack_state(SegmentState(self.written, False)), 0)
        except StorageError:
            self.broken = True
            raise
        self.committed = self.written

    def seal(self) -> None:
        """Ends the segment at its committed length. What lies behind it does not count and never will.

        A state that cannot be stored is no loss: recovery finds the same end by the next segment's marks.
        """
        self.broken = True
        with contextlib.suppress(StorageError), storage_errors(f"sealing {self.name.path}"):
            self._files.write_at(self._fds[1], _pack_state(SegmentState(self.committed, True)), 0)
            self._files.fsync(self._fds[1])
        self._close()

    def _close(self) -> None:
        for fd in self._fds:
            self._files.close(fd)
        self._fds = []

    def _remove(self) -> None:
        self._close()
        for path in (self.name.path, self.name.state_path):
            with contextlib.suppress(OSError):
                self._files.unlink(path)


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What became of a segment that nobody had sealed: its end, what it holds, and the damage inside of it."""

    name: SegmentName
    length: int
    num_fragments: int
    damaged: tuple[Damage, ...]


def recover_segment(files: Files, name: SegmentName, next_marks: Marks | None) -> Recovered:
    """Seals a segment whose writer died at its last valid record.

    Up to the length that is proven to have been fsynced (by the state, or by any later record) damage is skipped and
    counted. Behind it the first damage is the end: after a power loss a later record may be whole while an earlier
    one, not acknowledged either, is missing, and keeping it would hide the gap from the robot.

    Args:
        next_marks: Marks of the following segment where there is one: what goes beyond them was abandoned.

    Raises:
        StorageError: The segment cannot be fsynced or read.
    """
    with storage_errors(f"recovering {name.path}"):
        fd = files.open_existing(name.path)
        try:
            # What is found here will be reported as durable, so it must be on the disk, and be read from it.
            files.fsync(fd)
            files.drop_cache(fd)
            items = _read_items(fd, name.salt)
        finally:
            files.close(fd)
        known = read_state_file(name.state_path)
        proven = max([known.length if known else 0, *(item.fsynced for item in items if isinstance(item, Record))])
        result = _find_end(name, items, proven, next_marks)
        store_state(files, name, SegmentState(result.length, True))
    return result


def _read_items(fd: int, salt: bytes) -> list[Record | Damage]:
    size = os.fstat(fd).st_size
    if size == 0:
        return []
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as data:
        return list(scan(data, 0, size, salt))


def _find_end(name: SegmentName, items: Iterable[Record | Damage], proven: int, next_marks: Marks | None) -> Recovered:
    end = num_fragments = 0
    damaged: list[Damage] = []
    for item in items:
        if isinstance(item, Damage):
            if item.at >= proven:
                break
            damaged.append(item)
            continue
        if item.kind == KIND_FRAGMENT:
            key, mark = mark_of(item.key)
            if next_marks is not None and mark.seq > next_marks.get(key, Mark()).seq:
                break
            num_fragments += 1
        end = item.end
    return Recovered(name, max(end, proven), num_fragments, tuple(damaged))  # readers have been to ``proven`` already


def store_state(files: Files, name: SegmentName, state: SegmentState) -> None:
    """Stores a state durably; raises OSError."""
    new = not name.state_path.exists()
    fd = files.open_new(name.state_path) if new else files.open_existing(name.state_path)
    try:
        files.write_at(fd, _pack_state(state), 0)
        files.fsync(fd)
    finally:
        files.close(fd)
    if new:
        files.fsync_dir(name.state_path.parent)


@dataclasses.dataclass(frozen=True)
class Header:
    """A segment's first record.

    Attributes:
        marks: High-water marks of everything before the segment.
        generation: 0 as it was written, one more each time retention left a part of it.
    """

    marks: Marks
    generation: int


def pack_header(number: int, marks: bytes | memoryview, salt: bytes, **more: Any) -> list[bytes | memoryview]:
    """The header record as buffers; ``marks`` as of ``pack_marks``."""
    return pack(KIND_HEADER, {"number": number, **more}, marks, salt, 0)


def read_header(name: SegmentName) -> Header | None:
    """The header of a segment; None where it is damaged.

    Raises:
        OSError: The file cannot be read.
    """
    data = mapped(name)
    return _header(parse(data, 0, len(data), name.salt), data)


def _header(record: Record | Damage | None, data: Any) -> Header | None:
    if not isinstance(record, Record) or record.kind != KIND_HEADER or not payload_intact(data, record):
        return None
    marks = unpack_marks(data[record.payload_at : record.payload_at + record.payload_length])
    return Header(marks, record.key.get("generation", 0))


def read_marks(name: SegmentName, length: int) -> tuple[Header | None, Marks]:
    """The header of a sealed segment, None where it is damaged, and the marks that its fragments set.

    Raises:
        OSError: The file cannot be read.
    """
    data = mapped(name, length)
    header = _header(parse(data, 0, len(data), name.salt), data)
    items = scan(data, 0, len(data), name.salt, verify=False)
    return header, dict(mark_of(item.key) for item in items if isinstance(item, Record) and item.kind == KIND_FRAGMENT)


def mapped(name: SegmentName, length: int = 1 << 62) -> mmap.mmap | bytes:
    """The first ``length`` bytes of a segment, as far as there are so many, read-only.

    Raises:
        OSError: The file cannot be read.
    """
    with name.path.open("rb") as file:
        length = min(length, os.fstat(file.fileno()).st_size)
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) if length else b""
