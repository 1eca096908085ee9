"""A part's loss as DeepSpeed wants it, and what becomes of parameters that it does not use."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Batch, LossOutput
from fleet.errors import LearnerError
from learner.engine import LossFunction, LossModule
from learner.ranks import Ranks


class TotalLoss(nn.Module):
    """What DeepSpeed wraps: it looks for tensors in what a module takes and returns, so only the summed loss goes through.

    Up to stage 1 a parameter that the loss did not use gets a gradient of zeros, as ranks exchange the gradients they have.
    From stage 2 on they exchange while the backward pass runs, in its order, so all must use the same parameters.
    """

    def __init__(self, inner: LossModule, trained: Mapping[str, nn.Parameter], stage: int, ranks: Ranks) -> None:
        super().__init__()
        self.inner = inner
        self.out: LossOutput | None = None
        self._trained, self._stage, self._ranks = trained, stage, ranks
        self.unused: list[str] | None = None  # in the update's micro-batches so far; None before the first

    def forward(self, loss: LossFunction, micro: Batch, factor: float) -> Tensor:
        self.out = out = self.inner.forward(loss, micro, factor)  # past its hooks: it has no parameters of its own
        used = used_by(out.sum)
        unused = [name for name, p in self._trained.items() if id(p) not in used]
        total: Tensor = out.sum
        if self._stage >= 2:
            self._require_alike(unused)
        elif unused:
            total = _WithZeros.apply(total, *(self._trained[name] for name in unused))
        return total

    def _require_alike(self, unused: list[str]) -> None:
        before, self.unused = self.unused if self.unused is not None else unused, unused
        differ = before != unused
        table = self._ranks.gather([differ, zlib.crc32(json.dumps(unused).encode())])
        if differ or (table != table[0]).any():
            everybody = [before, *(json.loads(data) for data in self._ranks.gather_bytes(json.dumps(unused).encode()))]
            names = [name for name in self._trained if 0 < sum(name in one for one in everybody) < len(everybody)]
            raise LearnerError(
                f"a loss uses {', '.join(names)} in some rows only"[:400],
                rule="from stage 2 on a loss uses the same parameters on all ranks and in all micro-batches",
                remedy="engine.zero_stage=1, or engine.name=ddp",
            )


class _WithZeros(torch.autograd.Function):
    """Leaves a total as it is; the gradient of every parameter is zeros."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], *(torch.zeros_like(p) for p in ctx.parameters)


def used_by(total: Tensor) -> set[int]:
    """``id`` of each parameter that a loss depends on."""
    seen, todo, found = set(), [total.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [function for function, _ in node.next_functions]
    return found
