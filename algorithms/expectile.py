"""Implicit Q-learning's two formulas (arXiv 2110.06169): values that lean to the best of what was done, and how much more a
step is imitated that was better than expected.

    L_V = |tau - 1[u < 0]| u^2,   u = Q(s, c) - V(s)          (eq. 5)
    w   = min( exp(beta A), w_max ),   A = Q(s, c) - V(s)       (eq. 7)

Shape suffixes: B batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expectile_loss(difference_B: Tensor, tau: float) -> Tensor:
    """(B,): asymmetric squared error of Q - V; with tau = 0.5 half the square, near 1 V becomes the largest Q."""
    return torch.where(difference_B < 0, 1 - tau, tau) * difference_B**2


def advantage_weights(advantage_B: Tensor, beta: float, largest: float = 100.0) -> Tensor:
    """(B,): in (0, largest], without overflow whatever the advantage is."""
    return torch.exp((beta * advantage_B).clamp(max=math.log(largest)))
