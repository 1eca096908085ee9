"""How much each kind of step counts: weights as in Sirius (arXiv 2211.08416) and IWR (arXiv 2012.06733).

    w_kc = P*_k(c) / P_k(c)        so that in each task k, sum over kinds c of P_k(c) w_kc = 1

c is a demonstration, the policy's own step, one of these shortly before a takeover, or an operator's step. P_k is how often
the task's labels are of each kind in the batches that are drawn, P* how much they are to count:

    sirius    operator 1/2, before a takeover 0.002, demonstrations as drawn, the policy's own steps what remains
    iwr       operator 1/2, all others what remains, in proportion to what is drawn

A kind of which a task has no step has no weight: what it would have is left to what remains, or where nothing is drawn
that takes what remains, to the others in proportion. Where demonstrations leave nothing to remain (Sirius) there are no
weights; labels of that task count as without weighting: all alike, and those before a takeover not at all.

Differs from Sirius: its P is that of a data set, drawn uniformly. Here operators and demonstrations have stated shares of
each batch, so weights are near 1 and correct what the shares leave; with rare corrections a uniform draw would have few rows
with large weights. And frequencies are those of each task, so that weighting does not move weight between tasks.

Shape suffixes: B batch, H actions in a window, K tasks, C kinds.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algorithms.base import Batch
from fleet.robot import Source

WEIGHTINGS = ("none", "sirius", "iwr")
OPERATOR_PART = 0.5
BEFORE_TAKEOVER_PART = 0.002
DECAY = 0.98  # of running frequencies: about the last 50 batches
ABSENT = 1e-3  # a rarer kind has no weight of its own: it would be a large one, known badly


class Kind(enum.IntEnum):
    """What a label is of."""

    DEMO = 0
    POLICY = 1
    BEFORE_TAKEOVER = 2
    OPERATOR = 3


KIND_NAMES = tuple(kind.name.lower() for kind in Kind)
UNWEIGHTED = (1.0, 1.0, 0.0, 1.0)
"""By kind, without weighting."""


def kind_of(batch: Batch, num_before: int) -> Tensor:
    """(B,) int64, the kind of each window's first step. ``num_before``: steps before a takeover that are of their own kind."""
    own_B = batch.source_B == Source.POLICY
    before_B = own_B & (batch.takeover_in_B > 0) & (batch.takeover_in_B <= num_before)
    kind_B = own_B * int(Kind.POLICY) + before_B * int(Kind.BEFORE_TAKEOVER - Kind.POLICY)
    return kind_B + (batch.source_B == Source.OPERATOR) * int(Kind.OPERATOR)


def cut_before_takeover(batch: Batch, num_before: int) -> Batch:
    """Masks what lies behind the border of kinds in windows of the policy's own steps: labels are of one kind.

    Args:
        batch: With ``takeover_in_B`` looked for up to num_before + H - 1 steps ahead, where it has the policy's steps.
    """
    ahead_B = batch.takeover_in_B
    until_B = torch.where(ahead_B > num_before, ahead_B - num_before, ahead_B)
    none_B = (batch.source_B != Source.POLICY) | (ahead_B < 0)
    position_H = torch.arange(batch.mask_BH.shape[1], device=batch.mask_BH.device)
    return dataclasses.replace(batch, mask_BH=batch.mask_BH & (none_B[:, None] | (position_H < until_B[:, None])))


def wanted_parts(weighting: str, part_C: Sequence[float]) -> list[float] | None:
    """P* of the kinds, see the header; None where nothing remains for the policy's own steps.

    Args:
        weighting: "sirius" or "iwr".
        part_C: P, which sums up to 1; 0 for a kind that is not there.
    """
    fixed = {Kind.OPERATOR: OPERATOR_PART}
    if weighting == "sirius":
        fixed |= {Kind.DEMO: part_C[Kind.DEMO], Kind.BEFORE_TAKEOVER: BEFORE_TAKEOVER_PART}
    wanted = [fixed.get(kind, 0.0) if part_C[kind] > 0 else 0.0 for kind in Kind]
    remaining, of_rest = 1 - sum(wanted), sum(part_C[kind] for kind in Kind if kind not in fixed)
    if of_rest == 0:
        return [part / sum(wanted) for part in wanted]
    if remaining <= 0:
        return None
    return [wanted[kind] if kind in fixed else remaining * part_C[kind] / of_rest for kind in Kind]


