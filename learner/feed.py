"""From the sampler's arrays to the device: one copy out of the log, into memory that tensors share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buffer.gather import Allocate


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
