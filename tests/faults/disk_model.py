"""A disk that loses its power: records every call of the seam ``fleet.files.Files``, then builds what may be left of it.

What holds for the disks that we trust, and nothing beyond it:
- bytes written to a file are there after an fsync of that file; before, each write may be missing, torn or there
  although an earlier one is not;
- a name that was made, replaced or removed is so after an fsync of its folder; before, each change may be missing or
  there, in any combination; a replacement within one folder happens whole or not at all.

No call reaches a real disk's cache flush, so that hundreds of disks take seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path

from fleet.files import Files

SECTOR = 512
FOLDER = 0  # stands where a file has its number
LOST = ("none", "all", "some", "first", "sectors", "junk")


class Unsynced(Files):
    """For small logs and spools that nobody cuts the power of."""

    def fsync(self, fd):
        pass

    def fsync_dir(self, folder):
        pass


class Killed(BaseException):
    """The process ended here."""


@dataclasses.dataclass(frozen=True)
class Write:
    file: int
    at: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Resize:
    file: int
    size: int


@dataclasses.dataclass(frozen=True)
class Sync:
    file: int


@dataclasses.dataclass(frozen=True)
class Moved:
    """What becomes of a folder that is renamed: what lies in it goes along."""

    target: Path


@dataclasses.dataclass(frozen=True)
class Names:
    """Changes within one folder that happen together: path to file number, FOLDER, Moved, or None for removed."""

    folder: Path
    changes: tuple[tuple[Path, int | Moved | None], ...]


@dataclasses.dataclass(frozen=True)
class SyncFolder:
    folder: Path


Op = Write | Resize | Sync | Names | SyncFolder


class RecordedDisk(Files):
    """Does the calls in ``root`` and writes them down. What lies there at the start counts as durable.

    Attributes:
        ops: The calls that changed something, in order; ``len(ops)`` is the present instant.
        kill_at: The process is killed when it would make this call; with ``at_sync`` the next fsync from there on,
            after which what was not synced is visible and not durable.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.ops, self.kill_at, self.at_sync, self._dead = root, [], 1 << 60, False, False
        self._names: dict[Path, int] = {}
        self._fds: dict[int, int] = {}
        self._next = FOLDER + 1
        self._data: dict[int, bytes] = {}
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                self._names[path] = FOLDER
            elif path.name != "lock":
                self._names[path] = number = self._new_file()
                self._data[number] = path.read_bytes()
        self._durable_names = dict(self._names)

    def restart(self) -> None:
        """What a kill leaves: the files as they look now, and no open descriptors."""
        self.kill_at, self._dead = 1 << 60, False
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # The seam

    def open_new(self, path):
        self._may_live()
        fd = super().open_new(path)
        self._fds[fd] = number = self._new_file()
        self._change(path.parent, (path, number))
        return fd

    def open_existing(self, path):
        self._may_live()
        fd = super().open_existing(path)
        self._fds[fd] = self._names[path]
        return fd

    def reserve(self, fd, size):
        self._may_live()
        super().reserve(fd, size)
        self.ops.append(Resize(self._fds[fd], size))

    def write(self, fd, buffers):
        self._may_live()
        data = b"".join(bytes(b) for b in buffers)
        at = os.lseek(fd, 0, os.SEEK_CUR)
        try:
            super().write(fd, [data])
        finally:  # of a write that fails a part may be there
            self.ops.append(Write(self._fds[fd], at, data[: os.lseek(fd, 0, os.SEEK_CUR) - at]))

    def write_at(self, fd, data, offset):
        self._may_live()
        super().write_at(fd, data, offset)
        self.ops.append(Write(self._fds[fd], offset, data))

    def fsync(self, fd):
        self._may_live(sync=True)
        self.ops.append(Sync(self._fds[fd]))

    def fsync_dir(self, folder):
        self._may_live(sync=True)
        self.ops.append(SyncFolder(folder))

    def replace(self, source, target):
        self._may_live()
        super().replace(source, target)
        number = self._names[source]
        if number == FOLDER:
            assert source.parent == target.parent, "a folder is renamed within its own"
            self._change(target.parent, (source, Moved(target)))
            return
        if source.parent == target.parent:
            self._change(target.parent, (source, None), (target, number))
        else:
            self._change(target.parent, (target, number))
            self._change(source.parent, (source, None))

    def unlink(self, path):
        self._may_live()
        super().unlink(path)
        self._change(path.parent, (path, None))

    def mkdir(self, path):
        self._may_live()
        super().mkdir(path)
        self._change(path.parent, (path, FOLDER))

    def rmdir(self, path):
        self._may_live()
        super().rmdir(path)
        self._change(path.parent, (path, None))

    def close(self, fd):
        self._may_live()
        del self._fds[fd]
        super().close(fd)

    def _may_live(self, sync: bool = False) -> None:
        self._dead = self._dead or (len(self.ops) >= self.kill_at and (sync or not self.at_sync))
        if self._dead:
            raise Killed

    def _new_file(self):
        self._next += 1
        return self._next - 1

    def _change(self, folder: Path, *changes: tuple[Path, int | Moved | None]) -> None:
        _apply(self._names, changes)
        self.ops.append(Names(folder, changes))

    # What is left

    def instant(self, rng: random.Random) -> int:
        """When the power may go: at any call, or before a folder is synced, where the most can be lost."""
        syncs = [at for at, op in enumerate(self.ops) if isinstance(op, SyncFolder)]
        return rng.choice(syncs) if syncs and rng.random() < 0.5 else rng.randrange(len(self.ops) + 1)

    def disk_after(self, cut: int, target: Path, rng: random.Random) -> str:
        """Builds in ``target`` one of the disks that a power loss after the first ``cut`` calls may leave.

        Returns:
            What was done to unsynced data and names, to be shown when a test fails.
        """
        data_fate, name_fate = rng.choice(LOST), rng.choice(LOST[:4])
        names, open_names = dict(self._durable_names), []
        files = {number: bytearray(data) for number, data in self._data.items()}
        open_writes: dict[int, list[Write | Resize]] = {}
        for op in self.ops[:cut]:
            match op:
                case Names():
                    open_names.append(op)
                case SyncFolder(folder):
                    for change in [c for c in open_names if c.folder == folder]:
                        _apply(names, change.changes)
                    open_names = [c for c in open_names if c.folder != folder]
                case Sync(number):
                    for write in open_writes.pop(number, []):
                        _store(files.setdefault(number, bytearray()), write)
                case Write() | Resize():
                    open_writes.setdefault(op.file, []).append(op)
        for change in _survivors(open_names, name_fate, rng):
            _apply(names, change.changes)
        for number, writes in open_writes.items():
            for write in _survivors(writes, data_fate, rng):
                _store(files.setdefault(number, bytearray()), write, data_fate, rng)
        self._put(target, names, files)
        return f"cut {cut} of {len(self.ops)}, unsynced data: {data_fate}, unsynced names: {name_fate}"

    def _put(self, target: Path, names: dict[Path, int], files: dict[int, bytearray]) -> None:
        target.mkdir()
        for path, number in sorted(names.items()):
            above = [p for p in path.parents if self.root in p.parents]
            if all(names.get(folder) == FOLDER for folder in above):
                place = target / path.relative_to(self.root)
                if number == FOLDER:
                    place.mkdir()
                else:
                    place.write_bytes(files.get(number, b""))


