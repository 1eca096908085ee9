"""Operator adapters. To add one, write a class that follows ``fleet.robot.Operator`` and name it in ``OPERATORS``."""

from __future__ import annotations

from typing import Any

from fleet.errors import RobotError
from fleet.lookup import check_settings, resolve
from fleet.robot import Operator

OPERATORS = {
    "scripted": "actors.operators.scripted:ScriptedOperator",
}


def make_operator(adapter: str, **settings: Any) -> Operator:
    """Builds an operator: ``adapter`` is a key of ``OPERATORS`` or "module:Class", ``settings`` its constructor's arguments.

    Raises:
        RobotError: Unknown adapter or setting, a package that is not installed, or what the adapter itself refuses.
    """
    cls = resolve(OPERATORS, adapter, kind="operator adapter", error=RobotError)
    check_settings(cls, settings, kind=f"operator adapter {adapter!r}", error=RobotError)
    operator: Operator = cls(**settings)
    return operator
