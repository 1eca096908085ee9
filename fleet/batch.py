"""What an algorithm asks of the sampler, and what it gets: windows of steps as plain arrays.

Shape suffixes: B batch, H actions in a window, A action dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from fleet.robot import Source


@dataclasses.dataclass(frozen=True)
class BatchNeeds:
    """What an algorithm asks of the sampler.

    Args:
        batch_size: B.
        horizon: H, actions in a window.
        observations: Names of the observation features at the window's first step.
        shares: Fraction of the batch by group of sources, for example ``{(Source.DEMO,): 0.5, (Source.OPERATOR,): 0.5}``.
            A group without data gives its share to the others.
    """

    batch_size: int
    horizon: int
    observations: tuple[str, ...]
    shares: Mapping[tuple[Source, ...], float]


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
