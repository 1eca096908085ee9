"""The log's writer: append fragments, commit a group of them with one fsync, recover after a kill or a power loss.

``append`` gives a fragment to the operating system, ``commit`` makes everything appended durable and only then
visible to readers. What ``commit`` did not return was not stored: after an error the group is forgotten, the
high-water marks go back to what is durable, and robots resend from there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from buffer.manifest import live_segments
from buffer.segment import (
    BootKey,
    Mark,
    Marks,
    Recovered,
    SegmentName,
    SegmentWriter,
    list_segments,
    pack_marks,
    read_header,
    read_marks,
    read_state_file,
    recover_segment,
)
from fleet.errors import DiskFull, SpecError, StorageError
from fleet.files import Files, FolderLock, storage_errors
from fleet.record import packed_size
from fleet.spec import RobotSpec

SEGMENT_BYTES = 256 * 1024 * 1024
_LOOK_BYTES, _LOOK_S = 64 * 1024 * 1024, 1.0  # how often the disk is asked for its room
_SPEC_HASH = re.compile(r"[0-9a-f]{16}")  # it comes from the network and names a file
_KEY_BYTES = 64 * 1024  # more than a FRAGMENT header can carry


class _Room:
    """Refuses what would leave less than ``min_free`` bytes on the disk, which other programs need too.

    The disk is asked once a second or each 64 MiB, and for each fragment while there is no room.
    """

    def __init__(self, files: Files, folder: Path, min_free: int) -> None:
        self._files, self._folder, self._min_free = files, folder, min_free
        self._free, self._until_s = 0, 0.0

    def take(self, length: int) -> None:
        """Raises DiskFull; nothing was written then."""
        if not self._min_free:
            return
        now_s = time.monotonic()
        if now_s >= self._until_s or self._free - length < self._min_free:
            with storage_errors(f"looking at the disk of {self._folder}"):
                free = self._files.free_bytes(self._folder)
            # What is written until the next look is counted here: it may reach the disk later.
            self._free, self._until_s = min(free, self._min_free + _LOOK_BYTES), now_s + _LOOK_S
        if self._free - length < self._min_free:
            raise DiskFull(
                f"{self._free / 1e9:.2f} GB are free on the disk of {self._folder}",
                rule=f"at least {self._min_free / 1e9:.2f} GB stay free (buffer.min_free_gb)",
                remedy="free space on this disk, or set buffer.max_gb; robots keep their data and work goes on by itself",
            )
        self._free -= length


class Log:
    """One process writes; a second one is refused.

    Args:
        folder: The run's buffer folder.
        files: The seam for file calls.
        segment_bytes: A segment is sealed before it would grow beyond this.
        min_free_bytes: A fragment that would leave less on the disk is refused before anything of it is written.

    Attributes:
        recovered: Segments that the last writer had left unsealed, with what was found in them.

    Raises:
        RunFolderError: Another process writes to this log.
        StorageError: The disk cannot be read, or does not confirm what is already there.
    """

    def __init__(
        self, folder: Path, *, files: Files | None = None, segment_bytes: int = SEGMENT_BYTES, min_free_bytes: int = 0
    ) -> None:
        self._files, self._segment_bytes = files or Files(), segment_bytes
        self._folder, self._specs_folder = folder, folder / "specs"
        with storage_errors(f"opening the log in {folder}"):
            # Names that a killed writer made are only seen, not yet durable: in ``folder`` by the second line, too.
            self._files.make_folders(folder)
            self._files.make_folders(self._specs_folder)
            self._files.fsync_dir(self._specs_folder)
            self._lock = FolderLock(folder, "log")
        self._room = _Room(self._files, folder, min_free_bytes)
        self._specs: dict[str, RobotSpec] = {}
        self._active: SegmentWriter | None = None
        self._unreported: set[BootKey] = set()
        with storage_errors(f"opening the log in {folder}"):
            names = live_segments(folder)
            self._next_number = max((name.number for name in list_segments(folder)), default=0) + 1
            self.recovered = self._recover(names)
            self._durable = self._read_marks(names)
        self._marks = dict(self._durable)

    def _recover(self, names: Sequence[SegmentName]) -> tuple[Recovered, ...]:
        """Seals every segment that is not, newest first: each ends where the next one's marks say. Only those are scanned."""
        done, after = [], list(names)
        while after:
            name = after.pop()
            state = read_state_file(name.state_path)
            if state is None or not state.sealed:
                done.append(recover_segment(self._files, name, _header_marks(names[len(after) + 1 :])))
        return tuple(reversed(done))

    def _read_marks(self, names: Sequence[SegmentName]) -> Marks:
        """Marks of the newest segment with an intact header, and what the fragments in it and after it add."""
        marks: Marks = {}
        for name in reversed(names):
            state = read_state_file(name.state_path)
            header, of_fragments = read_marks(name, state.length if state else 0)
            for key, mark in (*of_fragments.items(), *(header.marks if header else {}).items()):
                if mark.seq > marks.get(key, Mark()).seq:
                    marks[key] = mark
            if header is not None:
                break
        return marks

    def add_spec(self, spec: RobotSpec) -> None:
        """Stores a spec durably. Called before the first fragment that names it.

        Raises:
            DiskFull, StorageError: The spec is not stored.
        """
        if spec.hash in self._specs:
            return
        path = self._specs_folder / f"{spec.hash}.json"
        if not path.exists():
            with storage_errors(f"storing spec {spec.hash}"):
                self._files.write_atomic(path, json.dumps(spec.to_dict()).encode())
        self._specs[spec.hash] = spec

    def specs(self) -> list[RobotSpec]:
        """All specs that data was stored under."""
        names = sorted(path.stem for path in (self._folder / "specs").glob("*.json"))
        return [spec for name in names if (spec := self.spec(name)) is not None]

    def spec(self, spec_hash: str) -> RobotSpec | None:
        """A spec that was added, also by an earlier process; None if it never was."""
        if spec_hash not in self._specs:
            spec = load_spec(self._folder, spec_hash)
            if spec is None:
                return None
            self._specs[spec_hash] = spec
        return self._specs[spec_hash]

    def high_water(self, robot_id: str, boot_id: str) -> int:
        """The highest seq that is durable, 0 for none: what a robot may forget."""
        return self._durable.get((robot_id, boot_id), Mark()).seq

    def last(self, robot_id: str, boot_id: str) -> Mark:
        """The newest appended fragment, durable or not."""
        return self._marks.get((robot_id, boot_id), Mark())

    def append(
        self,
        robot_id: str,
        boot_id: str,
        seq: int,
        spec_hash: str,
        tables: Mapping[str, int],
        payload: bytes | memoryview,
        note: tuple[Any, ...] = (),
        *,
        episode: int = -1,
        steps: Sequence[int] = (),
    ) -> None:
        """Appends one fragment as received. It is not durable before ``commit`` returns it.

        Args:
            note: Small plain data kept beside the newest fragment of each (robot, boot), also across segments.
            episode: The episode that its steps belong to.
            steps: How many steps it has of each fleet.robot.Source, by the source's number; retention goes by it.

        Raises:
            DiskFull: No room, or less than ``min_free_bytes`` would be left. Earlier fragments of the group are unaffected;
                try again when there is room.
            StorageError: The disk failed.
        """
        key = {
            "robot": robot_id,
            "boot": boot_id,
            "seq": seq,
            "spec_hash": spec_hash,
            "tables": dict(tables),
            "recv_ns": time.time_ns(),
            "note": note,
            "episode": episode,
            "steps": tuple(steps),
        }
        self._room.take(packed_size(_KEY_BYTES, len(payload)))
        if self._active is not None and not self._active.fits(_KEY_BYTES, len(payload)):
            self._end_segment()
        if self._active is None:
            self._active = self._new_segment(len(payload))
        self._active.append(key, payload)
        self._marks[robot_id, boot_id] = Mark(seq, note)
        self._unreported.add((robot_id, boot_id))

    def commit(self) -> list[tuple[str, str, int]]:
        """Makes everything appended durable with one fsync.

        Returns:
            (robot_id, boot_id, seq) for each boot that got further since the last call.

        Raises:
            DiskFull, StorageError: Nothing of this group is stored, and its segment is abandoned.
        """
        if self._active is not None:
            if self._active.written > self._active.committed:
                self._sync(self._active)
            if self._active.broken:
                self._end_segment()
        newly = [(robot, boot, self._durable[robot, boot].seq) for robot, boot in sorted(self._unreported)]
        self._unreported.clear()
        return newly

    def close(self) -> None:
        """Seals the active segment; fragments that were not committed are not stored. Another process may open the log then."""
        if self._active is not None:
            self._active.seal()
            self._active = None
        self._lock.release()

    def _new_segment(self, payload_length: int) -> SegmentWriter:
        marks_length = len(pack_marks(self._durable))
        room = packed_size(_KEY_BYTES, marks_length) + packed_size(_KEY_BYTES, payload_length)
        number, self._next_number = self._next_number, self._next_number + 1
        return SegmentWriter(self._files, self._folder, number, self._durable, max(self._segment_bytes, room))

    def _end_segment(self) -> None:
        if self._active is not None:
            if self._active.written > self._active.committed:
                self._sync(self._active)
            self._active.seal()
            self._active = None

    def _sync(self, segment: SegmentWriter) -> None:
        try:
            segment.sync()
        except StorageError:
            # What a failed fsync left behind may be lost although a second fsync would succeed: never use it again.
            segment.seal()
            self._active = None
            self._marks = dict(self._durable)
            self._unreported.clear()
            raise
        for key in self._unreported:
            self._durable[key] = self._marks[key]


def _header_marks(names: Sequence[SegmentName]) -> Marks | None:
    """Marks at the start of the first of these segments whose header is intact."""
    for name in names:
        header = read_header(name)
        if header is not None:
            return header.marks
    return None


def load_spec(folder: Path, spec_hash: str) -> RobotSpec | None:
    """A spec of the log in ``folder``; None where there is none of this hash.

    Raises:
        SpecError: The file is damaged.
    """
    path = folder / "specs" / f"{spec_hash}.json"
    if not _SPEC_HASH.fullmatch(spec_hash) or not path.is_file():
        return None
    try:
        spec = RobotSpec.from_dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise SpecError(f"{path} cannot be read: {error}", rule="a spec is JSON") from None
    if spec.hash != spec_hash:
        raise SpecError(f"{path} has the hash {spec.hash}", rule="a spec's file is named by its hash")
    return spec
