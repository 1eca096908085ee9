"""Which engine updates the parameters."""

from __future__ import annotations

import torch

from algorithms.base import Algorithm
from fleet.errors import ConfigError
from learner.engine import Engine, TorchEngine
from learner.main import EngineConfig
from learner.ranks import Ranks


def make_engine(config: EngineConfig, algorithm: Algorithm, device: torch.device, ranks: Ranks) -> Engine:
    """The engine that the configuration names.

    Raises:
        ConfigError: It does not go together with the number of ranks.
    """
    name = config.name if config.name != "auto" else "torch" if ranks.size == 1 else "ddp"
    if name == "torch" and ranks.size > 1:
        raise ConfigError(f"engine.name = 'torch' with {ranks.size} ranks", rule="torch has one rank", remedy="engine.name=ddp")
    return TorchEngine(algorithm, device=device, micro_batch=config.micro_batch, max_grad_norm=config.max_grad_norm)
