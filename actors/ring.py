"""A bounded queue of fixed-size records between two processes: shared memory for the data, a pipe for the count.

One producer, one consumer. The producer never waits: a full ring is an answer. The pipe carries one byte a record,
so it wakes the consumer at once, orders the memory accesses on every processor, and breaks when the other side dies.
"""

from __future__ import annotations

import contextlib
import os
import select
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

_HEAD_BYTES = 64  # the consumer's position, on a cache line of its own


class RingClosed(Exception):
    """The other side's process is gone."""


PipeEnds = tuple[Connection, Connection]


def make_pipe() -> PipeEnds:
    """(reading end, writing end) for one ring; made before the child process is started and passed to it."""
    return Pipe(duplex=False)


class Ring:
    """One side of a ring. The parent creates it, the child attaches to its ``name``; both pass the same pipe and dtype.

    Args:
        dtype: Structured numpy dtype of a record.
        slots: Capacity in records, at most 60,000 (the pipe's capacity in bytes bounds it).
        pipe: What ``make_pipe`` returned.
        name: The memory to attach to; None creates it.
    """

    def __init__(self, dtype: np.dtype[Any], slots: int, pipe: PipeEnds, name: str | None = None) -> None:
        self._owner = name is None
        size = _HEAD_BYTES + dtype.itemsize * slots
        self._shm = SharedMemory(create=True, size=size) if name is None else SharedMemory(name=name)
        self._reader, self._writer = pipe
        self.name, self.slots = self._shm.name, slots
        self._consumed: np.ndarray = np.ndarray((1,), np.int64, self._shm.buf)
        self._records: np.ndarray = np.ndarray((slots,), dtype, self._shm.buf, _HEAD_BYTES)
        self._produced, self._available = 0, 0
        os.set_blocking(self._writer.fileno(), False)

    def reserve(self) -> np.void | None:
        """Producer: the next free record to fill, or None when the ring is full."""
        if self._produced - int(self._consumed[0]) >= self.slots:
            return None
        return self._records[self._produced % self.slots]  # type: ignore[no-any-return]

    def commit(self) -> None:
        """Producer: hands over the reserved record.

        Raises:
            RingClosed: The consumer's process is gone.
        """
        self._produced += 1
        try:
            os.write(self._writer.fileno(), b"\0")
        except (BrokenPipeError, OSError) as error:
            raise RingClosed(str(error)) from None

    def wait(self, timeout_s: float) -> bool:
        """Consumer: True as soon as a record is there, False after ``timeout_s``.

        Raises:
            RingClosed: The producer's process is gone and everything was read.
        """
        if self._available:
            return True
        if not select.select([self._reader], [], [], max(timeout_s, 0.0))[0]:
            return False
        data = os.read(self._reader.fileno(), self.slots)
        if not data:
            raise RingClosed("the producer is gone")
        self._available += len(data)
        return True

    def peek(self) -> np.void:
        """Consumer: the oldest record, valid until ``release``. Call after ``wait`` said True."""
        return self._records[int(self._consumed[0]) % self.slots]  # type: ignore[no-any-return]

    def release(self) -> None:
        """Consumer: gives the oldest record's place back."""
        self._available -= 1
        self._consumed[0] += 1

    def produces_here(self) -> None:
        """Closes this process's reading end, so that the death of the consumer is noticed."""
        self._reader.close()

    def consumes_here(self) -> None:
        """Closes this process's writing end, so that the death of the producer is noticed."""
        self._writer.close()

    def close(self) -> None:
        """Detaches; the process that made the ring also removes the memory."""
        del self._consumed, self._records
        self._reader.close()
        self._writer.close()
        with contextlib.suppress(BufferError):  # a caller still holds a record; the memory goes with the process
            self._shm.close()
        if self._owner:
            self._shm.unlink()
