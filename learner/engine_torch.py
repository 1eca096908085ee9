"""The plain engine: one process, one device. What other engines are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Algorithm, Batch
from algorithms.policies.registry import published
from learner.engine import (
    LossFunction,
    LossModule,
    Numbers,
    RankSums,
    Timed,
    load_modules,
    load_optimizer,
    num_micro_batches,
    optimizer_state,
    require_finite,
    require_same_parts,
    split_micro,
    trainable,
    training_only,
    untimed,
)
from learner.main import EngineConfig
from learner.memory import memory_errors
from learner.modules import prepare_module
from learner.ranks import Ranks
from learner.suspects import find_suspects


class TorchEngine:
    """Implements ``learner.engine.Engine``.

    Args:
        algorithm: Its parts and frozen modules are moved to ``device``; frozen ones stop requiring gradients.
        config: Its name is not looked at.
        ranks: One rank only; subclasses train with more.
    """

    def __init__(self, algorithm: Algorithm, config: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        self._max_norm = config.max_grad_norm or float("inf")
        for module in algorithm.frozen.values():
            module.to(device).requires_grad_(False)
        self._modules = {name: part.module.to(device) for name, part in algorithm.parts.items()}
        for module in self._modules.values():
            prepare_module(module, config)
        # Read once: while one part is updated the others are frozen, and this says what to thaw afterwards.
        self._trained = {name: trainable(module) for name, module in self._modules.items()}
        self._optimizers = {name: part.make_optimizer(self._trained[name].values()) for name, part in algorithm.parts.items()}
        self._losses = {name: self._wrap(LossModule(name, module, config.dtype)) for name, module in self._modules.items()}
        self._sum_over_ranks = RankSums(ranks)
        self._per_sample: dict[str, list[Tensor]] = {}

    def update(self, part: str, loss: LossFunction, batch: Batch, timed: Timed = untimed) -> dict[str, float]:
        """See Engine."""
        optimizer, parameters = self._optimizers[part], list(self._trained[part].values())
        try:
            with memory_errors(self._config, self._ranks, len(batch.actions_BHA)):
                with training_only(part, self._trained):
                    numbers = self._backward(part, loss, batch, timed)
                with timed("optimizer"):
                    numbers = self._sum_over_ranks(part, numbers)
                    self._divide([p.grad for p in parameters if p.grad is not None], numbers.divisor())
                    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                    read = numbers.read(norm)
                    # Before clipping: by a norm that is not finite it makes all gradients so.
                    require_finite(part, read, lambda: self._suspects(part, batch), self._config.dtype)
                    nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
                    self._share_buffers(part, numbers)
                    if read["weight"] > 0:
                        optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)
        return read

    def _backward(self, part: str, loss: LossFunction, batch: Batch, timed: Timed) -> Numbers:
        """Gradients of the summed loss, and what the losses said."""
        numbers, module = Numbers(self._device), self._losses[part]
        per_sample = self._per_sample[part] = []
        num = num_micro_batches(len(batch.actions_BHA), self._config.micro_batch, self._ranks)
        for i, (micro, rows) in enumerate(split_micro(batch, num)):
            with self._exchanging(module, last=i == num - 1):
                with timed("forward"):
                    out = module(loss, micro, batch.shard_weight if rows else 0.0)
                with timed("backward"):
                    out.sum.backward()
            numbers.add(out)
            per_sample.append(out.per_sample_B[:rows])
        return numbers

    def _suspects(self, part: str, batch: Batch) -> list[str]:
        return find_suspects(batch, self._per_sample[part], self._trained[part], self._ranks)

    def _wrap(self, module: LossModule) -> nn.Module:
        return module

    def _exchanging(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around the passes of one micro-batch."""
        return nullcontext()

    def _divide(self, gradients: list[Tensor], weight: Tensor) -> None:
        """Turns summed gradients into those of the mean loss."""
        for gradient in gradients:
            gradient.div_(weight)

    def _share_buffers(self, part: str, numbers: Numbers) -> None:
        """Makes buffers that the loss changed alike on all ranks."""

    def per_sample(self, part: str) -> Tensor:
        """See Engine. Copied when it is asked for."""
        return torch.cat(self._per_sample[part]).float().cpu()

    def gathered(self) -> AbstractContextManager[None]:
        """See Engine."""
        return nullcontext()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See Engine. The tensors are the live ones."""
        return {name: published(module) for name, module in self._modules.items()}

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See Engine."""
        load_modules(self._modules, weights)

    def state(self) -> dict[str, Any]:
        """See Engine. The tensors are the live ones."""
        return {name: optimizer_state(optimizer, self._trained[name]) for name, optimizer in self._optimizers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Engine."""
        require_same_parts(state, self._optimizers)
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, self._trained[name], state[name], name)

    def close(self) -> None:
        """See Engine. What hangs on the parameters (gradients, buckets of gradients, optimizer state) is let go."""
        self._losses.clear()
        self._optimizers.clear()
