"""What an algorithm asks of the sampler, and what it gets: windows of steps as plain arrays.

A window stands at a step t of an episode and has the H actions from t on, observations at stated offsets from t, and
what became of the episode. Where a window reaches over its border (``Within``), the last valid step inside of the
border is repeated and the mask is False.

Shape suffixes: B batch, H actions in a window, A action dims.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping

import numpy as np

from fleet.errors import ConfigError
from fleet.robot import Source


class Outcome(enum.IntEnum):
    """How an episode ended. OPEN: it still goes on, or its end was lost."""

    OPEN = -1
    FAILURE = 0
    SUCCESS = 1
    UNKNOWN = 2
    ABORTED = 3


class Within(enum.Enum):
    """What a window does not reach over: a takeover or hand-back, the episode's end, or the robot's boot.

    With BOOT a window goes on into the robot's next episode; the mask is False there, the values are real.
    """

    SOURCE = "source"
    EPISODE = "episode"
    BOOT = "boot"


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which steps may be drawn. An empty tuple allows all. Episodes that were excluded by a label are never drawn.

    Args:
        tasks, robots: Names.
        outcomes: Of the step's episode, by its newest label.
        outcomes_of: Sources whose steps ``outcomes`` speak of; those of others pass them. Empty: all.
        before_takeover: The policy's steps that an operator's follows within so many steps of the episode, as far as the
            log has them, are not drawn.
        max_version_age: Newest release minus the version behind the step, at most this. Steps without a version
            (demonstrations, an operator who acts while no policy runs) pass.

    Raises:
        ConfigError: ``before_takeover`` is negative.
    """

    tasks: tuple[str, ...] = ()
    robots: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    outcomes_of: tuple[Source, ...] = ()
    before_takeover: int = 0
    max_version_age: int | None = None

    def __post_init__(self) -> None:
        if self.before_takeover < 0:
            raise ConfigError(f"a filter with before_takeover = {self.before_takeover}", rule="at least 0")


@dataclasses.dataclass(frozen=True)
class Priority:
    """Steps are drawn in proportion to score ** alpha; ``Windows.weight_B`` corrects for it with exponent beta
    (prioritized experience replay, arXiv 1511.05952 eq. 1 and section 3.4). A new step has the highest score so far.

    Raises:
        ConfigError: alpha or beta is negative or not finite.
    """

    alpha: float = 0.6
    beta: float = 0.4

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.beta < math.inf):
            raise ConfigError(f"a priority with alpha {self.alpha}, beta {self.beta}", rule="both are finite and not negative")


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """SOP's mixture (arXiv 2601.03044): within each task the online share is exp(a l_on) / (exp(a l_on) + exp(l_off)),
    clipped, from the mean losses of the last ``window`` batches.

    Args:
        online, offline: Groups of sources.
        alpha: a > 1 favours online data.
        window: Mean losses that are averaged, by task and side.
        low, high: Clip range of the online share; before both sides have a loss it is one half.

    Raises:
        ConfigError: A value is out of its range, or a source is on both sides.
    """

    online: tuple[Source, ...] = (Source.POLICY, Source.OPERATOR)
    offline: tuple[Source, ...] = (Source.DEMO, Source.SCRIPT)
    alpha: float = 1.5
    window: int = 200
    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        if not (0 < self.alpha < math.inf and self.window >= 1 and 0 <= self.low <= self.high <= 1):
            raise ConfigError(
                f"a mixture with alpha {self.alpha}, window {self.window}, clip range {self.low} to {self.high}",
                rule="alpha > 0, window >= 1, 0 <= low <= high <= 1",
            )
        both = sorted(source.name.lower() for source in set(self.online) & set(self.offline))
        if both:
            raise ConfigError(f"a mixture with {both} online and offline", rule="a source is on one side at most")