def _apply(names: dict[Path, int], changes: Sequence[tuple[Path, int | Moved | None]]) -> None:
    for path, number in changes:
        if number is None:
            names.pop(path, None)
        elif isinstance(number, Moved):
            for old in [name for name in names if name == path or path in name.parents]:
                names[number.target / old.relative_to(path)] = names.pop(old)
        else:
            names[path] = number


def _survivors(open_ops, fate, rng):
    if fate == "none":
        return []
    if fate == "some":
        return [op for op in open_ops if rng.random() < 0.5]
    if fate == "first":
        kept = open_ops[: rng.randrange(len(open_ops) + 1)]
        if kept and isinstance(kept[-1], Write):
            kept = [*kept[:-1], dataclasses.replace(kept[-1], data=kept[-1].data[: rng.randrange(len(kept[-1].data) + 1)])]
        return kept
    return list(open_ops)


def _store(data: bytearray, op: Write | Resize, fate: str = "all", rng: random.Random | None = None) -> None:
    """Does one write, sector by sector: in the fate "sectors" each is there or not, in "junk" some are neither."""
    if isinstance(op, Resize):
        del data[op.size :]
        data.extend(bytes(op.size - len(data)))
        return
    at, end = op.at, op.at + len(op.data)
    while at < end:
        stop = min(at - at % SECTOR + SECTOR, end)
        piece = op.data[at - op.at : stop - op.at]
        if rng is not None and fate in ("sectors", "junk") and rng.random() < 0.5:
            piece = rng.randbytes(len(piece)) if fate == "junk" else b""
        if piece:
            data.extend(bytes(max(at - len(data), 0)))
            data[at : at + len(piece)] = piece
        at = stop


@contextlib.contextmanager
def killed(disk: RecordedDisk, rng: random.Random, most: int):
    """The block is a process that is killed within its next ``most`` calls, often at one of the first."""
    disk.kill_at, disk.at_sync = len(disk.ops) + rng.randrange(rng.choice([8, most])), rng.random() < 0.5
    with contextlib.suppress(Killed):
        yield
    disk.restart()
