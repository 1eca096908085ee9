"""What the learner's processes (ranks) must know of each other between updates: numbers and bytes, over gloo on the CPU.

    ranks = Ranks(RankPlace(rank=1, shards=(0, 0, 1), rendezvous="tcp://10.0.0.1:29400"))
    facts = ranks.gather([stop, num_new_steps])       # the same table on every rank, so all decide alike

Ranks of one node read one shard of the buffer and stand next to each other. A rank that fails leaves its error for the
others (``fail``); who waits for it in an exchange raises that error, so that people see the cause and not its echo.
Nothing here is a pickle.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist

from fleet.errors import FleetError, LearnerError
from learner.placement import RankPlace as RankPlace

LOOK_S = 0.2  # between two looks at what a rank left, while others wait for it
LINGER_S = 2.0  # rank 0, which keeps what ranks left, waits so long for the others to read it
_FAILED, _READ = "failed", "read"
T = TypeVar("T")


class Ranks:
    """This process among the ranks of a learner. One rank exchanges with nobody and needs no rendezvous.

    Args:
        place: Which rank this is.
        device: "cuda" adds NCCL for tensors on GPUs.

    Raises:
        LearnerError: The other ranks did not come within the timeout. Every exchange: another rank failed (its own error),
            ended, or did not answer in time.
    """

    def __init__(self, place: RankPlace, device: str = "cpu") -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        self._store: Any = None
        self._failed = False
        if not place.rendezvous:
            return
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=place.timeout_s)
        address = urlsplit(place.rendezvous)
        try:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                address.hostname or "", address.port or 0, place.size, is_master=place.rank == 0, timeout=timeout
            )
            dist.init_process_group(backend, store=self._store, rank=place.rank, world_size=place.size, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise LearnerError(
                f"rank {place.rank} of {place.size} did not meet the others at {place.rendezvous}: {_first_line(error)}",
                rule="all ranks reach rank 0",
                remedy="look at the logs of the other ranks, and at the firewall between the nodes",
            ) from None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which publishes, checkpoints and reports."""
        return self.rank == 0

    @property
    def shard_leader(self) -> bool:
        """Whether this is the first rank of its shard."""
        return self.rank in self.place.leaders

    def gather(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Everybody's numbers: (size, ...) float64, row r from rank r, the same on every rank."""
        mine = torch.as_tensor(np.asarray(values, np.float64))
        if self.size == 1:
            return mine.numpy()[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(dist.all_gather(rows, mine, async_op=True))
        return torch.stack(rows).numpy()

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of rank ``source``; what the others pass is ignored."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data)])
        self._wait(dist.broadcast(length, source, async_op=True))
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source and data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._wait(dist.broadcast(buffer, source, async_op=True))
        return buffer.numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everybody's bytes by rank, on every rank."""
        if self.size == 1:
            return [data]
        lengths = self.gather([len(data)])[:, 0].astype(int)
        buffer = torch.zeros(max(int(lengths.max()), 1), dtype=torch.uint8)
        if data:
            buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = [torch.empty_like(buffer) for _ in range(self.size)]
        self._wait(dist.all_gather(rows, buffer, async_op=True))
        return [row.numpy()[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    def patiently(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank, however long it takes on one of them: a thread does it, while this one answers the others.

        Raises:
            Exception: What ``work`` raised on this rank. As every exchange, what it raised on another one.
        """
        if self.size == 1:
            return work()
        with concurrent.futures.ThreadPoolExecutor(1, "patiently") as pool:
            job = pool.submit(work)
            while not self.gather([(ended := job.done()) and job.exception() is None]).all():
                if ended and job.exception() is not None:
                    break
                time.sleep(LOOK_S if ended else 0.0)
                concurrent.futures.wait([job], LOOK_S)
        return job.result()

    def fail(self, error: BaseException) -> FleetError | None:
        """This rank cannot go on. Tells the others why, unless one told its reason before: the first one counts.

        Returns:
            The error of another rank, where this one only is its echo: a connection that was closed, say.
        """
        if self._store is None or self._failed:
            return None
        self._failed = True
        known = error if isinstance(error, FleetError) else LearnerError(f"{type(error).__name__}: {error}")
        fields = json.dumps({**known.to_fields(), "rank": self.rank})
        with contextlib.suppress(RuntimeError):  # rank 0 is gone: nobody is there to be told
            first = json.loads(self._store.compare_set(_FAILED, "", fields))
            if first["rank"] != self.rank:
                self._store.add(_READ, 1)
                return _error_of(first) if known is not error or isinstance(error, _Lost) else None
            deadline = time.monotonic() + LINGER_S
            while self.first and self._store.add(_READ, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(LOOK_S / 4)
        return None

    def close(self) -> None:
        """Leaves the others. After a failure the connections stay until the process ends: an exchange may be pending."""
        if self._store is not None and not self._failed and dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def _wait(self, work: Any) -> None:
        looked, pause_s = time.monotonic(), 0.0
        while not work.is_completed():
            time.sleep(pause_s)
            pause_s = min(pause_s + 2e-5, 1e-3)
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                self._look()
        try:
            work.wait()
        except RuntimeError as error:
            self._look()
            raise _Lost(
                f"rank {self.rank} lost another rank: {_first_line(error)}",
                rule=f"every rank answers within {self.place.timeout_s:g} s",
                remedy="look at the logs of the other ranks",
            ) from None

    def _look(self) -> None:
        """Raises what another rank left."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILED]):
                self._failed = True
                self._store.add(_READ, 1)
                raise _error_of(json.loads(self._store.get(_FAILED)))


class _Lost(LearnerError):
    """Another rank ended, or did not answer in time."""


def _error_of(fields: dict[str, Any]) -> FleetError:
    error = LearnerError(f"rank {fields['rank']}: {fields['what']}", rule=fields["rule"], remedy=fields["remedy"])
    error.code = fields["code"]  # so that whoever restarts ranks treats it as the first rank's own
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
