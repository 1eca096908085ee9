"""ZeRO 0 to 3 (arXiv 1910.02054) by DeepSpeed: ranks share optimizer state, gradients and weights among them.

Each part is a DeepSpeed engine of its own over the part's LossModule. DeepSpeed makes means over ranks of what is summed here;
its loss scale, set between the last backward pass and the step, turns them into the mean over the summed weight. DeepSpeed's
checkpoints are pickles and are not used: weights and optimizer state are put together by parameter name.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from algorithms.base import Algorithm, Batch
from fleet.errors import ConfigError
from learner.engine import (
    LossFunction,
    Numbers,
    RankSums,
    Timed,
    num_micro_batches,
    require_finite,
    require_same_parts,
    split_micro,
    trainable,
    training_only,
    untimed,
)
from learner.engine_ddp import SharedBuffers
from learner.main import EngineConfig
from learner.memory import memory_errors
from learner.modules import prepare_module
from learner.ranks import Ranks
from learner.suspects import find_suspects
from learner.zero.part import ELEMENTWISE, ZeroPart, stage_of


class DeepSpeedEngine:
    """Implements ``learner.engine.Engine``.

    With bfloat16, parts that are sharded have bfloat16 weights, and float32 ones beside them which the optimizer changes and
    which ``weights`` returns; stage 1 is then carried out as stage 2, since DeepSpeed's own stage 1 keeps a whole float32
    gradient on every rank. Parts that are not sharded (stage 0) keep float32 weights.

    ``prepare`` and ``after_step`` may call the trained modules, without gradients. A parameter that no loss used has a gradient
    of zero: unlike with plain torch, momentum and weight decay go on.

    Args:
        algorithm: Its parts and frozen modules are moved to ``device``; frozen ones stop requiring gradients. From here on the
            parts' modules belong to this engine, until ``close``.
        config: Its name is not looked at.

    Raises:
        ConfigError: A part cannot be trained so.
    """

    def __init__(self, algorithm: Algorithm, config: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        _start(device, ranks)
        for module in algorithm.frozen.values():
            module.to(device).requires_grad_(False)
        self._modules = {name: part.module.to(device) for name, part in algorithm.parts.items()}
        for module in self._modules.values():
            prepare_module(module, config)
        _require_own_parameters(algorithm, config)
        self._parts = {name: ZeroPart(name, part, config, device, ranks) for name, part in algorithm.parts.items()}
        self._trained: dict[str, Mapping[str, nn.Parameter]] = {name: part.trained for name, part in self._parts.items()}
        self._buffers = {name: SharedBuffers(module) for name, module in self._modules.items()}
        self._sum_over_ranks = RankSums(ranks)
        self._per_sample: dict[str, list[Tensor]] = {}

    def update(self, part: str, loss: LossFunction, batch: Batch, timed: Timed = untimed) -> dict[str, float]:
        """See Engine."""
        zero = self._parts[part]
        with memory_errors(self._config, self._ranks, len(batch.actions_BHA)):
            with training_only(part, self._trained):
                numbers = self._backward(part, loss, batch, timed)
            with timed("optimizer"):
                numbers = self._sum_over_ranks(part, numbers)
                weight, total = float(numbers.weight), float(numbers.loss)
                wanted = weight > 0 and math.isfinite(weight) and math.isfinite(total)
                norm = 0.0 if weight == 0 else math.nan
                if wanted:
                    norm = zero.step(weight / self._ranks.size)
                else:
                    zero.skip()
                read = numbers.read(torch.tensor(norm, device=self._device))
                # Gradients are shared among ranks, or gone: of them nothing can be said.
                suspects = functools.partial(find_suspects, batch, self._per_sample[part], {}, self._ranks)
                require_finite(part, read, suspects, self._config.dtype)
                self._buffers[part].share(numbers)
        return read

    def _backward(self, part: str, loss: LossFunction, batch: Batch, timed: Timed) -> Numbers:
        """Gradients of the summed loss, and what the losses said."""
        numbers, zero = Numbers(self._device), self._parts[part]
        per_sample = self._per_sample[part] = []
        num = num_micro_batches(len(batch.actions_BHA), self._config.micro_batch, self._ranks)
        for i, (micro, rows) in enumerate(split_micro(batch, num)):
            with timed("forward"):
                out = zero.forward(loss, micro, batch.shard_weight if rows else 0.0, last=i == num - 1)
            with timed("backward"):
                zero.engine.backward(out.sum, scale_wrt_gas=False)
            numbers.add(out)
            per_sample.append(out.per_sample_B[:rows])
        self._buffers[part].note(numbers)
        return numbers

    def per_sample(self, part: str) -> Tensor:
        """See Engine. Copied when it is asked for."""
        return torch.cat(self._per_sample[part]).float().cpu()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See Engine. In a sharded part with bfloat16 they are the bfloat16 ones. The trained modules may be called in here."""
        parts = [part for part in self._parts.values() if part.stage == 3]
        for part in parts:
            part.hold(part.sharded)
        try:
            yield
        finally:
            for part in parts:
                part.let_go()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See Engine. Parameters are copies on the CPU."""
        return {name: part.weights() for name, part in self._parts.items()}

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See Engine."""
        for name, part in self._parts.items():
            part.load_weights(weights.get(name, {}))

    def state(self) -> dict[str, Any]:
        """See Engine. The tensors are copies on the CPU."""
        return {name: part.state() for name, part in self._parts.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Engine."""
        require_same_parts(state, self._parts)
        for name, part in self._parts.items():
            part.load_state(state[name])

    def close(self) -> None:
        """See Engine. The parameters are new objects, whole and in float32."""
        for part in self._parts.values():
            part.close()


def _require_own_parameters(algorithm: Algorithm, config: EngineConfig) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, part in algorithm.parts.items():
        parameters = trainable(part.module)
        sharded = stage_of(config, sum(p.numel() for p in parameters.values())) > 0
        for key, p in parameters.items():
            if owners.setdefault(p, name) != name and sharded:
                raise ConfigError(
                    f"engine.zero_stage = {config.zero_stage}, but parts {owners[p]!r} and {name!r} both train {key}",
                    rule="a sharded parameter belongs to one part",
                    remedy="engine.zero_stage=0, or engine.name=ddp",
                )


def _start(device: torch.device, ranks: Ranks) -> None:
    """Makes DeepSpeed use the processes that have met already, one GPU each, and say nothing but warnings.

    Nothing is compiled: its shared memory exchange on the CPU would take minutes.
    """
    os.environ.update(DS_ACCELERATOR=device.type, LOCAL_RANK=str(device.index or 0))
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.size))
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.handlers.clear()  # it writes to stdout
    logger.propagate = True
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ZERO_SUPPORTED_OPTIMIZERS.extend(set(ELEMENTWISE) - set(ZERO_SUPPORTED_OPTIMIZERS))  # others are refused here
    # It calls exchanges by their former names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not dist.is_initialized():
        backend, store = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False)
