"""What ``fleet policy show`` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from algorithms.policies.normalise import ActionScale, Normaliser
from algorithms.policies.registry import published
from learner.pretrained import load_pretrained

MAX_TEXT = 100


def policy_lines(where: str) -> list[str]:
    """What there is to say of a policy, a line each.

    Args:
        where: See ``learner.pretrained.load_pretrained``.

    Raises:
        FleetError: There is none, it is damaged, or it cannot be built here.
    """
    found = load_pretrained(where)
    policy = found.policy()
    own = published(policy)
    num_all = sum(p.numel() for p in policy.parameters())
    num_frozen = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    frozen = f", {num_frozen:,} of them frozen" if num_frozen else ""
    spec = policy.spec
    return [
        f"family      {policy.family}",
        f"origin      {found.described.get('origin', 'unknown')}",
        f"parameters  {num_all:,}{frozen}; a release has {num_bytes / 1e6:.2f} MB",
        *(f"frozen      {name}: sha256 {digest[:12]}" for name, digest in found.described.get("frozen", {}).items()),
        *(f"reads       {name} {tuple(shape)}" for name, shape in {**spec.reads, **spec.conditions}.items()),
        f"writes      {spec.horizon} actions of {spec.action_dim} dims"
        + ("; with log-probabilities" if spec.density else "")
        + (f"; continues up to {spec.max_delay} decided actions" if spec.max_delay else ""),
        *_normalisation(policy),
        *(f"config      {name} = {_short(value)}" for name, value in policy.config.items() if name != "reads"),
    ]


def _normalisation(policy: Any) -> Iterator[str]:
    for name, module in policy.named_modules():
        if isinstance(module, Normaliser) and module.size:
            mean, std = module.mean_S, module.std_S
            yield (
                f"normalises  {', '.join(module.shapes)} ({name}): mean {mean.min():.3g} to {mean.max():.3g}, "
                f"deviation {std.min():.3g} to {std.max():.3g}"
            )
        if isinstance(module, ActionScale):
            low, high = module.center_A - module.half_A, module.center_A + module.half_A
            yield f"normalises  action ({name}): {low.min():.3g} to {high.max():.3g} becomes -1 to 1"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
