"""Low-rank adapters (LoRA, arXiv 2106.09685) in a LeRobot policy, by peft: y = W x + (alpha / r) B A x, A and B trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fleet.errors import PolicyError
from fleet.lookup import check_settings


@dataclasses.dataclass
class LoraSettings:
    r: int = 16
    """Rank of the adapters."""
    alpha: int = 32
    """They count alpha / r."""
    targets: str | list[str] = ""
    """Linear modules that get one: a regular expression on whole names, or ends of names; "": as LeRobot says for the kind."""
    train: list[str] = dataclasses.field(default_factory=list)
    """Modules that are trained whole beside them, by name in LeRobot's policy: ``model.action_out_proj`` say."""


def add_lora(policy: Any, settings: Mapping[str, Any]) -> None:
    """Puts adapters into LeRobot's policy, in place. Everything but them and ``train`` is frozen.

    Raises:
        PolicyError: Unknown settings, or names that fit no module.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_settings(LoraSettings, settings, kind="policy.config.lora", error=PolicyError)
    lora = LoraSettings(**settings)
    targets = lora.targets or _targets_of(policy)
    policy.requires_grad_(False)
    try:
        inject_adapter_in_model(LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets), policy)
    except ValueError as error:
        raise PolicyError(f"policy.config.lora: {str(error).splitlines()[0]}", rule="settings that peft takes") from None
    for name in lora.train:
        try:
            policy.get_submodule(name).requires_grad_(True)
        except AttributeError:
            known = sorted({re.sub(r"\.\d+\..*", "", module) for module, _ in policy.named_modules() if module.count(".") < 3})
            raise PolicyError(f"policy.config.lora.train names {name!r}", rule=f"a module: {known[:40]}") from None


def merge_lora(policy: nn.Module) -> None:
    """Adds the adapters to the weights that they sit on, and takes them out, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(policy.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(policy.get_submodule(parent), leaf, module.get_base_layer())


def _targets_of(policy: Any) -> str | list[str]:
    """What LeRobot adapts by itself.

    Raises:
        PolicyError: The kind has no such default.
    """
    targets: str | list[str] | None = (policy._get_default_peft_targets() or {}).get("target_modules")
    if not targets:
        raise PolicyError(
            f"LeRobot's {policy.name!r} has no default of adapted modules", rule="policy.config.lora.targets names them"
        )
    return targets
