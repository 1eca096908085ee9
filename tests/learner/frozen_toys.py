"""A policy with a frozen backbone that "ships in a package": ``FILES`` is which one this machine has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from algorithms.policies.base import Chunk, PolicySpec
from algorithms.policies.normalise import Normaliser

FILES = 1
WIDTH = 64


@dataclasses.dataclass
class BackboneConfig:
    reads: dict[str, Any]
    action_dim: int
    horizon: int = 4


class BackbonePolicy(nn.Module):
    """Adapter and head are learnt. The backbone drops out and normalises by batches, unless it is frozen as it should be."""

    Config = BackboneConfig
    frozen = ("body.backbone",)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        reads = {name: tuple(shape) for name, shape in config.reads.items()}
        self.spec = PolicySpec(reads, {}, config.action_dim, config.horizon)
        self.normaliser = Normaliser(reads)
        backbone = nn.Sequential(nn.Linear(self.normaliser.size, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.5))
        generator = torch.Generator().manual_seed(FILES)
        with torch.no_grad():
            for p in backbone.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.body = nn.ModuleDict({"backbone": backbone, "adapter": nn.Linear(WIDTH, 4)})
        self.head = nn.Linear(4, config.horizon * config.action_dim)

    def set_statistics(self, statistics):
        self.normaliser.set_statistics(statistics)

    def noise(self, batch_size, generator):
        return None

    def act(self, obs, noise=None, guidance=1.0):
        hidden = self.body["adapter"](self.body["backbone"](self.normaliser(obs)))
        return Chunk(self.head(hidden).unflatten(1, (self.spec.horizon, self.spec.action_dim)))

    def imitation_loss(self, obs, chunk, mask_BH, noise=None):
        error_BH = (self.act(obs).actions_BHA - chunk.actions_BHA).abs().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)
