"""Observations as tokens, for the families that are transformers.

vector features -> one token; instruction -> one token; each camera -> tokens of its image (vision.py); then a few blocks over
all of them.

Shape suffixes: B batch, N tokens, F width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import INSTRUCTION, PolicySpec
from algorithms.policies.normalise import Normaliser
from algorithms.policies.statistics import Statistics
from algorithms.policies.transformer import Block
from algorithms.policies.vision import Cameras
from fleet.errors import PolicyError


@dataclasses.dataclass
class EncoderConfig:
    width: int = 256
    """F."""
    num_layers: int = 2
    """Blocks over the tokens of the observation."""
    num_heads: int = 4
    """Of attention; divides ``width``."""
    vision: str = "cnn"
    """How images become tokens: a key of ``algorithms.policies.vision.VISION``, or module:Class."""
    shift_pixels: int = 4
    """Images are moved by up to so many pixels while training (DrQ, arXiv 2004.13649); 0: never."""
    select: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """Elements that are read of a flattened vector feature, by its name; all of those that are not named."""


class ObservationEncoder(nn.Module):
    """obs -> tokens (B, N, F). The condition "advantage" is not among them: whoever guides by it adds it."""

    def __init__(self, spec: PolicySpec, config: EncoderConfig) -> None:
        super().__init__()
        width = config.width
        if min(width, config.num_heads) < 1 or width % config.num_heads or config.num_layers < 0:
            raise PolicyError(
                f"an encoder of width {width}, num_heads {config.num_heads}, num_layers {config.num_layers}",
                rule="num_heads divides width; num_layers is at least 0",
            )
        self.normaliser = Normaliser(spec.vectors, config.select)
        self.vector = nn.Linear(self.normaliser.size, width) if self.normaliser.size else None
        instruction_dim = spec.conditions.get(INSTRUCTION, (0,))[0]
        self.instruction = nn.Linear(instruction_dim, width) if instruction_dim else None
        self.cameras = Cameras(spec.images, config.vision, width, config.shift_pixels)
        num_tokens = bool(self.normaliser.size) + bool(instruction_dim) + sum(self.cameras.num_tokens)
        self.place_NF = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        self.normaliser.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """How images are moved; an entry of the policy's noise."""
        return self.cameras.noise(batch_size, generator)

    def forward(self, obs: Mapping[str, Tensor], noise: Any = None) -> Tensor:
        """
        Args:
            noise: A policy's noise, while training; None: images are taken as they are.
        """
        tokens = []
        if self.vector is not None:
            tokens.append(self.vector(self.normaliser(obs))[:, None])
        if self.instruction is not None:
            # Unit vectors: brought to the size of a normalised feature, or the others drown them.
            instruction_BE = obs[INSTRUCTION].to(self.place_NF.dtype)
            tokens.append(self.instruction(instruction_BE * instruction_BE.shape[1] ** 0.5)[:, None])
        x_BNF: Tensor = torch.cat([*tokens, *self.cameras(obs, noise)], 1) + self.place_NF
        for block in self.blocks:
            x_BNF = block(x_BNF)
        out: Tensor = self.norm(x_BNF)
        return out
