"""What a robot author writes: a Robot, and who may take over from the policy: an Operator.

The control loop of ``actors/loop.py`` calls them like this:

    obs = robot.reset(task, seed)
    while not done:
        proposed = the policy's action for this frame        # None while the first chunk is late
        takeover = operator.poll(obs, proposed)              # None: the policy acts
        feedback = robot.send(takeover.action if takeover else proposed)
        obs = robot.observe()
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from fleet.spec import RobotSpec

Observation = Mapping[str, np.ndarray]


class Source(enum.IntEnum):
    """Who acted in a step. The numbers are what is recorded."""

    POLICY = 0
    OPERATOR = 1
    SCRIPT = 2  # a defined fallback: hold
    DEMO = 3


SOURCE_NAMES = tuple(source.name.lower() for source in Source)
"""As people read and write them, by number."""


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What came of one action.

    Args:
        action: The action actually sent after the robot's own clipping, float32 (A,).
        reward: Reward of this step, 0 where the robot has none.
        terminated: The task ended (success or failure), no further step has a value.
        truncated: The episode was cut (time limit); the value of what follows is not zero.
        success: True/False when the robot itself can judge, None when somebody else must.
    """

    action: np.ndarray
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None


class Robot(Protocol):
    """One robot or simulator. Called from the control process only.

    A simulator's class says ``simulated = True``: releases are tested on such robots only.
    """

    spec: RobotSpec

    def reset(self, task: str, seed: int | None) -> Observation:
        """Starts an episode of ``task``; the same seed gives the same start where the robot can do that.

        Raises:
            RobotError: The task is unknown, or the robot cannot be brought to a start.
        """
        ...

    def observe(self) -> Observation:
        """The newest observation, one array for each ``observation.*`` feature of the spec."""
        ...

    def send(self, action: np.ndarray) -> Feedback:
        """Executes one action, float32 (A,), within the spec's bounds. Must not wait for anything but the robot."""
        ...

    def hold(self) -> np.ndarray:
        """The action that keeps the robot where it is, float32 (A,). Sent when no policy action is there in time."""
        ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Takeover:
    """The operator's action for this tick, float32 (A,), and who it is."""

    action: np.ndarray
    operator_id: str


class Operator(Protocol):
    """Somebody who may take over. Polled each tick in the control process; must answer at once."""

    def reset(self, task: str, seed: int | None) -> None:
        """A new episode begins."""
        ...

    def poll(self, obs: Observation, proposed: np.ndarray | None) -> Takeover | None:
        """The operator's action while in control, else None. Never sees a reward.

        Args:
            obs: What the robot measures now.
            proposed: What the policy would do now, float32 (A,); None when it has nothing to propose.
        """
        ...
