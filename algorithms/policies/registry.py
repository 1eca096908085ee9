"""Policy families by name. A policy is built from plain data, so that a release's manifest can carry it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from algorithms.policies.frozen import fingerprints, freeze, require_same_frozen
from fleet.errors import PolicyError
from fleet.lookup import check_settings, resolve

FAMILIES = {
    "mlp": "algorithms.policies.gaussian:MlpPolicy",
    "cnn": "algorithms.policies.gaussian:CnnPolicy",
    "squashed": "algorithms.policies.squashed:SquashedPolicy",
    "flow": "algorithms.policies.flow:FlowPolicy",
    "token": "algorithms.policies.token:TokenPolicy",
    "small_vla": "algorithms.policies.small_vla:SmallVla",
    "best_of": "algorithms.policies.best_of:BestOf",
    "lerobot": "algorithms.policies.policy_lerobot:LerobotPolicy",
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
    freeze(policy)
    return policy


def describe(policy: Any) -> dict[str, Any]:
    """What a release says of its policy, as plain data: ``family``, ``config``, ``spec``, and ``frozen``, hashes by name."""
    spec = dataclasses.asdict(policy.spec)
    for name in ("reads", "conditions", "replay"):
        spec[name] = {key: list(shape) for key, shape in spec[name].items()}
    return {"family": policy.family, "config": dict(policy.config), "spec": spec, "frozen": fingerprints(policy)}


def rebuild(described: Mapping[str, Any]) -> Any:
    """The policy that ``describe`` described, with fresh weights: ``load_published`` gives it those of a release.

    Raises:
        PolicyError: As ``build``; or the frozen modules here are others than those that the weights were trained with.
    """
    policy = build(str(described["family"]), described["config"])
    require_same_frozen(policy, described)
    return policy


def published(policy: Any, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """What is learnt, and what a release holds: the state of a policy, or of any module, but for those that ``frozen``
    names. The tensors are the live ones.

    Args:
        keep_vars: As of ``nn.Module.state_dict``: parameters themselves, not what they hold.
    """
    frozen = tuple(f"{name}." for name in getattr(policy, "frozen", ()))
    return {name: tensor for name, tensor in policy.state_dict(keep_vars=keep_vars).items() if not name.startswith(frozen)}


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
            f"weights do not fit {getattr(policy, 'family', type(policy).__name__)!r}: {'; '.join(problems[:4])}"
            + (f"; and {len(problems) - 4} more" if len(problems) > 4 else ""),
            rule="the same family and settings have the same tensors",
            remedy="look at the family and config that were trained",
        )
    policy.load_state_dict(dict(weights), strict=False)
