"""What imitation does with windows of actions before the loss.

Shape suffixes: B batch, H chunk length, A action dims.
"""

from __future__ import annotations

import dataclasses

import torch

from algorithms.base import Batch


def fill_with_last_action(batch: Batch) -> Batch:
    """Fills what a window lacks, after an episode's end or a takeover's border, with its last valid action.

    Without it the late actions of a chunk have no target in the states where demonstrations end, and those are the states
    where a policy that is nearly there needs them. A window without any valid action stays as it is.
    """
    mask_BH = batch.mask_BH.bool()
    num_valid_B = mask_BH.sum(-1)
    position_BH = torch.arange(mask_BH.shape[1], device=mask_BH.device).expand_as(mask_BH)
    last_B1 = position_BH.masked_fill(~mask_BH, 0).amax(-1, keepdim=True)
    source_BH = torch.where(mask_BH, position_BH, last_B1)
    actions_BHA = batch.actions_BHA.gather(1, source_BH[..., None].expand_as(batch.actions_BHA))
    filled_BH = (num_valid_B > 0)[:, None].expand_as(mask_BH).to(batch.mask_BH.dtype)
    return dataclasses.replace(batch, actions_BHA=actions_BHA, mask_BH=filled_BH)


def cut_at_takeover(batch: Batch) -> Batch:
    """Masks each window from the first step on in which somebody else acts than at t: a chunk is the work of one actor, or it
    is no label. For windows of ``Within.EPISODE``; those of ``Within.SOURCE`` end there already.
    """
    same_BH = (batch.source_BH == batch.source_B[:, None]).cumprod(1)
    return dataclasses.replace(batch, mask_BH=batch.mask_BH * same_BH.to(batch.mask_BH.dtype))
