"""Scripted experts: what a stand-in for a human would do next. They see what the robot measures, never a reward."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np

from fleet.errors import RobotError
from fleet.lookup import nearest, resolve
from fleet.robot import Observation
from fleet.spec import STATE

EXPERTS = {
    "metaworld": "actors.operators.experts:MetaWorldExpert",
    "toy": "actors.robots.toy:ToyExpert",
}
_EXTRAS = {"metaworld": "sim"}


class Expert(Protocol):
    """``reset`` at each episode's start, then ``action`` each tick: float32 (A,), within the robot's bounds."""

    def reset(self, task: str) -> None: ...

    def action(self, obs: Observation) -> np.ndarray: ...


def make_expert(name: str) -> Expert:
    """``name`` is a key of ``EXPERTS`` or "module:Class".

    Raises:
        RobotError: Unknown name, or a package that is not installed.
    """
    expert: Expert = resolve(EXPERTS, name, kind="expert", error=RobotError, extras=_EXTRAS)()
    return expert


class MetaWorldExpert:
    """Meta-World's scripted policies. Reads ``observation.state`` (39,), answers (4,) clipped to [-1, 1]."""

    def __init__(self) -> None:
        self._policies: dict[str, Any] = {}
        self._policy: Any = None

    def reset(self, task: str) -> None:
        if task not in self._policies:
            from metaworld.policies import ENV_POLICY_MAP

            if task not in ENV_POLICY_MAP:
                raise RobotError(f"Meta-World has no expert for {task!r}", remedy=nearest(task, ENV_POLICY_MAP))
            # They answer beyond [-1, 1] on purpose, and metaworld warns of it at each first time.
            warnings.filterwarnings("ignore", "Constant\\(s\\) may be too high", UserWarning)
            self._policies[task] = ENV_POLICY_MAP[task]()
        self._policy = self._policies[task]

    def action(self, obs: Observation) -> np.ndarray:
        raw = self._policy.get_action(obs[STATE].astype(np.float64))
        clipped: np.ndarray = np.clip(raw, -1.0, 1.0).astype(np.float32)
        return clipped
