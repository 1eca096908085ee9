"""Robots that an evaluation has to cope with, all of them the toy robot with one difference."""

import dataclasses
import time

import numpy as np

from actors.robots.toy import ToyRobot


class Slow(ToyRobot):
    def send(self, action):
        time.sleep(0.002)
        return super().send(action)


class Endless(ToyRobot):
    """Never ends an episode by itself, and never succeeds."""

    def send(self, action):
        return dataclasses.replace(super().send(action), terminated=False, truncated=False, success=False)


class Unseeded(ToyRobot):
    def reset(self, task, seed):
        return super().reset(task, int(np.random.default_rng().integers(1 << 30)))


class Speechless(ToyRobot):
    """Cannot judge success."""

    def send(self, action):
        return dataclasses.replace(super().send(action), success=None)


class Unmarked(ToyRobot):
    """Might be anything: it does not say that it is simulated, and must not even be built."""

    simulated = False

    def __init__(self, **settings):
        raise AssertionError("a robot that may be real was started")
