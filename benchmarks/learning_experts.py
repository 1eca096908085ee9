"""Experts that are worse than they could be: what a tired or unpractised demonstrator gives. Named in run files as
``operator.settings.expert``."""

from __future__ import annotations

import zlib

import numpy as np

from actors.operators.experts import MetaWorldExpert
from fleet.robot import Observation
from fleet.spec import STATE

SLOWEST, FASTEST = 0.4, 1.0  # of the expert's own speed; drawn anew for each episode
NOISE, PERSISTENCE = 0.25, 0.8  # of the error on the gripper's motion: its deviation in the action's unit, its correlation


class ImperfectExpert:
    """Meta-World's scripted policy with its motion slowed by a factor of the episode, and with an error that lasts for some
    ticks (an AR(1) process). The fingers are as the expert's. Factor and errors are a function of what it sees first.

    Implements ``actors.operators.experts.Expert``.
    """

    def __init__(self) -> None:
        self._expert = MetaWorldExpert()
        self._rng: np.random.Generator | None = None
        self._speed, self._error = 1.0, np.zeros(3)

    def reset(self, task: str) -> None:
        self._expert.reset(task)
        self._rng = None

    def action(self, obs: Observation) -> np.ndarray:
        if self._rng is None:
            self._rng = np.random.default_rng(zlib.crc32(obs[STATE].tobytes()))
            self._speed, self._error = self._rng.uniform(SLOWEST, FASTEST), np.zeros(3)
        action = self._expert.action(obs)
        drawn = self._rng.normal(0.0, NOISE * np.sqrt(1 - PERSISTENCE**2), 3)
        self._error = PERSISTENCE * self._error + drawn
        action[:3] = np.clip(self._speed * action[:3] + self._error, -1.0, 1.0)
        return action
