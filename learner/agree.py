"""What ranks must have alike, and how they get there: which checkpoint, which weights, what each shard's sampler knew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fastcrc import crc32
from torch import Tensor

from algorithms.base import Algorithm
from algorithms.policies.registry import published
from fleet.errors import LearnerError
from fleet.spec import RobotSpec
from learner.checkpoint import Checkpoint, Checkpoints
from learner.ranks import Ranks
from learner.tensor_file import bytes_of, pack, to_arrays, unpack

if TYPE_CHECKING:
    from learner.supply import BatchSource

_CHUNK = 1 << 22  # elements that are looked at at once
_PRIME = 65521
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def newest_checkpoint(ranks: Ranks, checkpoints: Checkpoints) -> Checkpoint | None:
    """The newest whole one by rank 0's judgement; every rank reads it from the folder that all share, as slow as that may be.

    Raises:
        LearnerError: As ``Checkpoints``.
    """
    found = ranks.patiently(lambda: checkpoints.newest() if ranks.first else None)
    step = int(ranks.broadcast_bytes(str(-1 if found is None else found.step).encode()))
    return ranks.patiently(lambda: found if ranks.first or step < 0 else checkpoints.load(step))


def all_specs(ranks: Ranks, specs: list[RobotSpec]) -> list[RobotSpec]:
    """Specs of the robots of all shards, each once, in the order of ranks."""
    told = ranks.gather_bytes(json.dumps([spec.to_dict() for spec in specs]).encode())
    by_hash = {spec.hash: spec for data in told for spec in map(RobotSpec.from_dict, json.loads(data))}
    return list(by_hash.values()) if ranks.size > 1 else specs


def require_equal(ranks: Ranks, algorithm: Algorithm, weights: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Checks that all ranks have the same weights to the last bit; one rank has. What acts is looked at too: an engine may
    make its weights equal while copies that were taken before stay apart.

    Args:
        weights: ``Engine.weights``.

    Raises:
        LearnerError: On every rank; names those that differ from rank 0.
    """
    if ranks.size == 1:
        return
    acting: Mapping[str, Tensor] = published(algorithm.acting())
    digests = ranks.gather([digest({**weights, "acting": acting})])[:, 0]
    differ = np.flatnonzero(digests != digests[0]).tolist()
    if differ:
        raise LearnerError(
            f"at step {step} ranks {differ} have other weights than rank 0",
            rule="all ranks have the same weights, to the last bit",
            remedy="same versions of torch and the same kind of device on all nodes; what was learnt since the newest "
            "checkpoint is given up",
        )


@torch.no_grad()
def digest(weights: Mapping[str, Mapping[str, Tensor]]) -> int:
    """48 bits of names, types, shapes and all bits of the values. It differs between kinds of devices."""
    sums = hashlib.sha256()
    for part, tensors in sorted(weights.items()):
        for name, tensor in sorted(tensors.items()):
            checksum = (_crc if tensor.device.type == "cpu" else _bit_sums)(tensor)
            sums.update(json.dumps([part, name, str(tensor.dtype), list(tensor.shape), checksum]).encode())
    return int.from_bytes(sums.digest()[:6], "big")


def _crc(tensor: Tensor) -> int:
    return crc32.iscsi(bytes_of(tensor))


def _bit_sums(tensor: Tensor) -> list[int]:
    """Sums of whole numbers (they may overflow), which are the same in whatever order a device adds: of the values' bits, and
    of these times their places. Nothing but the sums leaves the device."""
    bits = tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for begin in range(0, len(bits), _CHUNK):
        piece = bits[begin : begin + _CHUNK].long()
        place = (torch.arange(begin, begin + len(piece), device=piece.device) % _PRIME) + 1
        sums += torch.stack([piece.sum(), (piece * place).sum()])
    return sums.tolist()


def sampler_states(ranks: Ranks, source: BatchSource) -> dict[str, Any]:
    """By number of the shard, of its first rank; on rank 0, empty elsewhere."""
    if ranks.size == 1:
        return {"0": source.state()}
    packed = ranks.gather_bytes(pack(source.state()) if ranks.shard_leader else b"")
    leaders = ranks.place.leaders if ranks.first else []
    return {str(shard): unpack(packed[leader]) for shard, leader in enumerate(leaders)}


def load_sampler(ranks: Ranks, source: BatchSource, states: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Gives this rank's sampler what its shard's knew. A shard is known by its log: nodes may have come, gone or changed their
    order. One that is not in ``states`` begins with what its log says, and with the mixture that all shards have alike.

    Returns:
        How many steps came meanwhile, to all shards; and the shards in ``states`` that nobody reads any more.
    """
    known = {shard: to_arrays(state) for shard, state in states.items()}
    mine = next((shard for shard, state in known.items() if source.reads(state)), None)
    num_new = source.load_state(known["0" if mine is None else mine])
    table = ranks.gather([num_new, -1 if mine is None else int(mine)])[ranks.place.leaders]
    return int(table[:, 0].sum()), [shard for shard in states if int(shard) not in table[:, 1]]
