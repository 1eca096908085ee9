"""The Algorithm contract.

``learner/loop.py`` drives it without knowing which one it is:

    batch = algorithm.prepare(sampler.batch(algorithm.needs, step))
    for part in algorithm.parts: engine.update(part, algorithm.loss(part, micro) for micro in batch)
    algorithm.after_step(step, stats)
    publish(algorithm.acting())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fleet.batch import BatchNeeds


@dataclasses.dataclass
class Batch:
    """``fleet.batch.Windows`` on the device: the same fields with the same meaning, each array as a tensor of its dtype.

    Added to ``obs``, and to ``obs_at`` of every offset: conditions by name (the task's instruction embedding).
    """

    obs: dict[str, Tensor]
    obs_at: dict[int, dict[str, Tensor]]
    inside_at: dict[int, Tensor]
    actions_BHA: Tensor
    rewards_BH: Tensor
    terminated_BH: Tensor
    truncated_BH: Tensor
    mask_BH: Tensor
    source_B: Tensor
    task_B: Tensor
    version_B: Tensor
    step_B: Tensor
    episode_B: Tensor
    frame_B: Tensor
    steps_to_go_B: Tensor
    outcome_B: Tensor
    return_B: Tensor
    weight_B: Tensor
    replay: dict[str, Tensor]
    index_B: Tensor
    shard_weight: float


@dataclasses.dataclass
class Part:
    """One trained module with its optimizer's settings."""

    module: nn.Module
    make_optimizer: Any  # callable: parameters -> torch.optim.Optimizer


@dataclasses.dataclass
class LossOutput:
    """sum and weight: the engine divides the summed loss by the summed weight. per_sample_B: for samplers.

    stats: a mean over the rows, or a pair (sum, weight) whose sums over all micro-batches and ranks are divided; 0 where
    nothing has weight.
    """

    sum: Tensor
    weight: Tensor
    per_sample_B: Tensor
    stats: dict[str, Tensor | tuple[Tensor, Tensor]]


class Algorithm(Protocol):
    """See the header. ``name`` is its key in ``learner.main.ALGORITHMS``."""

    name: str
    parts: dict[str, Part]
    frozen: dict[str, nn.Module]
    needs: BatchNeeds

    def prepare(self, batch: Batch) -> Batch: ...

    def loss(self, part: str, micro: Batch) -> LossOutput: ...

    def after_step(self, step: int, stats: Mapping[str, float]) -> None: ...

    def acting(self) -> nn.Module:
        """What is published."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def noise_of(policy: Any, batch: Batch, batch_size: int, seed: int, step: int, stream: int = 0) -> Any:
    """A policy's noise for some rows of a batch, as a function of (seed, step, stream, row): the same however the batch is
    split over micro-batches and ranks.

    Args:
        batch_size: Rows of the whole batch, of which ``batch.index_B`` says which are here.
    """
    noise, rows = policy.noise(batch_size, generator(seed, step, stream)), batch.index_B

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device)].to(rows.device)
        if isinstance(value, Mapping):
            return {key: cut(inner) for key, inner in value.items()}
        return [cut(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return cut(noise)


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Randomness as a function of (seed, step, stream): a resumed run draws what the first one would have drawn."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 97 + stream)
