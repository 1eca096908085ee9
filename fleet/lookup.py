"""Dicts of strings, resolved at use: ``{"toy": "actors.robots.toy:ToyRobot"}``.

A name is looked up only when somebody asks for it, so that listing what exists imports nothing.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from fleet.errors import FleetError


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence for a remedy: the known name closest to ``name``, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = ", ".join(names[:60])
    return f"did you mean {close[0]!r}? known: {listing}" if close else f"known: {listing}"


def resolve(
    table: Mapping[str, str], name: str, *, kind: str, error: type[FleetError], extras: Mapping[str, str] | None = None
) -> Any:
    """The object that ``table[name]`` names as "module:attribute"; ``name`` may also be such a path itself.

    Args:
        kind: What is looked up, for the message: "robot adapter".
        error: Class to raise.
        extras: Extra of the installation that holds the packages of a name.

    Raises:
        FleetError: Of class ``error``: the name is unknown, or a package that it needs is not installed.
    """
    path = table.get(name, name)
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise error(
            f"{kind} {name!r} is unknown", rule="a known name, or module:Class of your own", remedy=nearest(name, table)
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        extra = (extras or {}).get(name)
        raise error(
            f"{kind} {name!r} needs the package {missing.name!r}, which is not installed",
            rule=f"{path} must be importable",
            remedy=f"pip install 'fleet-rl[{extra}]'" if extra else f"install {missing.name!r} beside this package",
        ) from missing
    if not hasattr(module, attribute):
        raise error(f"{kind} {name!r}: {module_name} has no {attribute!r}", rule="a known name, or module:Class of your own")
    return getattr(module, attribute)


def check_settings(cls: Any, settings: Mapping[str, Any], *, kind: str, error: type[FleetError]) -> None:
    """Raises ``error`` when a setting is no argument of ``cls``, or a required argument is missing."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in settings:
        if name not in parameters:
            raise error(f"setting {name!r} = {settings[name]!r} of {kind} is unknown", remedy=nearest(name, parameters))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in settings and parameter.kind is not parameter.VAR_POSITIONAL:
            raise error(f"setting {name!r} of {kind} is missing", rule="it has no default", remedy=f"give {name}=...")
