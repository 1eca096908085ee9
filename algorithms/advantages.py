"""Which steps were better than expected: returns, advantages, and thresholds of RECAP (arXiv 2511.14759).

    r_t = -1 a step, 0 in the last step of a success, -cost in that of a failure;   R_t = r_t + ... + r_T;   all divided by L

L: steps of the task's longest episode, so values lie in [-1, 0]. Episodes that are open, or that nobody judged, have no return.

Shape suffixes: B batch, A action dims, K tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algorithms.base import Batch
from fleet.batch import Outcome

NEAR = 0.3  # part of the judged steps from which the density at a threshold is taken
FIRST_WIDTH = 0.05  # of the band that holds them, to begin with; values lie in [-1, 0]
LEAST_WIDTH = 1e-4  # where all advantages were alike for long the band would vanish, and the threshold stay for ever
_MIX, _STEP, _FRAME, _OUTCOME = 0x9E3779B97F4A7C1, 0xBF58476D1CE4E5B, 0x94D049BB133111F, 0xD6E8FEB86659FD9  # odd


def normalised_return(batch: Batch, length_B: Tensor, cost_B: Tensor) -> Tensor:
    """(B,): R_t / L in float32, at most 0, not clipped; NaN where the episode is open, aborted or not judged.

    Args:
        length_B: L.
        cost_B: Of a failure, in steps.
    """
    failure_B = batch.outcome_B == Outcome.FAILURE
    judged_B = (failure_B | (batch.outcome_B == Outcome.SUCCESS)) & (batch.steps_to_go_B >= 1)
    return_B = -(batch.steps_to_go_B - 1 + cost_B * failure_B) / length_B
    return torch.where(judged_B, return_B.float(), torch.nan)


def lookahead_advantage(
    batch: Batch, now_B: Tensor, later_B: Tensor, return_B: Tensor, length_B: Tensor, lookahead: int
) -> Tensor:
    """(B,) in float32: r_t + ... + r_{t+N-1} + V(o_{t+N}) - V(o_t), with r and V both divided by L.

    Where the episode ends within N steps the sum goes to its end and nothing follows: R_t - V(o_t), in which there is no V of
    a state behind the end. Where it ends there without a judgement, V of the last state stands for what would have come. NaN
    where nothing is known: the log ends within N steps.

    Args:
        now_B: V(o_t).
        later_B: V of the observation at offset N; not looked at with N = 0.
        return_B: Of ``normalised_return``.
        lookahead: N; 0: to the end of the episode.
    """
    to_end_B = return_B - now_B
    if not lookahead:
        return to_end_B
    left_B = batch.steps_to_go_B - 1  # steps behind this one
    ahead_B = -lookahead / length_B + later_B - now_B
    unjudged_B = -left_B / length_B + later_B - now_B
    ends_B = return_B.isnan() & (left_B >= 1) & (left_B < lookahead)
    advantage_B = torch.where(ends_B, unjudged_B, to_end_B)
    return torch.where(batch.inside_at[lookahead].bool(), ahead_B, advantage_B).float()


class Thresholds:
    """By task the advantage above which the stated share of the judged steps lies: a quantile that follows the data.

    Stochastic approximation (Robbins and Monro 1951) with the slope estimated beside it. In a batch with n judged steps of a
    task a part p lies above eps, and a part q within eps +- w. With W steps judged so far, at most ``window``, and g = n / W:

        eps += g (p - share) 2 w / NEAR        log w += g (NEAR - q) / NEAR

    All that it needs of a batch are sums over its rows, so all ranks come to the same thresholds.

    Args:
        share: Of the steps above the threshold, in (0, 1).
        window: Steps of a task over which the quantile is taken, about; the smaller, the faster it follows.
    """

    def __init__(self, num_tasks: int, share: float, window: int = 2048) -> None:
        self._share, self._window = share, window
        self._value_K, self._width_K, self._seen_K = ([x] * num_tasks for x in (0.0, FIRST_WIDTH, 0.0))

    def of(self, task_B: Tensor) -> Tensor:
        """(B,) float32: each row's threshold."""
        return torch.tensor(self._value_K, dtype=torch.float32, device=task_B.device)[task_B]

    def stats(self, task_B: Tensor, advantage_B: Tensor, judged_B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What ``update`` needs of some rows, as pairs (sum, weight), for all tasks: the share of the rows that are judged,
        and of those the shares that are above and near the threshold."""
        width_B = torch.tensor(self._width_K, dtype=torch.float32, device=task_B.device)[task_B]
        above_B = advantage_B > self.of(task_B)
        near_B = (advantage_B - self.of(task_B)).abs() < width_B
        stats: dict[str, tuple[Tensor, Tensor]] = {}
        for task in range(len(self._value_K)):
            mine_B = judged_B & (task_B == task)
            count = mine_B.sum()
            stats[f"judged_{task}"] = (count, torch.full_like(count, len(mine_B)))
            stats[f"above_{task}"] = ((mine_B & above_B).sum(), count)
            stats[f"near_{task}"] = ((mine_B & near_B).sum(), count)
        return stats

    def update(self, stats: Mapping[str, float], num_rows: int) -> None:
        """Takes what became of ``stats`` of all rows.

        Args:
            num_rows: Of the batch.
        """
        for task in range(len(self._value_K)):
            count = stats[f"judged_{task}"] * num_rows
            if count > 0:
                self._seen_K[task] = min(self._seen_K[task] + count, float(self._window))
                gain = min(count / self._seen_K[task], 1.0)
                self._value_K[task] += gain * (stats[f"above_{task}"] - self._share) * 2 * self._width_K[task] / NEAR
                wider = math.exp(gain * (1 - stats[f"near_{task}"] / NEAR))
                self._width_K[task] = max(self._width_K[task] * wider, LEAST_WIDTH)

    def state(self, task: int) -> list[float]:
        """Of one task: its threshold, and what it goes on with."""
        return [self._value_K[task], self._width_K[task], self._seen_K[task]]

    def load_state(self, task: int, state: Sequence[float]) -> None:
        """Takes what ``state`` returned."""
        self._value_K[task], self._width_K[task], self._seen_K[task] = state


class Labels:
    """Advantages that were computed before, by step: a bounded table, in which a step has one place and a newer one that has
    the same takes it.

    Numbers of steps may change their meaning while a run goes on, and an episode may be judged anew: an entry counts only for
    the same number, frame, action and outcome. Lies on the CPU, where two rows with one place are written in order.

    Args:
        size: Places.
        max_age: An entry is out of date when so many updates of the value were done since.
    """

    def __init__(self, size: int, max_age: int) -> None:
        self._size, self._max_age = size, max_age
        self._tag_S = torch.zeros(size, dtype=torch.int64)  # 0: an empty place
        self._made_S = torch.zeros(size, dtype=torch.int64)
        self._advantage_S = torch.zeros(size)

    def look_up(self, batch: Batch, now: int) -> tuple[Tensor, Tensor]:
        """Advantages (B,), float32 on the batch's device, and which of them are there and not out of date, bool.

        Args:
            now: Updates of the value so far.
        """
        place_B, tag_B = self._places(batch)
        fresh_B = (self._tag_S[place_B] == tag_B) & (now - self._made_S[place_B] < self._max_age)
        device = batch.step_B.device
        return self._advantage_S[place_B].to(device), fresh_B.to(device)

    def put(self, batch: Batch, advantage_B: Tensor, now: int) -> None:
        """Keeps the advantages of these rows; of those that are not known nothing is kept."""
        place_B, tag_B = self._places(batch)
        advantage_B = advantage_B.cpu().float()
        # The last of several rows with one place, in all three columns.
        last = {place: row for row, place in enumerate(place_B.tolist()) if advantage_B[row].isfinite()}
        place_N, row_N = torch.tensor([*last], dtype=torch.int64), torch.tensor([*last.values()], dtype=torch.int64)
        self._tag_S[place_N], self._advantage_S[place_N], self._made_S[place_N] = tag_B[row_N], advantage_B[row_N], now

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors are the live ones."""
        return {"tag": self._tag_S, "made": self._made_S, "advantage": self._advantage_S}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A table of another size begins empty."""
        if len(state["tag"]) == self._size:
            self._tag_S.copy_(state["tag"])
            self._made_S.copy_(state["made"])
            self._advantage_S.copy_(state["advantage"])

    def _places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Place and tag (B,) of each row's step; sums of products with odd numbers, which overflow."""
        step_B, frame_B, outcome_B = (x.cpu().long() for x in (batch.step_B, batch.frame_B, batch.outcome_B))
        bits_BA = batch.actions_BHA[:, 0].detach().float().cpu().contiguous().view(torch.int32).long()
        weight_A = _MIX * (2 * torch.arange(bits_BA.shape[1]) + 1)
        tag_B = (bits_BA * weight_A).sum(1) + step_B * _STEP + frame_B * _FRAME + outcome_B * _OUTCOME
        return step_B % self._size, torch.where(tag_B == 0, 1, tag_B)
