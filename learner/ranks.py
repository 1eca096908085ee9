"""What the learner's processes (ranks) must know of each other between updates: numbers and bytes, over gloo on the CPU.

    ranks = Ranks(rank, size, shard_of_rank, "tcp://10.0.0.1:29400", timeout_s=60)
    facts = ranks.gather([stop, num_new_steps])       # the same table on every rank, so all decide alike

Ranks of one node read one shard of the buffer and stand next to each other. Nothing here is a pickle.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from fleet.batch import Split
from fleet.errors import LearnerError


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """Which rank a process is. ``shards``: number of the shard that each rank reads, ascending from 0.

    ``rendezvous``: tcp://HOST:PORT of rank 0, "" where there is one rank. ``timeout_s``: of every exchange; a rank that
    does not answer in time is taken for dead.
    """

    rank: int = 0
    shards: tuple[int, ...] = (0,)
    rendezvous: str = ""
    timeout_s: float = 120.0

    @property
    def size(self) -> int:
        return len(self.shards)

    def split(self) -> Split:
        """The part of each batch that this rank makes."""
        return Split(self.rank, self.shards)


class Ranks:
    """This process among the ranks of a learner. One rank exchanges with nobody and needs no rendezvous.

    Args:
        place: Which rank this is.
        device: "cuda" adds NCCL for tensors on GPUs.

    Raises:
        LearnerError: The other ranks did not come within the timeout.
    """

    def __init__(self, place: RankPlace, device: str = "cpu") -> None:
        self.place, self.rank, self.size = place, place.rank, place.size
        if place.rendezvous:
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            timeout = datetime.timedelta(seconds=place.timeout_s)
            try:
                dist.init_process_group(
                    backend, init_method=place.rendezvous, rank=place.rank, world_size=place.size, timeout=timeout
                )
            except (RuntimeError, ValueError) as error:
                raise LearnerError(
                    f"rank {place.rank} of {place.size} did not meet the others at {place.rendezvous}: {error}",
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
        shards = self.place.shards
        return shards.index(shards[self.rank]) == self.rank

    def gather(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Everybody's numbers: (size, ...) float64, row r from rank r, the same on every rank."""
        mine = torch.as_tensor(np.asarray(values, np.float64))
        if self.size == 1:
            return mine.numpy()[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).numpy()

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of rank ``source``; what the others pass is ignored."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data)])
        dist.broadcast(length, source)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source and data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, source)
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
        dist.all_gather(rows, buffer)
        return [row.numpy()[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    def close(self) -> None:
        if self.place.rendezvous and dist.is_initialized():
            dist.destroy_process_group()
