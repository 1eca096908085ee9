"""A classifier of success: whether an episode that ends in a state has done its task.

    logit(o, l) by binary cross-entropy: 1 in the last k steps of successful episodes, 0 before them and in failures
    score of an episode = mean logit of its last k steps;  p = sigmoid(score / T)

T comes from held-out episodes (temperature scaling, arXiv 1706.04599, with Platt's targets, so that it stays finite where the
held-out episodes are told apart without a mistake). An episode is called a success above one threshold and a failure below
another; between both nobody knows. The thresholds are order statistics of held-out scores. Above the (j + 1)-th highest score
of n failures lie, with the stated confidence, at most u(j, n) of all failures, u the Clopper-Pearson bound of j in n: the share
that lies above is Beta(j + 1, n - j) distributed. So the bound holds although the threshold was chosen on the very episodes
that it is computed from.

Left out: a sequence model (what cannot be seen in the last k observations cannot be judged), and thresholds by task.

Shape suffixes: B batch, E episodes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.policies.statistics import Statistics
from algorithms.values import build_value
from fleet.errors import ConfigError, NoData

MAX_TEMPERATURE = 100.0  # and the least is one over it


@dataclasses.dataclass
class SuccessConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes; cameras too."""
    instruction_dim: int
    """Size of obs["instruction"]; 0 for one task."""
    last: int = 5
    """k, steps at the end of an episode by which it is judged."""
    width: int = 256
    """Units of each hidden layer."""
    num_layers: int = 2
    """Hidden layers."""
    vision: str = "cnn"
    """How cameras are seen, see ``algorithms.policies.vision``."""


class SuccessClassifier(nn.Module):
    """See the header.

    Raises:
        PolicyError: A setting is out of its range.
    """

    Config = SuccessConfig

    def __init__(self, config: SuccessConfig) -> None:
        super().__init__()
        if config.last < 1:
            raise ConfigError(f"a classifier of the last {config.last} steps", rule="at least 1")
        fields = {name: getattr(config, name) for name in ("reads", "instruction_dim", "width", "num_layers", "vision")}
        self.config, self.value = config, build_value({**fields, "num_bins": 1})

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one of a vector is missing, of another shape, or not finite."""
        self.value.set_statistics(statistics)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Logits (B,) in float32, before the temperature."""
        logit_B: Tensor = self.value(obs)
        return logit_B

    def loss(self, obs: Mapping[str, Tensor], success_B: Tensor) -> Tensor:
        """Mean binary cross-entropy; ``success_B`` bool."""
        return functional.binary_cross_entropy_with_logits(self(obs), success_B.float())


def episode_scores(logit_B: Tensor, episode_B: Tensor, num_episodes: int) -> Tensor:
    """(E,) float64: mean logit of the rows of each episode; NaN where it has none. ``episode_B``: 0 to E - 1."""
    sums_E = torch.zeros(num_episodes, dtype=torch.float64).index_add_(0, episode_B, logit_B.double())
    return sums_E / torch.bincount(episode_B, minlength=num_episodes)


def fit_temperature(score_E: Tensor, success_E: Tensor) -> float:
    """T > 0 for which sigmoid(score / T) has the least cross-entropy on these episodes.

    The targets are Platt's, (n + 1) / (n + 2) and 1 / (n + 2) with n of each side: of few episodes without a mistake nobody is
    certain.
    """
    score_E, success_E = score_E.double(), success_E.bool()
    num_success, num_failure = success_E.sum().item(), (~success_E).sum().item()
    target_E = torch.where(success_E, (num_success + 1) / (num_success + 2), 1 / (num_failure + 2)).double()

    def cross_entropy(log_temperature: float) -> float:
        return functional.binary_cross_entropy_with_logits(score_E / math.exp(log_temperature), target_E).item()

    low, high = -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # convex in 1 / T, so it has one valley
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if cross_entropy(left) < cross_entropy(right) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(p_E: Tensor, success_E: Tensor, num_bins: int = 10) -> float:
    """Expected calibration error: mean over episodes of |share of successes - mean p| of the bin that their p lies in."""
    bin_E = (p_E * num_bins).long().clamp(0, num_bins - 1)
    gap_E = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bin_E, success_E.double() - p_E.double())
    return (gap_E.abs().sum() / len(p_E)).item()


