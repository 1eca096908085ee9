"""A chunk that continues the one before it, by a flow policy that was not trained for prefixes.

Real-time chunking at inference (arXiv 2506.07339, equations 2 and 3), in the convention of flow.py:

    v' = v - w J^T [(y - x_0(x)) W],  x_0(x) = x - t v(x),  J = d x_0 / d x, through the network

y is the rest of the chunk before, W how much each of its actions counts. A policy with ``max_delay`` needs none of this: it is
cheaper to act with, and better where delays are long (arXiv 2512.05964).

Shape suffixes: as in flow.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.policies.base import Chunk
from algorithms.policies.flow import Flow, FlowPolicy
from algorithms.policies.flow_sde import times
from fleet.errors import PolicyError


def soft_weights(delay: int, end: int, horizon: int) -> Tensor:
    """(H,), float64: 1 for the first ``delay`` actions, falling exponentially to 0 at action ``end``, 0 behind."""
    share_H = ((end - torch.arange(horizon, dtype=torch.float64)) / (end - delay + 1)).clamp(0, 1)
    weight_H = share_H * torch.expm1(share_H) / math.expm1(1)
    weight_H[:delay] = 1
    return weight_H


def guidance_weight(t: Tensor, most: float) -> Tensor:
    """w at time t: min(most, t / (1 - t) * ((1 - t)^2 + t^2) / t^2)."""
    return ((t**2 + (1 - t) ** 2) / (t * (1 - t))).clamp(max=most)


def guided_velocity(flow: Flow, x_BHA: Tensor, time_B: Tensor, known_BHA: Tensor, weight_H: Tensor, most: float) -> Tensor:
    """v' at x: the network is run with the gradient to x, whatever the caller's mode."""
    with torch.enable_grad():
        x_BHA = x_BHA.detach().requires_grad_()
        v_BHA = flow(x_BHA, time_B)[0]
        data_BHA = x_BHA - time_B[:, None, None] * v_BHA
        error_BHA = ((known_BHA - data_BHA) * weight_H[:, None]).detach()
        (pull_BHA,) = torch.autograd.grad(data_BHA, x_BHA, error_BHA)
    return v_BHA.detach() - guidance_weight(time_B, most)[:, None, None] * pull_BHA


def continue_chunk(
    policy: FlowPolicy, obs: Mapping[str, Tensor], before_BHA: Tensor, delay: int, execute: int, most: float = 5.0
) -> Chunk:
    """A chunk for each row, deterministic like ``policy.act``, whose first actions follow a chunk that is being executed.

    Args:
        before_BHA: The chunk before, in the robot's units, from the action on that is executed at this observation.
            Actions that it no longer has may be anything finite.
        delay: d, of its actions that will be executed before the new chunk can be used.
        execute: s, actions of each chunk that are executed: as many are missing at the end of ``before_BHA``.
        most: Upper bound of w.

    Raises:
        PolicyError: Not 0 <= d <= H - s, or the chunk before has another shape.
    """
    horizon = policy.spec.horizon
    if not 0 <= delay <= horizon - execute or before_BHA.shape[1:] != (horizon, policy.spec.action_dim):
        raise PolicyError(
            f"a chunk before of shape {tuple(before_BHA.shape)}, delay {delay}, execute {execute}",
            rule=f"(B, {horizon}, {policy.spec.action_dim}), 0 <= delay <= {horizon} - execute",
        )
    # Gradients to x need tensors that are not of inference mode.
    with policy.exact(), torch.inference_mode(False), torch.no_grad():
        known_BHA = policy.scale.normalise(before_BHA)
        weight_H = soft_weights(delay, horizon - execute, horizon).to(known_BHA)
        flow = policy.flow(obs)
        x_BHA = policy.start_HA.float().repeat(len(known_BHA), 1, 1)
        for t in times(policy.num_steps):
            time_B = t.to(x_BHA).expand(len(x_BHA))
            x_BHA = x_BHA - guided_velocity(flow, x_BHA, time_B, known_BHA, weight_H, most) / policy.num_steps
        return Chunk(policy.scale.restore(x_BHA))
