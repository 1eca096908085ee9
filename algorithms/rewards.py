"""What a step is worth, and which steps end the task: the reward that algorithms with values learn from.

    environment   r_t = what the robot sent as next.reward
    success       r_t = 1 in the last step of a successful episode, else 0
    steps         r_t = -1, but 0 in the last step of a success, -failure_cost in that of a failure (RECAP, arXiv 2511.14759)

and of the first two scale * r_t - step_cost, of the third scale * r_t. ``success`` and ``steps`` read the newest judgement of
the episode (``outcome_B``), so a person's or a classifier's label changes rewards that were recorded long ago.

The end of an episode is the end of the task (nothing follows that has a value) or a cut (what follows has):

    the episode                               environment                     success, steps
    success                                   as next.terminated says         end, also where a time limit came first
    failure, next.terminated                  end                             end
    failure, not terminated (a time-out       ``timeouts``: "bootstrap" a     ``timeouts``: the same; a cut costs no
      that was judged)                        cut, "end" an end               failure_cost, it goes on
    unknown                                   next.terminated, ``timeouts``   next.terminated; else a cut
    aborted                                   next.terminated; else a cut     next.terminated; else a cut
    open (the log ends)                       next.terminated; else a cut     next.terminated; else a cut

Shape suffixes: B batch, H steps in a window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.base import Batch
from fleet.batch import Outcome
from fleet.errors import ConfigError

KINDS = ("environment", "success", "steps")
TIMEOUTS = ("bootstrap", "end")
Stat = Tensor | tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """See the header. Made once from an algorithm's config; its ``BatchNeeds`` has this ``discount``, and windows within the
    episode.

    Args:
        kind: ``environment``, ``success`` or ``steps``.
        discount: gamma, in (0, 1].
        scale: Factor of what ``kind`` says, above 0.
        step_cost: Taken from each step's reward afterwards, at least 0; a time penalty. Not with ``steps``, which is one.
        failure_cost: Of ``steps``: what a failure's last step costs, at least 0.
        timeouts: What a failure is that nobody but the clock ended: ``bootstrap``, or ``end``.

    Raises:
        ConfigError: A value is out of its range; or a failure that goes on for ever would cost infinitely much.
    """

    kind: str = "success"
    discount: float = 0.99
    scale: float = 1.0
    step_cost: float = 0.0
    failure_cost: float = 0.0
    timeouts: str = "bootstrap"

    def __post_init__(self) -> None:
        endless = self.discount == 1 and self.timeouts == "bootstrap" and (self.kind == "steps" or self.step_cost > 0)
        rules = {
            "reward": (self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            "timeouts": (self.timeouts, self.timeouts in TIMEOUTS, f"one of {', '.join(TIMEOUTS)}"),
            "discount": (self.discount, 0 < self.discount <= 1, "in (0, 1]"),
            "scale": (self.scale, 0 < self.scale < math.inf, "above 0 and finite"),
            "step_cost": (
                self.step_cost,
                0 <= self.step_cost < math.inf and (self.kind != "steps" or not self.step_cost),
                "at least 0 and finite; 0 with reward 'steps', which costs 1 a step already",
            ),
            "failure_cost": (self.failure_cost, 0 <= self.failure_cost < math.inf, "at least 0 and finite"),
        }
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"rewards with {name} = {value!r}", rule=rule)
        if endless:
            raise ConfigError(
                "rewards with discount 1, a cost of each step and timeouts 'bootstrap'",
                rule="a failure that goes on for ever costs a finite amount",
                remedy="take a discount below 1, or timeouts 'end'",
            )

    def rewards_BH(self, batch: Batch) -> Tensor:
        """Reward of each step of the windows, float32; 0 where the mask is False."""
        mask_BH = batch.mask_BH.bool()
        if self.kind == "environment":
            return (self.scale * batch.rewards_BH.float() - self.step_cost) * mask_BH
        last_BH = _last_BH(batch)
        success_BH = last_BH & (batch.outcome_B == Outcome.SUCCESS)[:, None]
        if self.kind == "success":
            return (self.scale * success_BH.float() - self.step_cost) * mask_BH
        failure_BH = last_BH & self._failed_end_B(batch)[:, None]
        reward_BH = torch.where(failure_BH, -self.failure_cost, success_BH.float() - 1)
        return self.scale * reward_BH * mask_BH

    def terminal_BH(self, batch: Batch) -> Tensor:
        """Which steps end the task: behind them is no value. False where the mask is False."""
        mask_BH = batch.mask_BH.bool()
        ended_BH = batch.terminated_BH.bool()
        if self.kind == "environment":
            return (ended_BH | (batch.truncated_BH.bool() & (self.timeouts == "end"))) & mask_BH
        judged_B = (batch.outcome_B == Outcome.SUCCESS) | self._failed_end_B(batch)
        return (ended_BH | (_last_BH(batch) & judged_B[:, None])) & mask_BH

    def return_B(self, batch: Batch) -> Tensor:
        """Discounted return from t to the end of the stored episode, float32; NaN where what became of it is not known: it is
        open or aborted, or, for ``success`` and ``steps``, nobody judged it.

        Of a failure that was cut it is the return of one that goes on like this for ever, r / (1 - gamma) (Cal-QL's code,
        arXiv 2303.05479, whose sum up to the time limit would be far too high); for ``environment`` where all rewards from t
        on are the same r and nothing succeeded, else the sum up to the cut.
        """
        num_steps_B = batch.steps_to_go_B.float()
        known_B = (batch.steps_to_go_B >= 1) & (batch.outcome_B != Outcome.ABORTED)
        success_B = batch.outcome_B == Outcome.SUCCESS
        cost_B = self.step_cost * self._annuity(num_steps_B)
        if self.kind == "environment":
            return_B = self.scale * batch.return_B.float() - cost_B
            return_B = torch.where(self._endless_B(batch), self._for_ever(batch.rewards_BH[:, 0].float()), return_B)
            return torch.where(known_B, return_B, torch.nan)
        known_B &= batch.outcome_B != Outcome.UNKNOWN
        last_B = self._power(num_steps_B - 1)
        end_B = self._failed_end_B(batch)
        if self.kind == "success":
            value_B, failing = self.scale * success_B.float() * last_B - cost_B, 0.0
        else:
            value_B = -self.scale * (self._annuity(num_steps_B - 1) + self.failure_cost * last_B * end_B)
            failing = -1.0
        cut_B = ~success_B & ~end_B
        for_ever_B = self._for_ever(torch.full_like(num_steps_B, failing))
        return torch.where(known_B, torch.where(cut_B, for_ever_B, value_B), torch.nan)

    def stats(self, batch: Batch) -> dict[str, Stat]:
        """What ``RewardWatch`` sees: entries of ``LossOutput.stats``, of the rows that have all of their reward's facts.

        reward_mean, reward_square: of a step. return_known: share of rows whose return is known; return_mean,
        return_square: of those. known_success, known_failure: shares of rows whose return is known, by outcome;
        return_success, return_failure: mean returns of those. ended: share of steps that end the task.
        """
        reward_BH, mask_BH, return_B = self.rewards_BH(batch), batch.mask_BH.float(), self.return_B(batch)
        num_rows, num_steps = mask_BH.new_tensor(float(len(mask_BH))), mask_BH.sum()
        known_B = return_B.isfinite()
        return_B = return_B.nan_to_num()
        stats: dict[str, Stat] = {
            "reward_mean": (reward_BH.sum(), num_steps),
            "reward_square": ((reward_BH**2).sum(), num_steps),
            "ended": (self.terminal_BH(batch).float().sum(), num_steps),
            "return_known": (known_B.float().sum(), num_rows),
            "return_mean": (return_B.sum(), known_B.float().sum()),
            "return_square": ((return_B**2).sum(), known_B.float().sum()),
        }
        for outcome in (Outcome.SUCCESS, Outcome.FAILURE):
            name, these_B = outcome.name.lower(), (known_B & (batch.outcome_B == outcome)).float()
            stats[f"known_{name}"] = (these_B.sum(), num_rows)
            stats[f"return_{name}"] = ((return_B * these_B).sum(), these_B.sum())
        return stats

    def _failed_end_B(self, batch: Batch) -> Tensor:
        """Failures whose last step ends the task."""
        ends_B = torch.ones_like(batch.terminated_B, dtype=torch.bool) if self.timeouts == "end" else batch.terminated_B.bool()
        return (batch.outcome_B == Outcome.FAILURE) & ends_B

    def _endless_B(self, batch: Batch) -> Tensor:
        """Of ``environment``: failures and unjudged episodes that were cut, whose rewards from t on are all alike."""
        if self.discount == 1 or self.timeouts == "end":
            return torch.zeros_like(batch.terminated_B, dtype=torch.bool)
        failed_B = (batch.outcome_B == Outcome.FAILURE) | (batch.outcome_B == Outcome.UNKNOWN)
        alike_B = batch.rewards_BH[:, 0].float() * self._annuity(batch.steps_to_go_B.float())
        return failed_B & ~batch.terminated_B.bool() & torch.isclose(batch.return_B.float(), alike_B, rtol=1e-4, atol=1e-6)

    def _for_ever(self, reward_B: Tensor) -> Tensor:
        """The return of this reward, before scale and step_cost, in each step without end; 0 of 0, whatever the discount."""
        reward_B = self.scale * reward_B - self.step_cost
        return reward_B / (1 - self.discount) if self.discount < 1 else torch.zeros_like(reward_B)

    def _power(self, steps_B: Tensor) -> Tensor:
        """discount ** steps."""
        return torch.exp(steps_B * math.log(self.discount))

    def _annuity(self, steps_B: Tensor) -> Tensor:
        """1 + discount + ... of so many steps."""
        if self.discount == 1:
            return steps_B
        return -torch.expm1(steps_B * math.log(self.discount)) / (1 - self.discount)


@dataclasses.dataclass(kw_only=True)
class RewardConfig:
    """The reward's settings in the config of an algorithm, which inherits them."""

    reward: str = "success"
    """What a step is worth: ``environment``, ``success`` or ``steps``, see rewards.py."""
    discount: float = 0.99
    """gamma, by step. HIL-SERL: 0.97."""
    reward_scale: float = 1.0
    """Factor of the rewards."""
    step_cost: float = 0.0
    """Taken from each step's reward; not with ``steps``."""
    failure_cost: float = 0.0
    """Of ``steps``: what a failure costs."""
    timeouts: str = "bootstrap"
    """What a failure by time limit is: ``bootstrap`` a cut, what follows has a value; ``end`` the end of the task."""

    def rewards(self) -> Rewards:
        """Raises ConfigError where a setting is out of its range."""
        return Rewards(self.reward, self.discount, self.reward_scale, self.step_cost, self.failure_cost, self.timeouts)


