"""What an algorithm asks of the sampler, and what it gets: windows of steps as plain arrays.

A window stands at a step t of an episode and has the H actions from t on, observations at stated offsets from t, and
what became of the episode. Where a window reaches over its border (``Within``), the last valid step inside of the
border is repeated and the mask is False.

Shape suffixes: B batch, H actions in a window, A action dims.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import numpy as np

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
        max_version_age: Newest release minus the version behind the step, at most this. Steps without a version
            (demonstrations, an operator who acts while no policy runs) pass.
    """

    tasks: tuple[str, ...] = ()
    robots: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    max_version_age: int | None = None


@dataclasses.dataclass(frozen=True)
class Priority:
    """Steps are drawn in proportion to score ** alpha; ``Windows.weight_B`` corrects for it with exponent beta
    (prioritized experience replay, arXiv 1511.05952 eq. 1 and section 3.4). A new step has the highest score so far."""

    alpha: float = 0.6
    beta: float = 0.4


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """SOP's mixture (arXiv 2601.03044): within each task the online share is exp(a l_on) / (exp(a l_on) + exp(l_off)),
    clipped, from the mean losses of the last ``window`` batches.

    Args:
        online, offline: Groups of sources.
        alpha: a > 1 favours online data.
        window: Mean losses that are averaged, by task and side.
        low, high: Clip range of the online share; before both sides have a loss it is one half.
    """

    online: tuple[Source, ...] = (Source.POLICY, Source.OPERATOR)
    offline: tuple[Source, ...] = (Source.DEMO, Source.SCRIPT)
    alpha: float = 1.5
    window: int = 200
    low: float = 0.2
    high: float = 0.8


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
        by_task: Within a group of sources each task that has data weighs the same (SOP's 1/M); False: each step.
        filter: Which steps may be drawn.
        priority: Draw by a score that the learner gives; None: all steps alike.
        adaptive: Let losses choose the shares; None: ``shares``.
        discount: Of ``Windows.return_B``, in (0, 1].
        replay: Columns of the chunk behind step t, by their names in the chunks table (``log_prob_T``, ``replay.*``).
    """

    batch_size: int
    horizon: int
    observations: tuple[str, ...]
    shares: Mapping[tuple[Source, ...], float]
    offsets: tuple[int, ...] = (0,)
    within: Within = Within.SOURCE
    by_task: bool = True
    filter: Filter = Filter()
    priority: Priority | None = None
    adaptive: Adaptive | None = None
    discount: float = 1.0
    replay: tuple[str, ...] = ()


@dataclasses.dataclass
class Windows:
    """A batch of windows.

    obs: feature name -> (B, ...). actions_BHA: executed actions, float32. mask_BH: True where the action belongs to
    the window: same episode, same source as the first step, no takeover in between. source_B: fleet.robot.Source.
    task_B: index into the sampler's task names. version_B: policy version behind the first step, -1 for none.
    """

    obs: dict[str, np.ndarray]
    actions_BHA: np.ndarray
    mask_BH: np.ndarray
    source_B: np.ndarray
    task_B: np.ndarray
    version_B: np.ndarray
