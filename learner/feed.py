"""From the sampler's arrays to the device: one copy out of the log, into memory that tensors share. And, for a rank that has
nothing to draw, the rows of another one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.base import Batch
from algorithms.policies.base import INSTRUCTION, TEXT
from buffer.gather import Allocate
from fleet.batch import Windows
from learner.ranks import Ranks
from learner.tensor_file import pack, to_arrays, unpack


def allocator(device: torch.device) -> Allocate:
    """Makes the arrays that batches are gathered into: page-locked where a GPU fetches them."""

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = torch.empty(max(num_bytes, 1), dtype=torch.uint8, pin_memory=device.type == "cuda")
        array: np.ndarray = memory.numpy()[:num_bytes].view(dtype).reshape(shape)
        return array

    return allocate


class Upload:
    """Moves arrays to a device. On the CPU tensors share the arrays' memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def __call__(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def end(self) -> None:
        """That was the last array of a batch."""
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Returns when the arrays of all batches so far were read and may be overwritten."""
        if self._done is not None:
            self._done.synchronize()


class Feed:
    """Batches for an algorithm, made of windows.

    Args:
        instructions_KE: Instruction embedding by index of the task.
        texts_KC: The instruction itself, where the policy reads it (algorithms/policies/text.py).
    """

    def __init__(self, instructions_KE: Tensor, device: torch.device, texts_KC: Tensor | None = None) -> None:
        self._by_task = {INSTRUCTION: instructions_KE.to(device)}
        if texts_KC is not None:
            self._by_task[TEXT] = texts_KC.to(device)
        self._upload = Upload(device)

    def wait(self) -> None:
        """Returns when the arrays of all windows so far may be overwritten."""
        self._upload.wait()

    def batch(self, windows: Windows) -> Batch:
        """Every field of the windows on the device, and the instruction of each one's task."""
        batch = Batch(**{field.name: self._uploaded(getattr(windows, field.name)) for field in dataclasses.fields(Batch)})
        conditions = {name: table[batch.task_B] for name, table in self._by_task.items()}
        for obs in (batch.obs, *batch.obs_at.values()):
            obs |= conditions
        self._upload.end()
        return batch

    def lend(self, ranks: Ranks, windows: Windows | None, lender: int) -> Windows:
        """A copy of the windows of rank ``lender``, on all ranks."""
        mine = windows if ranks.rank == lender else None
        return _unpacked(ranks.broadcast_bytes(b"" if mine is None else _packed(mine), lender))

    def _uploaded(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._uploaded(inner) for key, inner in value.items()}
        return self._upload(value) if isinstance(value, np.ndarray) else value


def no_rows(windows: Windows) -> Windows:
    """Windows of the same kind, none of them."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(inner) for key, inner in value.items()}
        return value[:0] if isinstance(value, np.ndarray) else value

    return Windows(**{field.name: cut(getattr(windows, field.name)) for field in dataclasses.fields(Windows)})


def _packed(windows: Windows) -> bytes:
    fields = {field.name: getattr(windows, field.name) for field in dataclasses.fields(Windows)}
    for name in ("obs_at", "inside_at"):  # by offset
        fields[name] = {str(offset): value for offset, value in fields[name].items()}
    return pack(fields)


def _unpacked(data: bytes) -> Windows:
    fields = to_arrays(unpack(data))
    for name in ("obs_at", "inside_at"):
        fields[name] = {int(offset): value for offset, value in fields[name].items()}
    return Windows(**fields)