@dataclasses.dataclass(frozen=True)
class ErrorRate:
    """Mistakes among held-out episodes of one kind. ``at_most``: the rate's upper bound with ``confidence``; 1.0 of none."""

    mistakes: int
    episodes: int
    confidence: float

    @property
    def at_most(self) -> float:
        return upper_bound(self.mistakes, self.episodes, self.confidence)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Scores above ``success_above`` are successes, those below ``failure_below`` failures, the rest is not judged."""

    success_above: float
    failure_below: float

    def judge(self, score_E: Tensor) -> Tensor:
        """(E,) int64: 1 success, 0 failure, -1 not judged; -1 where the score is NaN."""
        above_E, below_E = score_E > self.success_above, score_E < self.failure_below
        return torch.where(above_E, 1, torch.where(below_E, 0, -1))

    def errors(self, score_E: Tensor, success_E: Tensor, confidence: float) -> tuple[ErrorRate, ErrorRate]:
        """Failures that pass for successes, and successes that pass for failures."""
        judged_E, success_E = self.judge(score_E), success_E.bool()
        passed, failed = (judged_E[~success_E] == 1).sum(), (judged_E[success_E] == 0).sum()
        num_success = int(success_E.sum())
        return (
            ErrorRate(int(passed), len(success_E) - num_success, confidence),
            ErrorRate(int(failed), num_success, confidence),
        )


def choose_thresholds(
    score_E: Tensor, success_E: Tensor, false_positives: float, false_negatives: float, confidence: float = 0.95
) -> Thresholds:
    """The thresholds that leave the fewest episodes unjudged while, with ``confidence``, at most these shares of failures pass
    for successes and of successes for failures. Where there are too few episodes to be so sure, a threshold lies beyond all of
    the other side; ``Thresholds.errors`` says what is sure then.

    Raises:
        ConfigError: A rate is not in (0, 1).
        NoData: One of both sides has no episode.
    """
    for name, rate in (("false_positives", false_positives), ("false_negatives", false_negatives), ("confidence", confidence)):
        if not 0 < rate < 1:
            raise ConfigError(f"{name} is {rate}", rule="above 0, below 1")
    success_E = success_E.bool()
    failed, succeeded = score_E[~success_E].sort(descending=True)[0], score_E[success_E].sort()[0]
    if not len(failed) or not len(succeeded):
        raise NoData(
            f"{len(succeeded)} successful and {len(failed)} failed episodes to choose thresholds by", rule="at least 1 of each"
        )
    success_above = failed[_mistakes_allowed(len(failed), false_positives, confidence)].item()
    failure_below = succeeded[_mistakes_allowed(len(succeeded), false_negatives, confidence)].item()
    if success_above < failure_below:  # room between both sides: split it
        success_above = failure_below = (success_above + failure_below) / 2
    return Thresholds(success_above, failure_below)


def _mistakes_allowed(num: int, rate: float, confidence: float) -> int:
    """The most mistakes among ``num`` for which the bound is at most ``rate``; 0 where even that is not sure."""
    mistakes = 0
    while mistakes + 1 < num and upper_bound(mistakes + 1, num, confidence) <= rate:
        mistakes += 1
    return mistakes


def upper_bound(mistakes: int, num: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound of a rate of which ``mistakes`` were seen in ``num``; 1.0 where nothing was tried."""
    if mistakes >= num:
        return 1.0
    low, high = mistakes / num, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(mistakes, num, middle) > 1 - confidence else (low, middle)
    return (low + high) / 2


def episodes_needed(rate: float, confidence: float = 0.95) -> int:
    """Held-out episodes without a mistake of which the bound is ``rate``."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-rate))


def _at_most(mistakes: int, num: int, rate: float) -> float:
    """Chance of at most ``mistakes`` in ``num`` at this rate, in (0, 1)."""
    if not 0 < rate < 1:
        return float(rate <= 0)
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    ways = (math.lgamma(num + 1) - math.lgamma(i + 1) - math.lgamma(num - i + 1) for i in range(mistakes + 1))
    return sum(math.exp(way + i * log_rate + (num - i) * log_rest) for i, way in enumerate(ways))
