"""What stands between a proposed action and the motors: finite, within bounds, not too sudden."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from fleet.spec import RobotSpec


@dataclasses.dataclass
class SafetyConfig:
    max_delta: float = 0.0
    """Largest change of any action element from one tick to the next, in the action's unit; 0 = unbounded."""


class SafetyFilter:
    """Filters every action, whoever proposed it. Counts what it changed."""

    def __init__(self, spec: RobotSpec, config: SafetyConfig) -> None:
        self._action, self._config = spec.action, config
        self._last: np.ndarray | None = None
        self.num_clipped, self.num_not_finite = 0, 0

    def reset(self) -> None:
        self._last = None

    def __call__(self, action: np.ndarray, hold: np.ndarray) -> tuple[np.ndarray, bool]:
        """The action to send, float32 (A,), and whether ``action`` was usable at all: one that is not finite or has
        another shape is replaced by ``hold``."""
        action = np.asarray(action, np.float32)
        usable = action.shape == self._action.shape and bool(np.isfinite(action).all())
        if not usable:
            self.num_not_finite += 1
            action = hold
        safe = np.clip(action, self._action.low, self._action.high) if self._bounded else action
        if self._config.max_delta > 0 and self._last is not None:
            safe = np.clip(safe, self._last - self._config.max_delta, self._last + self._config.max_delta)
        self.num_clipped += usable and not np.array_equal(safe, action)
        self._last = np.asarray(safe, np.float32)
        return self._last, usable

    def ahead(self, actions_DA: np.ndarray) -> np.ndarray:
        """(D, A): what these actions would become, one after the other, if they came next."""
        twin = copy.copy(self)
        return np.array([twin(action, action)[0] for action in actions_DA], np.float32)

    @property
    def _bounded(self) -> bool:
        return self._action.low is not None or self._action.high is not None
