"""The policies that go through test_conformance.py, one line each, and the data that they are tested on.

A new family adds a small case of each of its kinds; more than about 0.2 s for a forward pass is too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.policies.base import ADVANTAGE, DELAY, INSTRUCTION, PREFIX, TEXT, Chunk, PolicySpec
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from algorithms.policies.text import text_of
from fleet.spec import ACTION, IMAGE_PREFIX, STATE

EFFORT, CAMERA, WRIST = "observation.effort", f"{IMAGE_PREFIX}front", f"{IMAGE_PREFIX}wrist"
VECTORS = {STATE: [6], EFFORT: [2, 2]}
IMAGES = {STATE: [6], CAMERA: [24, 24, 3], WRIST: [24, 32, 3]}
B, H, A, E = 5, 4, 3, 8  # batch, chunk, action and instruction dims of all cases
SIZES: dict[str, Any] = {"action_dim": A, "horizon": H, "instruction_dim": E}
FLOW = {"reads": VECTORS, "width": 32, "num_layers": 2, "num_heads": 2, "num_steps": 4}
TOKEN = {"reads": VECTORS, "width": 32, "num_heads": 2, "encoder_layers": 1, "num_layers": 2, "num_bins": 9}

# Name of the case: (family, config).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {**SIZES, "reads": VECTORS, "width": 32}),
    "mlp, one task": ("mlp", {**SIZES, "reads": VECTORS, "width": 32, "instruction_dim": 0}),
    "mlp, normalised": ("mlp", {**SIZES, "reads": VECTORS, "width": 32, "normalise_actions": True, "select": {STATE: [0, 4]}}),
    "cnn": ("cnn", {**SIZES, "reads": IMAGES, "width": 32, "vision_width": 16, "image_dims": 16}),
    "cnn, images alone": (
        "cnn",
        {**SIZES, "reads": {CAMERA: [24, 24, 3]}, "width": 32, "vision_width": 16, "instruction_dim": 0},
    ),
    "squashed": ("squashed", {**SIZES, "reads": VECTORS, "width": 32, "select": {STATE: [0, 4]}}),
    "squashed, images": (
        "squashed",
        {**SIZES, "reads": IMAGES, "width": 32, "vision_width": 16, "image_dims": 16, "bounds": [-4.0, 3.0]},
    ),
    "flow": ("flow", {**SIZES, **FLOW}),
    "flow, images": ("flow", {**SIZES, **FLOW, "reads": IMAGES, "time_sampling": "beta"}),
    "flow, sde": ("flow", {**SIZES, **FLOW, "noise_level": 0.7, "advantage": True, "max_delay": 2}),
    "flow, sde of one step": ("flow", {**SIZES, **FLOW, "noise_level": 0.5, "stochastic": "one", "max_delay": 3}),
    "flow, learned noise": ("flow", {**SIZES, **FLOW, "noise_kind": "learned", "instruction_dim": 0}),
    "small_vla": ("small_vla", {**SIZES, **FLOW, "reads": IMAGES, "select": {STATE: [0, 1]}, "advantage": True}),
    "small_vla, vit": ("small_vla", {**SIZES, **FLOW, "reads": {CAMERA: [24, 24, 3]}, "vision": "vit"}),
    "token, parallel": ("token", {**SIZES, **TOKEN, "advantage": True, "soft_decode": True, "blur": 0.5}),
    "token, autoregressive": ("token", {**SIZES, **TOKEN, "decoding": "autoregressive", "advantage": True}),
    "token, autoregressive dct": ("token", {**SIZES, **TOKEN, "decoding": "autoregressive", "codec": "dct"}),
    "token, diffusion": ("token", {**SIZES, **TOKEN, "decoding": "diffusion", "num_rounds": 4, "reads": IMAGES}),
    "token, diffusion dct": ("token", {**SIZES, **TOKEN, "decoding": "diffusion", "codec": "dct", "instruction_dim": 0}),
}


def make(name: str, seed: int = 0) -> Any:
    """The case's policy with statistics, every weight moved: nothing that starts at zero hides a mistake."""
    family, config = CASES[name]
    torch.manual_seed(seed)
    policy = build(family, config)
    policy.set_statistics(statistics_of(policy.spec))
    frozen = tuple(f"{module}." for module in getattr(policy, "frozen", ()))
    with torch.no_grad():
        for parameter_name, parameter in policy.named_parameters():
            if not parameter_name.startswith(frozen):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy.eval()


def statistics_of(spec: PolicySpec, seed: int = 1) -> dict[str, Statistics]:
    """Each element has its own place and spread."""
    rng, statistics = np.random.default_rng(seed), {}
    for name, shape in {**spec.vectors, ACTION: (spec.action_dim,)}.items():
        centre, spread = rng.normal(size=shape), rng.uniform(0.5, 2, size=shape)
        statistics[name] = Statistics.of(centre + spread * rng.normal(size=(200, *shape)))
    return statistics


def observe(spec: PolicySpec, batch: int = B, seed: int = 2) -> dict[str, Tensor]:
    """Features and conditions of a batch; no prefix."""
    g = torch.Generator().manual_seed(seed)
    obs = {name: torch.randn(batch, *shape, generator=g) for name, shape in spec.vectors.items()}
    for name, shape in spec.images.items():
        obs[name] = torch.randint(0, 256, (batch, *shape), generator=g, dtype=torch.uint8)
    for name, shape in spec.conditions.items():
        obs[name] = torch.randn(batch, *shape, generator=g)
    if TEXT in obs:
        obs[TEXT] = torch.stack([text_of(f"put thing {row} away"[: 8 + 3 * row]) for row in range(batch)])
    if INSTRUCTION in obs:
        obs[INSTRUCTION] /= obs[INSTRUCTION].norm(dim=1, keepdim=True)
    if ADVANTAGE in obs:
        obs[ADVANTAGE] = torch.arange(batch) % 3 - 1.0
    return obs


def prefixed(spec: PolicySpec, obs: Mapping[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """``obs`` with a prefix whose rows count 0, 1, ... actions of it."""
    batch, g = len(next(iter(obs.values()))), torch.Generator().manual_seed(seed)
    prefix = torch.randn(batch, spec.max_delay, spec.action_dim, generator=g)
    return {**obs, PREFIX: prefix, DELAY: torch.arange(batch) % (spec.max_delay + 1)}


def targets(spec: PolicySpec, batch: int = B, seed: int = 4) -> tuple[Chunk, Tensor]:
    """A chunk to be imitated, and its mask_BH: rows of all lengths, one of them empty; where it is 0 there is a 0."""
    g = torch.Generator().manual_seed(seed)
    lengths = (spec.horizon - torch.arange(batch)) % (spec.horizon + 1)
    mask_BH = (torch.arange(spec.horizon) < lengths[:, None]).float()
    actions_BHA = torch.randn(batch, spec.horizon, spec.action_dim, generator=g)
    return Chunk(actions_BHA * mask_BH[..., None]), mask_BH


def noise(policy: Any, batch: int = B, seed: int = 5) -> Any:
    return policy.noise(batch, torch.Generator().manual_seed(seed))


def rows(value: Any, index: Tensor) -> Any:
    """Rows of tensors, of chunks, and of whatever holds them."""
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, Chunk):
        return Chunk(value.actions_BHA[index], rows(value.log_prob_BT, index), rows(value.replay, index))
    if isinstance(value, Mapping):
        return {name: rows(inner, index) for name, inner in value.items()}
    return value
