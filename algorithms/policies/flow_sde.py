"""Transitions of a flow policy's chain, from noise at t = 1 to data at t = 0, as densities (pure functions).

Convention of pi0 and Flow-GRPO: x_t = (1 - t) x_0 + t e, velocity v = e - x_0, K steps of size d = 1 / K.

    ODE         x' = x - v d
    Flow-SDE    x' ~ N(x - v d - (sigma^2 / 2t) (x + (1 - t) v) d, sigma^2 d),  sigma = a sqrt(t / (1 - t))
                (Flow-GRPO, arXiv 2505.05470; at t = 1 the denominator is that of the next time)
    Flow-Noise  x' ~ N(x - v d, std^2), std an output of the network (ReinFlow, arXiv 2505.22094)

Shape suffixes: K steps. Everything else is elementwise and broadcasts, in the dtype of the arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def times(num_steps: int) -> Tensor:
    """(K,), float64: where each step begins, from 1 to 1 / K."""
    return 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps


def sigmas(num_steps: int, noise_level: float) -> Tensor:
    """(K,), float64: diffusion of each step of Flow-SDE, a = ``noise_level``. All are positive and finite for a > 0."""
    t_K = times(num_steps)
    rest_K = 1 - t_K
    rest_K[0] = 1 / num_steps  # 1 - t is 0 at the start: that of the next time stands in
    return noise_level * (t_K / rest_K).sqrt()


def sde_step(x: Tensor, v: Tensor, t: Tensor, step: float | Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a step of size ``step`` from x at time t."""
    pull = sigma**2 * step / (2 * t)
    return x - v * step - pull * (x + (1 - t) * v), sigma * torch.as_tensor(step, dtype=sigma.dtype).sqrt()


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of each element of x."""
    return -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


def normal_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) of each element.

    Between two velocities of Flow-SDE this is (d / 2) (1 / sigma + sigma (1 - t) / 2t)^2 (v - v')^2.
    """
    ratio = std / other_std
    return ((mean - other_mean) / other_std) ** 2 / 2 + (ratio**2 - 1) / 2 - ratio.log()
