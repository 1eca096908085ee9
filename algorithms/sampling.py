"""Several chunks of a policy in each state, and which of them is best.

Randomness is a function of (seed, step, stream, row, sample): the same however a batch is split over micro-batches and ranks.

Shape suffixes: B batch, N samples a state, H chunk length, A action dims, K critics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from algorithms.base import Batch, noise_of
from algorithms.policies.base import TEXT
from algorithms.policies.normalise import ActionScale
from algorithms.policies.text import text_of

AGGREGATES = ("mean", "min")
REACH = 1.5  # chunks that critics judge are clipped to so many times the 1 % to 99 % range of the data's actions


def noise_of_samples(policy: Any, batch: Batch, batch_size: int, num: int, seed: int, step: int, stream: int = 0) -> Any:
    """A policy's noise for ``num`` samples of each row, the samples of a row behind each other: (B N, ...).

    Args:
        batch_size: Rows of the whole batch, of which ``batch.index_B`` says which are here.
    """
    places_BN = batch.index_B[:, None] * num + torch.arange(num, device=batch.index_B.device)
    return noise_of(policy, dataclasses.replace(batch, index_B=places_BN.flatten()), batch_size * num, seed, step, stream)


def sample_chunks(policy: Any, obs: Mapping[str, Tensor], noise: Any, num: int) -> Tensor:
    """(B N, H, A): N chunks of each state, of ``noise_of_samples``."""
    actions: Tensor = policy.act({name: value.repeat_interleave(num, 0) for name, value in obs.items()}, noise).actions_BHA
    return actions


@torch.enable_grad()
def has_gradient(policy: Any) -> bool:
    """Whether a policy's weights have a gradient through ``act``; tokens, which are chosen, give none."""
    spec, weights = policy.spec, [p for p in policy.parameters() if p.requires_grad]
    obs = {name: torch.zeros(1, *shape) for name, shape in {**spec.reads, **spec.conditions}.items()}
    obs |= {name: torch.zeros(1, *shape, dtype=torch.uint8) for name, shape in spec.images.items()}
    if TEXT in spec.conditions:
        obs[TEXT] = text_of("any task")[None]
    actions_BHA = policy.act({name: value.to(weights[0].device) for name, value in obs.items()}).actions_BHA
    if not actions_BHA.requires_grad:
        return False
    gradients = torch.autograd.grad(actions_BHA.sum(), weights, allow_unused=True)
    return any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def aggregated(values_KB: Tensor, aggregate: str) -> Tensor:
    """(B,): the values of an ensemble as one, ``mean`` or ``min``."""
    return values_KB.amin(0) if aggregate == "min" else values_KB.mean(0)


def within_reach(actions_BHA: Tensor, scale: ActionScale) -> Tensor:
    """Actions clipped to ``REACH`` times the range of the data: further out no critic knows anything. Clipped elements have no
    gradient."""
    return scale.restore(scale.normalise(actions_BHA).clamp(-REACH, REACH))