class RewardWatch:
    """Notices rewards from which nothing can be learnt. Everything it says follows from reduced stats, so all ranks say the
    same; a resumed run begins to watch anew.

    Args:
        rewards: Whose ``stats`` it sees.
        any_size: The algorithm brings returns to one size itself; what they are is all the same.

    Attributes:
        advice: One sentence for ``Algorithm.advice``; "" where rewards look as they should, or too few batches were seen.
    """

    MIN_UPDATES, MEMORY = 20, 0.99  # batches seen before anything is said; weight of the past, of each further one
    LARGE, SMALL = 1e3, 1e-2  # root mean square of returns outside of which critics learn badly

    def __init__(self, rewards: Rewards, any_size: bool = False) -> None:
        self.advice = ""
        self._rewards, self._any_size, self._updates = rewards, any_size, 0
        self._sums: dict[str, float] = {}

    def see(self, stats: Mapping[str, float]) -> None:
        """The stats of a step, reduced, among them those of ``Rewards.stats``."""
        known, success, failure = (stats[name] for name in ("return_known", "known_success", "known_failure"))
        seen = {name: stats[name] for name in ("reward_mean", "reward_square", "ended")}
        seen |= {"known": known, "success": success, "failure": failure, "square": known * stats["return_square"]}
        seen |= {"of_success": success * stats["return_success"], "of_failure": failure * stats["return_failure"]}
        for name, value in seen.items():
            self._sums[name] = self.MEMORY * self._sums.get(name, 0.0) + value
        self._updates += 1
        if self._updates >= self.MIN_UPDATES:
            self.advice = self._look()

    def _look(self) -> str:
        sums, kind = self._sums, self._rewards.kind
        if not sums["known"]:
            judged = "" if kind == "environment" else " and was judged a success or a failure"
            return f"no episode has ended{judged}: no return is known yet, `fleet data list` shows outcomes and who judged"
        if kind == "environment":
            if not sums["reward_square"] and not sums["square"]:
                return "all rewards of the robots are 0: have them send next.reward, or learn with reward 'success'"
            weight = (1 - self.MEMORY**self._updates) / (1 - self.MEMORY)
            mean, square = sums["reward_mean"] / weight, sums["reward_square"] / weight
            if square - mean**2 <= 1e-6 * square and not (mean < 0 and sums["ended"]):
                what = "no episode ends by itself" if mean < 0 else "longer episodes are always better"
                return f"every reward is {mean:.2g} and {what}: nothing tells good steps from bad ones; see reward 'success'"
        elif not sums["success"]:
            return "no successful episode yet: values can say only what is bad; demonstrations or corrections bring successes"
        elif not sums["failure"]:
            return "no failed episode yet: values have nothing to tell successes from"
        if sums["success"] and sums["failure"] and self._upside_down():
            return (
                "failed episodes have higher returns than successful ones: the sign of the rewards is wrong, or the judgement"
            )
        size = math.sqrt(sums["square"] / sums["known"])
        if not self._any_size and (size > self.LARGE or 0 < size < self.SMALL):
            ten = round(math.log10(size))
            return f"returns are of the size of 1e{ten}: critics learn well from 0.1 to 100; multiply reward_scale by 1e{-ten}"
        return ""

    def _upside_down(self) -> bool:
        sums = self._sums
        return sums["of_failure"] / sums["failure"] > sums["of_success"] / sums["success"]


def _last_BH(batch: Batch) -> Tensor:
    """The place of the step that a finished episode ends with, where a window reaches so far."""
    position_BH = torch.arange(batch.mask_BH.shape[1], device=batch.mask_BH.device).expand_as(batch.mask_BH)
    return position_BH == (batch.steps_to_go_B - 1)[:, None]
