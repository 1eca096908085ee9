"""Policy families by name. A policy is built from plain data, so that a release's manifest can carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fleet.errors import PolicyError
from fleet.lookup import check_settings, resolve

FAMILIES = {
    "mlp": "algorithms.policies.mlp:MlpPolicy",
    "best_of": "algorithms.policies.best_of:BestOf",
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


def published(policy: Any) -> dict[str, Tensor]:
    """What a release of this policy holds: its state but for the modules that it names in ``policy.frozen``."""
    frozen = tuple(f"{name}." for name in getattr(policy, "frozen", ()))
    return {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith(frozen)}


def load_published(policy: Any, weights: Mapping[str, Tensor]) -> None:
    """Loads what ``published`` gave.

    Raises:
        PolicyError: Tensors are missing, unknown, or of another shape; names the first few.
    """
    own = published(policy)
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in own]
    problems += [
        f"{name} is {list(tensor.shape)}, here {list(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        raise PolicyError(
            f"weights do not fit a policy of family {getattr(policy, 'family', '')!r}: {'; '.join(problems[:4])}"
            + (f"; and {len(problems) - 4} more" if len(problems) > 4 else ""),
            rule="the same family and settings have the same tensors",
            remedy="look at the family and config that were trained",
        )
    policy.load_state_dict(dict(weights), strict=False)
