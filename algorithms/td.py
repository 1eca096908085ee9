"""Temporal-difference targets of action chunks: what a chunk brought, and how much the state behind it counts.

    y = reward + bootstrap V(obs at offset H)

A window of H steps that begins at t has one of three ends:

    all H steps are followed by another       reward = sum_{i<H} discount^i r_{t+i},   bootstrap = discount^H
    step t+k is terminal                      reward = sum_{i<=k} discount^i r_{t+i},  bootstrap = 0
    step t+k is the last one, not terminal    reward = sum_{i<k} discount^i r_{t+i},   bootstrap = discount^k

The last case is a time limit, an abort, or the end of what is recorded so far. The observation behind the last step is in no
log, the one before it is: it is what a window has at offsets beyond its episode. So such chunks stop one step early instead
of being dropped (as in Q-chunking, arXiv 2507.07969), or taken for failures. A window that begins at such a last step has
nothing to learn from: its weight is 0, and it is the only one that is left out. The reward of such a last step is in no target:
whoever sends rewards of success by the step (``environment``) ends these episodes with next.terminated.

For whole-chunk critics the third case is exact where the policy would go on as the rest of the chunk does, and else an upper
bound: the rest, which nobody has seen the end of, is judged as if the policy chose it.

Windows are those of ``Within.EPISODE``. Shape suffixes: B batch, H chunk length, L prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from algorithms.base import Batch


def chunk_return(
    batch: Batch, rewards_BH: Tensor, discount: float, terminal_BH: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the header.

    Args:
        batch: With the offset H among its observations.
        terminal_BH: Which steps end it all, bool; None: ``batch.terminated_BH``.

    Returns:
        reward_B, bootstrap_B, and weight_B: 1, or 0 where nothing is known. Finite in float32 whatever masked steps hold.
    """
    parts = prefix_return(batch, rewards_BH, discount, (rewards_BH.shape[1],), terminal_BH)
    reward_B, bootstrap_B, weight_B = (part[:, 0] for part in parts)
    return reward_B, bootstrap_B, weight_B


def prefix_return(
    batch: Batch, rewards_BH: Tensor, discount: float, lengths: Sequence[int], terminal_BH: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``chunk_return`` of the first ``length`` steps of each window, for several lengths: (B, L) each.

    Args:
        lengths: 1 to H, each an offset of the batch's observations.
    """
    terminal_BH = batch.terminated_BH if terminal_BH is None else terminal_BH
    mask_BH, position_H = batch.mask_BH.bool(), torch.arange(rewards_BH.shape[1], device=rewards_BH.device)
    rewards_BH = torch.where(mask_BH, rewards_BH.float(), 0.0) * discount**position_H
    last_B1 = mask_BH.sum(1, keepdim=True) - 1  # the last step inside, as far as the window goes
    length_1L = torch.tensor([list(lengths)], device=rewards_BH.device)
    inside_BL = torch.stack([batch.inside_at[length] for length in lengths], 1).bool()
    ended_BH = (terminal_BH & mask_BH).cumsum(1) > 0
    first_B1 = (~ended_BH).sum(1, keepdim=True)  # the terminal step; H where there is none
    terminal_BL = first_B1 < length_1L
    num_known_BL = torch.where(inside_BL, length_1L, torch.minimum(length_1L, last_B1))
    num_BL = torch.where(terminal_BL, first_B1 + 1, num_known_BL)
    total_BH1 = torch.cat([torch.zeros_like(rewards_BH[:, :1]), rewards_BH.cumsum(1)], 1)
    reward_BL = total_BH1.gather(1, num_BL.clamp(min=0))
    bootstrap_BL = torch.where(terminal_BL, 0.0, discount ** num_BL.clamp(min=0).float())
    weight_BL = (num_BL > 0).float()
    return reward_BL * weight_BL, bootstrap_BL * weight_BL, weight_BL
