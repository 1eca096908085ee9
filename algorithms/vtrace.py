"""V-trace (IMPALA, arXiv 1802.01561, section 4.1): values and advantages of the newest policy pi from steps that an older one,
mu, has acted in.

    rho_t = min(rho_clip, pi/mu),  c_t = min(trace_clip, pi/mu)
    delta_t = rho_t (r_t + gamma V(s_{t+1}) - V(s_t))
    target_t = V(s_t) + delta_t + gamma c_t (target_{t+1} - V(s_{t+1}))
    advantage_t = rho_t (r_t + gamma target_{t+1} - V(s_t))

Nothing flows back over the end of an episode; a terminated one has no value behind it, one that was cut by a time limit has
the value of what was seen last. Left out: the lambda that shortens traces further.

Shape suffixes: B sequences, T steps in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fleet.errors import ConfigError


@torch.no_grad()
def vtrace(
    log_ratio_BT: Tensor,
    rewards_BT: Tensor,
    values_BT: Tensor,
    next_values_BT: Tensor,
    terminated_BT: Tensor,
    truncated_BT: Tensor,
    mask_BT: Tensor,
    *,
    discount: float,
    rho_clip: float = 1.0,
    trace_clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Targets of the values and advantages, both (B, T) without gradient; 0 where masked.

    Args:
        log_ratio_BT: log pi - log mu of the action that was executed.
        values_BT, next_values_BT: V of the observation before and behind each step.
        terminated_BT, truncated_BT: The episode ends with this step; the next one belongs to another.
        mask_BT: False for padding, which may hold anything; what stands before it has nothing behind it but ``next_values_BT``.
        discount: gamma, in [0, 1].

    Raises:
        ConfigError: A setting is out of its range.
    """
    if not (0 <= discount <= 1 and 0 < trace_clip <= rho_clip):
        raise ConfigError(
            f"vtrace with discount {discount}, rho_clip {rho_clip}, trace_clip {trace_clip}",
            rule="0 <= discount <= 1, 0 < trace_clip <= rho_clip",
        )
    mask_BT, terminated_BT, truncated_BT = mask_BT.bool(), terminated_BT.bool(), truncated_BT.bool()

    def inside(value_BT: Tensor) -> Tensor:
        return torch.where(mask_BT, value_BT, torch.zeros_like(value_BT))

    ratio_BT, reward_BT, value_BT = inside(log_ratio_BT).exp(), inside(rewards_BT), inside(values_BT)
    next_value_BT = torch.where(terminated_BT, torch.zeros_like(value_BT), inside(next_values_BT))
    rho_BT, trace_BT = ratio_BT.clamp(max=rho_clip), ratio_BT.clamp(max=trace_clip)
    goes_on_BT = mask_BT & ~terminated_BT & ~truncated_BT & functional.pad(mask_BT[:, 1:], (0, 1))

    excess_BT = rho_BT * (reward_BT + discount * next_value_BT - value_BT)  # target - V
    for t in reversed(range(excess_BT.shape[1] - 1)):
        excess_BT[:, t] += discount * trace_BT[:, t] * goes_on_BT[:, t] * excess_BT[:, t + 1]
    target_BT = value_BT + excess_BT
    later_BT = torch.where(goes_on_BT, target_BT.roll(-1, 1), next_value_BT)
    return inside(target_BT), inside(rho_BT * (reward_BT + discount * later_BT - value_BT))
