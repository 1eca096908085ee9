"""The one seam through which log and spool change files, so that a test can replay a power loss.

What the callers build on, and what a disk does not give by itself: bytes are durable after ``fsync`` only, a name
(created, replaced, removed) after ``fsync_dir`` of its folder only, and after a failed fsync nothing is known
about what was written since the last good one, so the file must be abandoned.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from fleet.errors import DiskFull, RunFolderError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SYNC_FILE_RANGE_WRITE = 2
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Files:
    """The real calls. All raise OSError; ``storage_errors`` turns that into the project's errors."""

    def open_new(self, path: Path) -> int:
        """A descriptor of a file that did not exist before, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def open_existing(self, path: Path) -> int:
        """A descriptor of a file that exists, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def reserve(self, fd: int, size: int) -> None:
        """Makes the file ``size`` bytes long without using disk space, so that readers can map all of it once."""
        os.ftruncate(fd, size)

    def write(self, fd: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Writes all bytes at the descriptor's position. After an error the file may hold a part of them."""
        left = [memoryview(b).cast("B") for b in buffers if len(b)]
        while left:
            done = os.writev(fd, left)
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if left and done:
                left[0] = left[0][done:]

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        """Overwrites a few bytes in place."""
        os.pwrite(fd, data, offset)

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """Lets the disk begin with these bytes, so that a later ``fsync`` finds less to wait for. Promises nothing."""
        _begin_writeback(fd, offset, length)

    def fsync(self, fd: int) -> None:
        _sync_data(fd)

    def fsync_dir(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def close(self, fd: int) -> None:
        os.close(fd)

    def make_folders(self, path: Path) -> None:
        """Makes a folder and what is missing above it, durably; one that a killed process made becomes durable too."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        deepest = missing[-1].parent if missing else path
        with contextlib.suppress(PermissionError):  # who may not read what is above has not made it either
            self.fsync_dir(deepest.parent)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self.mkdir(folder)
            self.fsync_dir(folder.parent)

    def write_atomic(self, path: Path, data: bytes) -> None:
        """Makes ``path`` hold ``data``, durably: whoever looks sees the old file or the whole new one."""
        partial = path.with_name(path.name + ".partial")
        with contextlib.suppress(FileNotFoundError):
            self.unlink(partial)
        fd = self.open_new(partial)
        try:
            self.write(fd, [data])
            self.fsync(fd)
        finally:
            self.close(fd)
        self.replace(partial, path)
        self.fsync_dir(path.parent)

    def free_bytes(self, folder: Path) -> int:
        """Room on the folder's disk for who is not root."""
        facts = os.statvfs(folder)
        return facts.f_bavail * facts.f_frsize

    def drop_cache(self, fd: int) -> None:
        """Lets the next read come from the disk. Pages of a failed fsync otherwise look as if they had been stored."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _begin_writeback(fd: int, offset: int, length: int) -> None:
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, length, _SYNC_FILE_RANGE_WRITE)  # an error shows at the fsync


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux only; Python's os module does not have it."""
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", call)


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turns an OSError into DiskFull or StorageError.

    Raises:
        DiskFull: No room or quota is left.
        StorageError: Any other failure of the disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"no room for {doing}: {error}",
                rule="data is kept only when it fits on the disk",
                remedy="free space on this disk; work goes on by itself when there is room",
            ) from error
        raise StorageError(
            f"{doing} failed: {error}",
            rule="what the disk did not confirm is never acknowledged",
            remedy="look at the system log for errors of this disk",
        ) from error


class FolderLock:
    """Holds a folder for one process. The lock ends with the process, also when it is killed.

    Raises:
        RunFolderError: Another process holds it; names that process.
    """

    def __init__(self, folder: Path, what: str) -> None:
        path = folder / "lock"
        with storage_errors(f"locking {folder}"):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
                os.close(self._fd)
                raise RunFolderError(
                    f"{folder} is in use by process {holder or 'unknown'}",
                    rule=f"one process writes to a {what}",
                    remedy="stop that process first, or name another folder",
                ) from None
        with contextlib.suppress(OSError):  # the number is for people; a full disk must not keep us from opening
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Lets others in. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
