"""DistributedDataParallel: every rank has all weights and some rows of each batch; gradients are summed while the backward
pass still runs."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algorithms.base import Algorithm, Batch
from learner.engine import LossFunction, LossModule, Numbers, Timed
from learner.engine_torch import TorchEngine
from learner.main import EngineConfig
from learner.ranks import Ranks


class DdpEngine(TorchEngine):
    """Implements ``learner.engine.Engine`` for two ranks or more; see TorchEngine.

    A parameter may be used by some ranks or in some micro-batches only; one that nobody used is not touched by the optimizer,
    as with one rank. Buffers that a loss changes (running statistics) are rank 0's afterwards.
    """

    def __init__(self, algorithm: Algorithm, config: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        super().__init__(algorithm, config, device, ranks)
        self._buffers = {name: SharedBuffers(module) for name, module in self._modules.items()}

    def _wrap(self, module: LossModule) -> nn.Module:
        # Only broadcast_buffers is understood by old and new torch. Unused parameters: the loss and the data decide.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def _exchanging(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return module.no_sync()

    def _divide(self, gradients: list[Tensor], weight: Tensor) -> None:
        super()._divide(gradients, weight / self._ranks.size)  # torch has made means over ranks of the sums

    def _backward(self, part: str, loss: LossFunction, batch: Batch, timed: Timed) -> Numbers:
        numbers = super()._backward(part, loss, batch, timed)
        self._buffers[part].note(numbers)
        return numbers

    def _share_buffers(self, part: str, numbers: Numbers) -> None:
        self._buffers[part].share(numbers)


class SharedBuffers:
    """Buffers that a loss changes (running statistics) are rank 0's afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen = self._versions()

    def note(self, numbers: Numbers) -> None:
        """Counts a change on this rank, for all ranks to know."""
        if self._versions() != self._seen:
            numbers.changed_buffers = numbers.changed_buffers + 1

    def share(self, numbers: Numbers) -> None:
        """Takes rank 0's, where any rank has changed one."""
        if float(numbers.changed_buffers):
            for buffer in self._module.buffers():
                dist.broadcast(buffer, 0)
            self._seen = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        """What changes when a buffer is written to or replaced."""
        return [(id(buffer), buffer._version) for buffer in self._module.buffers()]
