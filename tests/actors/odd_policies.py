"""Policies without learning, for tests of how chunks are run. Families by "tests.actors.odd_policies:Name"."""

import dataclasses
import time
from typing import ClassVar

import torch
from torch import nn

from algorithms.policies.base import DELAY, PREFIX, Chunk, PolicySpec
from fleet.spec import STATE


@dataclasses.dataclass
class JumpyConfig:
    horizon: int = 16
    max_delay: int = 0
    seconds: float = 0.0
    """How long it takes."""
    bad: float = 0.0
    """The first action; not a number makes the policy fail its test."""
    fails_from: int = 0
    """The call from which on it raises, as a library does; 0: never."""
    reads: tuple = (STATE,)


class Jumpy(nn.Module):
    """For the toy robot. Each chunk is one action, repeated, that differs from chunk to chunk; a prefix is continued by its
    last action plus 0.001."""

    Config = JumpyConfig
    reads: ClassVar = {STATE: (6,)}

    def __init__(self, config: JumpyConfig) -> None:
        super().__init__()
        self._config = config
        self.spec = PolicySpec(self.reads, {}, 2, config.horizon, max_delay=config.max_delay)
        self.sign = nn.Parameter(torch.ones(()))
        self._num_calls = 0

    def noise(self, batch_size, generator):
        return None

    def act(self, obs, noise=None, guidance=1.0):
        time.sleep(self._config.seconds)
        self._num_calls += 1
        if 0 < self._config.fails_from <= self._num_calls:
            raise RuntimeError("CUDA out of memory")
        actions_BHA = torch.full((1, self.spec.horizon, 2), 0.01 * (-1) ** self._num_calls) * self.sign
        actions_BHA[0, 0, 0] += self._config.bad
        if PREFIX in obs and (delay := int(obs[DELAY][0])):
            actions_BHA[0, :delay] = obs[PREFIX][0, :delay]
            actions_BHA[0, delay:] = obs[PREFIX][0, delay - 1] + 0.001
        return Chunk(actions_BHA)