@dataclasses.dataclass(frozen=True)
class BatchNeeds:
    """What an algorithm asks of the sampler.

    Args:
        batch_size: B.
        horizon: H, actions in a window.
        observations: Names of the observation features.
        shares: Fraction of the batch by group of sources, for example ``{(Source.DEMO,): 0.5, (Source.OPERATOR,): 0.5}``.
            A group without data gives its share to the others. Not used where ``adaptive`` is given.
        offsets: Where observations are read, in steps from t: ``(-2, -1, 0)`` is a history of three, ``(0, 16)`` looks
            ahead. Must contain 0.
        within: What a window does not reach over.
        takeover_within: ``Windows.takeover_in_B`` looks so many steps ahead; 0: not at all.
        by_task: Within a group of sources each task that has data weighs the same (SOP's 1/M); False: each step.
            With ``adaptive`` each task weighs the same in any case.
        filter: Which steps may be drawn.
        priority: Draw by a score that the learner gives; None: all steps alike.
        adaptive: Let losses choose the shares; None: ``shares``.
        discount: Of ``Windows.return_B``, in (0, 1].
        replay: Columns of the chunk behind step t, by their names in the chunks table (``log_prob_T``, ``replay.*``).
        cached_share: Chance in [0, 1) that a window is drawn among steps whose images lie decoded in memory. Within each
            task and group of sources this moves the distribution by at most as much (total variation).

    Raises:
        ConfigError: A value is out of its range.
    """

    batch_size: int
    horizon: int
    observations: tuple[str, ...]
    shares: Mapping[tuple[Source, ...], float]
    offsets: tuple[int, ...] = (0,)
    within: Within = Within.SOURCE
    takeover_within: int = 0
    by_task: bool = True
    filter: Filter = Filter()
    priority: Priority | None = None
    adaptive: Adaptive | None = None
    discount: float = 1.0
    replay: tuple[str, ...] = ()
    cached_share: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            "batch_size": (self.batch_size, self.batch_size >= 1, "at least 1"),
            "horizon": (self.horizon, self.horizon >= 1, "at least 1"),
            "shares": (
                dict(self.shares),
                all(share >= 0 for share in self.shares.values()) and (self.adaptive or sum(self.shares.values()) > 0),
                "none is negative, one is above 0",
            ),
            "offsets": (
                self.offsets,
                0 in self.offsets and len(set(self.offsets)) == len(self.offsets),
                "0 and others, once each",
            ),
            "takeover_within": (self.takeover_within, self.takeover_within >= 0, "at least 0"),
            "discount": (self.discount, 0 < self.discount <= 1, "in (0, 1]"),
            "cached_share": (self.cached_share, 0 <= self.cached_share < 1, "in [0, 1)"),
        }
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"a batch with {name} = {value!r}", rule=rule)


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows of each batch a process makes, where several (ranks) share one update. Ranks of one shard of the buffer
    stand next to each other.

    Args:
        rank: Of this process, from 0.
        shards: Number of the shard that each rank reads, ascending from 0.

    Raises:
        ConfigError: ``rank`` is none of them, or shards are not in order.
    """

    rank: int = 0
    shards: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        steps = [b - a for a, b in zip((0, *self.shards), self.shards, strict=False)]
        if not 0 <= self.rank < len(self.shards) or self.shards[0] != 0 or not set(steps) <= {0, 1}:
            raise ConfigError(f"rank {self.rank} with shards {self.shards}", rule="shards ascend from 0 without gaps")

    @property
    def shard(self) -> int:
        """The shard that this rank reads."""
        return self.shards[self.rank]

    @property
    def num_shards(self) -> int:
        return self.shards[-1] + 1

    def rows(self, batch_size: int) -> range:
        """This rank's rows of a batch of all ranks; sizes of two ranks differ by one at most."""
        return range(self._edge(self.rank, batch_size), self._edge(self.rank + 1, batch_size))

    def shard_rows(self, batch_size: int) -> range:
        """The rows of all ranks of this shard."""
        first = self.shards.index(self.shard)
        end = first + self.shards.count(self.shard)
        return range(self._edge(first, batch_size), self._edge(end, batch_size))

    def _edge(self, rank: int, batch_size: int) -> int:
        return rank * batch_size // len(self.shards)


WHOLE = Split()  # one rank makes every row


@dataclasses.dataclass
class Windows:
    """A batch of windows, a copy that the caller owns.

    obs: feature name -> (B, ...) at t. obs_at: offset -> the same at t + offset, for offsets other than 0;
    inside_at: offset -> (B,), False where that step lies beyond the border and the last one inside is repeated.
    actions_BHA: executed actions, float32. rewards_BH: next.reward, 0 where masked. terminated_BH, truncated_BH: False
    where masked. mask_BH: True where the step lies inside of the border.
    source_BH: fleet.robot.Source of each step; where masked, of the last one inside. source_B: the same at t.
    task_B: index into the sampler's task names. version_B: policy version behind t, -1 for none.
    step_B, episode_B: the sampler's own numbers, for feedback and grouping. frame_B: frame_index of t.
    steps_to_go_B: steps from t to the episode's end, t included; -1 while it is open. outcome_B: Outcome.
    terminated_B: True where the episode's newest step says that the task ended; False where it was cut (a time limit, an
    abort) or goes on.
    takeover_in_B: steps from t to the first operator's step of the episode at or behind t: 0 where t is one; -1 where there is
    none within ``BatchNeeds.takeover_within`` steps, or the log does not have it yet, or where that is 0.
    return_B: discounted sum of the rewards from t to the episode's end, NaN while it is open.
    weight_B: importance weights of a prioritised draw, at most 1; else ones. The largest of a shard's part of the batch is 1.
    replay: column name -> (B, ...), or (B, longest) padded with zeros for columns of lists.
    index_B: row in the batch of all ranks, int64; 0 to B - 1 where there is one rank. Randomness that belongs to a sample
    is a function of (seed, step, index).
    shard_weight: factor of this rank's loss and weight, so that several unevenly filled shards together give each source
    and task its share; 1.0 where there is one shard. Of several, ``weight_B`` times it sums up to the batch size.
    """

    obs: dict[str, np.ndarray]
    obs_at: dict[int, dict[str, np.ndarray]]
    inside_at: dict[int, np.ndarray]
    actions_BHA: np.ndarray
    rewards_BH: np.ndarray
    terminated_BH: np.ndarray
    truncated_BH: np.ndarray
    mask_BH: np.ndarray
    source_BH: np.ndarray
    source_B: np.ndarray
    task_B: np.ndarray
    version_B: np.ndarray
    step_B: np.ndarray
    episode_B: np.ndarray
    frame_B: np.ndarray
    steps_to_go_B: np.ndarray
    outcome_B: np.ndarray
    terminated_B: np.ndarray
    takeover_in_B: np.ndarray
    return_B: np.ndarray
    weight_B: np.ndarray
    replay: dict[str, np.ndarray]
    index_B: np.ndarray
    shard_weight: float
