"""Copies of what is trained, taken between two updates while the loop waits: one pass over memory that is there already.

    copies = Copies(device)
    copy = copies.take({"parts": engine.weights(), ...})   # on the loop's thread
    save(copy.state)                                       # in another one; waits for the device if it must

The memory is used again once nobody holds the copy any more, so a job must be forgotten when it is done. On a GPU it is
page-locked and ``take`` does not wait: what the stream does later to the weights comes after the copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64


class Copy:
    """A nested state with tensors on the CPU that nobody changes; arrays have become tensors, tuples lists."""

    def __init__(self, state: Any, ready: torch.cuda.Event | None) -> None:
        self._state, self._ready = state, ready

    @property
    def state(self) -> Any:
        """Valid as long as the copy is held."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._state


class Copies:
    """Takes copies. While the newest one is in use a second memory is made, which goes when both are free.

    Args:
        device: Where the tensors lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._memories: list[_Memory] = []

    @torch.no_grad()
    def take(self, state: Any) -> Copy:
        """A copy of a nested state: maps and lists of tensors, arrays and plain data."""
        live: list[Tensor] = []
        collected = _collect(state, live)
        memory = self._free()
        views = memory.views(live)
        if views:
            torch._foreach_copy_(views, live, non_blocking=self._cuda)
        ready = None
        if self._cuda:
            ready = torch.cuda.Event()
            ready.record()
        copy = Copy(_fill(collected, views), ready)
        memory.holder = weakref.ref(copy)
        return copy

    def _free(self) -> _Memory:
        free = [memory for memory in self._memories if memory.holder is None or memory.holder() is None]
        memory = free[0] if free else _Memory(self._cuda)
        self._memories = [memory, *(other for other in self._memories if other not in free)]
        return memory


class _Memory:
    """One stretch of memory and the tensors in it."""

    def __init__(self, page_locked: bool) -> None:
        self.holder: weakref.ref[Copy] | None = None
        self._page_locked, self._flat = page_locked, torch.empty(0, dtype=torch.uint8)
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []
        self._views: list[Tensor] = []

    def views(self, live: list[Tensor]) -> list[Tensor]:
        """Room for these tensors; the same as before where types and shapes are."""
        kinds = [(tensor.dtype, tensor.shape) for tensor in live]
        if kinds != self._kinds:
            sizes = [tensor.numel() * tensor.element_size() for tensor in live]
            total = sum(size + -size % _ALIGN for size in sizes)
            if total > len(self._flat):
                self._views = []
                self._flat = torch.empty(total, dtype=torch.uint8, pin_memory=self._page_locked)
            self._kinds, self._views, at = kinds, [], 0
            for (dtype, shape), size in zip(kinds, sizes, strict=True):
                self._views.append(self._flat[at : at + size].view(dtype).view(shape))
                at += size + -size % _ALIGN
        return self._views


class _Place:
    """Where the tensor number ``index`` belongs."""

    def __init__(self, index: int) -> None:
        self.index = index


def _collect(state: Any, live: list[Tensor]) -> Any:
    if isinstance(state, np.ndarray):
        state = torch.from_numpy(np.ascontiguousarray(state))
    if isinstance(state, Tensor):
        live.append(state.detach())
        return _Place(len(live) - 1)
    if isinstance(state, Mapping):
        return {key: _collect(value, live) for key, value in state.items()}
    return [_collect(value, live) for value in state] if isinstance(state, (list, tuple)) else state


def _fill(collected: Any, views: list[Tensor]) -> Any:
    if isinstance(collected, _Place):
        return views[collected.index]
    if isinstance(collected, dict):
        return {key: _fill(value, views) for key, value in collected.items()}
    return [_fill(value, views) for value in collected] if isinstance(collected, list) else collected
