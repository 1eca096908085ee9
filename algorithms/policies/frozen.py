"""Modules of a policy that are never trained, a pretrained backbone say: ``policy.frozen`` names them.

They stay out of optimizers, averages, checkpoints and releases. Whoever builds the policy has them already, so a release says
by a hash which ones it was trained with.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fleet.errors import PolicyError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def frozen_modules(policy: Any) -> dict[str, nn.Module]:
    """By name; empty for a module that says nothing about it.

    Raises:
        PolicyError: ``frozen`` names what is no child module.
    """
    found: dict[str, nn.Module] = {}
    for name in getattr(policy, "frozen", ()):
        try:
            found[name] = policy.get_submodule(name)
        except AttributeError:
            raise PolicyError(
                f"policy of class {type(policy).__name__} names {name!r} as frozen", rule="frozen names child modules"
            ) from None
    return found


def freeze(policy: Any) -> None:
    """No gradients for frozen modules; what drops out or normalises by batches in there stops doing so."""
    for module in frozen_modules(policy).values():
        module.requires_grad_(False).eval()


def copied(module: AnyModule) -> AnyModule:
    """A deep copy that shares the frozen modules."""
    shared: dict[int, Any] = {id(child): child for child in frozen_modules(module).values()}
    return copy.deepcopy(module, shared)


def fingerprints(policy: Any) -> dict[str, str]:
    """sha256 of each frozen module's tensors by its name. Read once from a module: call it before an engine shards it."""
    found = {}
    for name, module in frozen_modules(policy).items():
        if "fingerprint" not in module.__dict__:
            module.__dict__["fingerprint"] = _sha256(module.state_dict())
        found[name] = str(module.__dict__["fingerprint"])
    return found


def require_same_frozen(policy: Any, described: Mapping[str, Any]) -> None:
    """Checks that a policy that was built here has the frozen modules that its weights were trained with.

    Args:
        described: As ``describe`` in ``algorithms.policies.registry`` made it.

    Raises:
        PolicyError: Names the module and both hashes.
    """
    here, trained = fingerprints(policy), dict(described.get("frozen", {}))
    for name in dict.fromkeys((*trained, *here)):
        if here.get(name) != trained.get(name):
            raise PolicyError(
                f"frozen module {name!r} is {_short(here.get(name))} here",
                rule=f"the weights were trained with {_short(trained.get(name))}",
                remedy="install the same pretrained files as on the learner's machine",
            )


def _short(digest: str | None) -> str:
    return "absent" if digest is None else f"sha256 {digest[:12]}"


@torch.no_grad()
def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    sums = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sums.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if len(flat):
            sums.update(flat.view(torch.uint8).numpy().data)
    return sums.hexdigest()
