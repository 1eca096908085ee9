"""A two-joint toy robot in numpy: deterministic, thousands of steps a second, hard enough to need a few corrections.

Each joint is driven by a velocity command that it follows with a lag. Tasks differ only in what the instruction says:
"reach" is to bring both joints to the target, "mirror" to its mirror image through the origin.
"""

from __future__ import annotations

import math

import numpy as np

from fleet.errors import RobotError
from fleet.lookup import nearest
from fleet.robot import Feedback, Observation
from fleet.spec import ACTION, IMAGE_PREFIX, STATE, Feature, RobotSpec

TASKS = {"reach": 1.0, "mirror": -1.0}  # goal = sign * target
MAX_SPEED = 2.0  # rad/s at action 1
LAG = 0.5  # share of the old velocity that is left after a tick
TOLERANCE = 0.06  # rad, of each joint
IMAGE = IMAGE_PREFIX + "top"


class ToyRobot:
    """Implements ``fleet.robot.Robot``. State (6,): joint angles (rad), velocities (rad/s), target angles (rad).

    Args:
        control_hz: Ticks per second; a tick advances the joints by 1 / control_hz.
        max_steps: Steps after which an episode is truncated.
        images: Side in pixels of an image that shows tip and target, 0 for none.
        codec: How images are stored: "raw" or "jpeg".
    """

    simulated = True

    def __init__(self, *, control_hz: float = 20.0, max_steps: int = 60, images: int = 0, codec: str = "raw") -> None:
        if max_steps < 1 or not 0 <= images <= 512:
            raise RobotError(f"max_steps is {max_steps}, images is {images}", rule="max_steps at least 1, images 0 to 512")
        features = {STATE: Feature("float32", (6,)), ACTION: Feature("float32", (2,), "", -1.0, 1.0)}
        if images:
            features[IMAGE] = Feature("uint8", (images, images, 3), codec=codec)
        self.spec = RobotSpec("toy_two_joint", control_hz, features)
        self._max_steps, self._images = max_steps, images
        self._angles, self._speeds, self._target = np.zeros(2), np.zeros(2), np.zeros(2)
        self._sign = 0.0
        self._num_steps = 0

    def reset(self, task: str, seed: int | None) -> Observation:
        """Draws start and target; the same seed gives the same ones."""
        if task not in TASKS:
            raise RobotError(f"the toy robot has no task {task!r}", remedy=nearest(task, TASKS))
        rng = np.random.default_rng(seed)
        self._angles, self._speeds = rng.uniform(-0.3, 0.3, 2), np.zeros(2)
        # At least 0.5 rad from the origin in each joint: no start is a success.
        self._target = rng.uniform(0.5, 1.2, 2) * rng.choice([-1.0, 1.0], 2)
        self._sign, self._num_steps = TASKS[task], 0
        return self.observe()

    def observe(self) -> Observation:
        state = np.concatenate([self._angles, self._speeds, self._target]).astype(np.float32)
        return {STATE: state, IMAGE: self._draw()} if self._images else {STATE: state}

    def send(self, action: np.ndarray) -> Feedback:
        """One tick. ``action`` (2,) is clipped to [-1, 1]; the reward is 1 on success, else 0.

        Raises:
            RobotError: Before the first reset.
        """
        if not self._sign:
            raise RobotError("send before reset", rule="reset starts an episode")
        sent = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        self._speeds = LAG * self._speeds + (1 - LAG) * MAX_SPEED * sent
        self._angles = self._angles + self._speeds / self.spec.control_hz
        self._num_steps += 1
        success = bool(np.abs(self._angles - self._sign * self._target).max() < TOLERANCE)
        cut = self._num_steps >= self._max_steps and not success
        return Feedback(sent, float(success), terminated=success, truncated=cut, success=success)

    def hold(self) -> np.ndarray:
        return np.zeros(2, np.float32)

    def close(self) -> None:
        self._sign = 0.0

    def _draw(self) -> np.ndarray:
        """Arm tip in red, target's tip in green, on black."""
        size = self._images
        image = np.zeros((size, size, 3), np.uint8)
        dot = max(1, size // 16)
        for channel, angles in ((0, self._angles), (1, self._target)):
            x = math.cos(angles[0]) + math.cos(angles[0] + angles[1])
            y = math.sin(angles[0]) + math.sin(angles[0] + angles[1])
            column, row = (int((v + 2.0) / 4.0 * (size - 1)) for v in (x, -y))
            image[max(0, row - dot) : row + dot + 1, max(0, column - dot) : column + dot + 1, channel] = 255
        return image


class ToyExpert:
    """Implements ``actors.operators.experts.Expert``: drives each joint towards its goal in proportion to the distance."""

    def __init__(self) -> None:
        self._sign = 1.0

    def reset(self, task: str) -> None:
        if task not in TASKS:
            raise RobotError(f"the toy expert has no task {task!r}", remedy=nearest(task, TASKS))
        self._sign = TASKS[task]

    def action(self, obs: Observation) -> np.ndarray:
        state = obs[STATE]
        action: np.ndarray = np.clip(3.0 * (self._sign * state[4:] - state[:2]) - 0.3 * state[2:4], -1.0, 1.0)
        return action.astype(np.float32)
