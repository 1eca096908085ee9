"""Robot adapters. To add one, write a class that follows ``fleet.robot.Robot`` and name it in ``ROBOTS``.

An adapter's constructor takes plain keyword data, so that a run file can hold it:

    robot: {adapter: metaworld, control_hz: 20, max_steps: 200, images: 0}
"""

from __future__ import annotations

from typing import Any

from fleet.errors import RobotError
from fleet.lookup import check_settings, resolve
from fleet.robot import Robot

ROBOTS = {
    "gym": "actors.robots.gym:GymRobot",
    "metaworld": "actors.robots.metaworld:MetaWorldRobot",
    "toy": "actors.robots.toy:ToyRobot",
}
_EXTRAS = {"gym": "sim", "metaworld": "sim"}


def make_robot(adapter: str, **settings: Any) -> Robot:
    """Builds a robot: ``adapter`` is a key of ``ROBOTS`` or "module:Class", ``settings`` its constructor's arguments.

    Raises:
        RobotError: Unknown adapter or setting, a package that is not installed, or what the adapter itself refuses.
    """
    cls = resolve(ROBOTS, adapter, kind="robot adapter", error=RobotError, extras=_EXTRAS)
    check_settings(cls, settings, kind=f"robot adapter {adapter!r}", error=RobotError)
    robot: Robot = cls(**settings)
    return robot
