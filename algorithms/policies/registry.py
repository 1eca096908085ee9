"""Policy families by name. A policy is built from plain data, so that a release's manifest can carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fleet.errors import PolicyError
from fleet.lookup import check_settings, resolve

FAMILIES = {
    "mlp": "algorithms.policies.mlp:MlpPolicy",
}


def build(family: str, config: Mapping[str, Any]) -> Any:
    """A policy with fresh weights: ``family`` is a key of ``FAMILIES`` or "module:Class", ``config`` its ``Config``'s fields.

    The policy keeps both as ``policy.family`` and ``policy.config`` (plain data): ``build(policy.family, policy.config)`` gives
    a module that its ``state_dict`` fits.

    Raises:
        PolicyError: Unknown family or field, a missing field, or a value out of its range.
    """
    cls = resolve(FAMILIES, family, kind="policy family", error=PolicyError)
    check_settings(cls.Config, config, kind=f"policy family {family!r}", error=PolicyError)
    policy = cls(cls.Config(**config))
    policy.family, policy.config = family, dict(config)
    return policy
