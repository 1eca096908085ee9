"""Why a loss or a gradient is not finite: looked at only once it is, so it may take its time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from algorithms.base import Batch
from learner.ranks import Ranks

HUGE = 1e6  # in the robot's units: no angle, length, force or reward is so large, and sums of its powers overflow
MAX_NAMES = 4


@torch.no_grad()
def find_suspects(
    batch: Batch, per_sample: Iterable[Tensor], parameters: Mapping[str, nn.Parameter], ranks: Ranks
) -> list[str]:
    """Phrases that name features of the batch, rows, weights and gradients that are not finite, or huge. Every rank calls it,
    and all get what any found, each phrase once.

    Args:
        batch: This rank's rows.
        per_sample: Losses of these rows, in their order, as far as they were computed.
        parameters: What is trained, by name; its gradients as the backward pass left them, where they are whole.
    """
    mine = [*_features(batch), *_rows(batch, per_sample), *_parameters(parameters)]
    if ranks.size == 1:
        return mine
    told = [json.loads(data) for data in ranks.gather_bytes(json.dumps(mine).encode())]
    return list(dict.fromkeys(phrase for found in told for phrase in found))


def _features(batch: Batch) -> Iterator[str]:
    """Inputs. Actions and rewards count where they are valid: what is masked may be anything."""
    values = {**batch.obs, **{f"{name} at {offset:+d}": v for offset, o in batch.obs_at.items() for name, v in o.items()}}
    valid = {"action": batch.actions_BHA, "reward": batch.rewards_BH}
    masked = {n: torch.where(_wide(batch.mask_BH, v), v, torch.zeros_like(v)) for n, v in valid.items()}
    for name, value in {**values, **masked, **batch.replay, "weight": batch.weight_B}.items():
        if not value.is_floating_point() or not value.numel():
            continue
        flat = value.flatten(1) if value.dim() > 1 else value[:, None]
        for bad, said in ((~torch.isfinite(flat), "is not finite"), (flat.abs() > HUGE, f"is beyond {HUGE:.0e}")):
            if bad.any():
                yield f"{name!r} {said} in {_where(batch, bad.any(1))}, elements {_numbers(bad.any(0))}"
                break


def _rows(batch: Batch, per_sample: Iterable[Tensor]) -> Iterator[str]:
    losses = [loss.flatten() for loss in per_sample]
    loss_B = torch.cat(losses) if losses else torch.zeros(0)
    bad_B = ~torch.isfinite(loss_B)
    if len(loss_B) == len(batch.actions_BHA) and bad_B.any():
        yield f"the loss is not finite in {_where(batch, bad_B)}"


def _parameters(parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for what, tensors in (("weights", parameters), ("gradients", gradients)):
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            more = f" and {len(bad) - MAX_NAMES} more" if len(bad) > MAX_NAMES else ""
            yield f"{what} are not finite in {', '.join(bad[:MAX_NAMES])}{more}"


def _where(batch: Batch, bad_B: Tensor) -> str:
    """Which rows, so that people find them in the log."""
    first = int(bad_B.nonzero()[0])
    at = f"first: task {int(batch.task_B[first])}, episode {int(batch.episode_B[first])}, frame {int(batch.frame_B[first])}"
    return f"{int(bad_B.sum())} of {len(bad_B)} rows ({at})"


def _numbers(bad: Tensor) -> str:
    found = bad.nonzero().flatten().tolist()
    return ", ".join(map(str, found[:MAX_NAMES])) + (", ..." if len(found) > MAX_NAMES else "")


def _wide(mask_BH: Tensor, value: Tensor) -> Tensor:
    return mask_BH.bool().reshape(mask_BH.shape + (1,) * (value.dim() - 2))
