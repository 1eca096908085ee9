"""The Algorithm contract.

``learner/loop.py`` drives it without knowing which one it is:

    batch = algorithm.prepare(sampler.batch(algorithm.needs, step))
    for part in algorithm.parts, minibatch in batch: engine.update(part, algorithm.loss(part, micro) for micro in minibatch)
    algorithm.after_step(step, stats)
    publish(algorithm.acting())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from algorithms.policies.statistics import Statistics
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
    source_BH: Tensor
    source_B: Tensor
    task_B: Tensor
    version_B: Tensor
    step_B: Tensor
    episode_B: Tensor
    frame_B: Tensor
    steps_to_go_B: Tensor
    outcome_B: Tensor
    terminated_B: Tensor
    takeover_in_B: Tensor
    return_B: Tensor
    weight_B: Tensor
    replay: dict[str, Tensor]
    index_B: Tensor
    shard_weight: float


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What is known of a run's data when an algorithm is made, the same on all ranks.

    Args:
        tasks: Names; ``Batch.task_B`` counts in them.
        statistics: Of the vector features that the policy reads and of the actions, from demonstrations if there are any.
        longest_T: Steps of the longest finished episode by task; 0 where there is none.
    """

    tasks: tuple[str, ...] = ()
    statistics: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)
    longest_T: tuple[int, ...] = ()


NO_FACTS = DataFacts()


@dataclasses.dataclass
class Part:
    """One trained module, and how it is trained.

    Args:
        make_optimizer: parameters -> torch.optim.Optimizer.
        minibatches: A batch is cut into so many, one update each: row i goes to number ``index_B[i] % minibatches``, so each
            has its share of every source.
        updates: Updates a step, by the last ones of these minibatches; 0: by all.
        every: Only in steps whose number it divides.
        after_update: Called after each update with whole parameters, for target networks.
    """

    module: nn.Module
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    minibatches: int = 1
    updates: int = 0
    every: int = 1
    after_update: Callable[[], None] | None = None


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
    """See the header. ``name`` is its key in ``learner.main.ALGORITHMS``; a class is called with the policy, its ``Config`` and
    ``DataFacts``. The parts are updated in their order, each freezing the others."""

    name: str
    advice: str
    """One sentence on what it lacks to do its work ("no failed episode yet: ..."), shown to people; "" for nothing."""
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