class KindWeights:
    """Running frequencies of kinds by task, and the weights that follow. A function of reduced stats: alike on all ranks.

    Args:
        weighting: One of ``WEIGHTINGS``.
        tasks: Names; ``Batch.task_B`` counts in them.
    """

    def __init__(self, weighting: str, tasks: Sequence[str]) -> None:
        self._weighting, self._tasks = weighting, tuple(tasks) or ("",)
        self._part_KC = [[0.0] * len(Kind) for _ in self._tasks]
        self._weight_KC = torch.tensor([UNWEIGHTED] * len(self._tasks))
        self.without: tuple[str, ...] = ()
        """Tasks for which nothing remains."""

    def of(self, task_B: Tensor, kind_B: Tensor) -> Tensor:
        """(B,) float32."""
        if self._weighting == "none":
            return self._weight_KC[0].to(kind_B.device)[kind_B]
        return self._weight_KC.to(kind_B.device)[task_B, kind_B]

    def stats(self, task_B: Tensor, kind_B: Tensor, num_valid_B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What ``update`` reads: parts of all labels by task and kind."""
        if self._weighting == "none":
            return {}
        cell_B, total = task_B * len(Kind) + kind_B, num_valid_B.sum()
        cell_N1 = torch.arange(len(self._tasks) * len(Kind), device=cell_B.device)[:, None]
        labels = ((cell_B == cell_N1) * num_valid_B).sum(1)
        return {name: (count, total) for name, count in zip(self._names(), labels, strict=True)}

    def update(self, stats: Mapping[str, float]) -> None:
        """Takes the reduced stats of a batch."""
        if self._weighting == "none":
            return
        drawn = [stats[name] for name in self._names()]
        for task in range(len(self._tasks)):
            self._part_KC[task] = _moved(self._part_KC[task], drawn[task * len(Kind) : (task + 1) * len(Kind)])
        self._set_weights()

    def state_dict(self) -> dict[str, Any]:
        """Frequencies by the name of the task."""
        return {name: list(part_C) for name, part_C in zip(self._tasks, self._part_KC, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state_dict`` returned; tasks that it does not know begin anew."""
        self._part_KC = [[float(part) for part in state.get(name, [0.0] * len(Kind))] for name in self._tasks]
        self._set_weights()

    def _names(self) -> list[str]:
        return [f"labels_{kind}_{task}" for task in range(len(self._tasks)) for kind in KIND_NAMES]

    def _set_weights(self) -> None:
        weights = [_weights(self._weighting, part_C) for part_C in self._part_KC]
        self._weight_KC = torch.tensor([weight_C or UNWEIGHTED for weight_C in weights])
        self.without = tuple(name for name, weight_C in zip(self._tasks, weights, strict=True) if weight_C is None)


def _moved(old_C: list[float], drawn_C: Sequence[float]) -> list[float]:
    """Running frequencies of a task after a batch. Where a kind appears they begin anew: its weight would be too large for
    as long as a mean needs to follow."""
    total = sum(drawn_C)
    if total <= 0:
        return old_C
    new_C = [labels / total for labels in drawn_C]
    if any(new > ABSENT > old for new, old in zip(new_C, old_C, strict=True)):
        return new_C
    return [DECAY * old + (1 - DECAY) * new for new, old in zip(new_C, old_C, strict=True)]


def _weights(weighting: str, part_C: Sequence[float]) -> list[float] | None:
    """By kind; None where there are none."""
    there = [part if part > ABSENT else 0.0 for part in part_C]
    if weighting == "none" or not any(there):
        return list(UNWEIGHTED)
    there = [part / sum(there) for part in there]
    wanted = wanted_parts(weighting, there)
    if wanted is None:
        return None
    return [UNWEIGHTED[kind] if there[kind] == 0 else wanted[kind] / there[kind] for kind in Kind]
