"""An algorithm for tests of engines: an actor trained through a critic, with all that makes ranks differ from one another.

The policy has noise, running statistics, a parameter that no loss uses and one that only rows of task 1 use. The trunk is a
module list, as transformers have.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from algorithms.base import LossOutput, Part, noise_of
from fleet.batch import BatchNeeds
from fleet.robot import Source
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.ranks import RankPlace, Ranks
from tests.batches import make_batch, take_rows

CPU, STATE_DIM, ACTION_DIM, WIDTH = torch.device("cpu"), 5, 3, 8
ALONE = Ranks(RankPlace())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, hidden_BF):
        self.calls += 1
        return hidden_BF + torch.tanh(self.linear(hidden_BF))


class Actor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(STATE_DIM, WIDTH), nn.Linear(WIDTH, ACTION_DIM)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale_A, self.unused, self.rare = (nn.Parameter(torch.ones(n)) for n in (ACTION_DIM, 2, 1))
        self.register_buffer("count", torch.zeros(1))

    def noise(self, batch_size, generator):
        return torch.randn(batch_size, ACTION_DIM, generator=generator, dtype=torch.float64)

    def mean(self, state_BS):  # not forward: an algorithm may call any method
        hidden_BF = self.first(state_BS)
        for block in self.blocks:
            hidden_BF = block(hidden_BF)
        return self.head(hidden_BF) * self.scale_A


class ActorCritic:
    """``counts``: the policy's loss counts rows in a buffer, so ranks with other rows have other buffers."""

    name = "actor_critic"

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, batch_size: int = 7, counts: bool = False) -> None:
        torch.manual_seed(seed)
        self.policy, self.critic, self.step, self.counts = Actor().to(dtype), nn.Linear(ACTION_DIM, 1).to(dtype), 0, counts
        self.parts = {"policy": Part(self.policy, self._adamw), "critic": Part(self.critic, self._adamw)}
        self.frozen: dict[str, nn.Module] = {}
        self.needs = BatchNeeds(batch_size, 2, ("observation.state",), {(Source.DEMO,): 1.0})

    def _adamw(self, parameters):
        return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)

    def loss(self, part, micro):
        state_BS = micro.obs["observation.state"]
        noise_BA = noise_of(self.policy, micro, self.needs.batch_size, 0, self.step).to(state_BS.dtype)
        actions_BA = self.policy.mean(state_BS) + 0.1 * noise_BA
        if part == "critic":
            actions_BA = actions_BA.detach()
        elif self.counts:
            self.policy.count += len(state_BS)
        value_B = self.critic(actions_BA).squeeze(-1)
        loss_B = 0.2 * actions_BA.square().sum(-1) - value_B if part == "policy" else (value_B - micro.rewards_BH[:, 0]) ** 2
        rare_B = micro.task_B == 1
        if part == "policy" and rare_B.any():
            loss_B = loss_B + torch.where(rare_B, self.policy.rare, 0.0)
        stats = {"value": value_B.mean(), "rare_loss": ((loss_B * rare_B).sum(), rare_B.sum())}
        return LossOutput((loss_B * micro.weight_B).sum(), micro.weight_B.sum(), loss_B, stats)


def toy_batch(step: int, size: int = 7, dtype: torch.dtype = torch.float64):
    """The rows of all ranks. Only the first one is of task 1."""
    rng = np.random.default_rng((1, step))
    state_BS, reward_BH, weight_B = rng.normal(size=(size, STATE_DIM)), rng.normal(size=(size, 2)), rng.uniform(0.2, 1, size)
    return make_batch(
        {"observation.state": torch.as_tensor(state_BS, dtype=dtype)},
        torch.zeros(size, 2, ACTION_DIM, dtype=dtype),
        rewards_BH=torch.as_tensor(reward_BH, dtype=dtype),
        weight_B=torch.as_tensor(weight_B, dtype=dtype),
        task_B=(torch.arange(size) == 0).long(),
    )


@dataclasses.dataclass
class Trained:
    """What a training gave on one rank: numbers by update, weights, optimizer state, this rank's last losses by part."""

    numbers: list[dict[str, float]]
    weights: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    per_sample: dict[str, torch.Tensor]


def train_toy_engine(
    ranks: Ranks = ALONE,
    steps: int = 20,
    *,
    tensors: torch.dtype = torch.float64,
    size: int = 7,
    counts: bool = False,
    start: Trained | None = None,
    **config: Any,
) -> Trained:
    """Trains both parts in turns on this rank's rows of the batches of all ranks; ``start``: goes on from there.

    ``config``: of EngineConfig. Deterministic: the same arguments give the same bits.
    """
    algorithm = ActorCritic(dtype=tensors, batch_size=size, counts=counts)
    engine = make_engine(EngineConfig(**config), algorithm, CPU, ranks)
    first = 0
    if start is not None:
        engine.load_weights(start.weights)
        engine.load_state(start.state)
        first = len(start.numbers) // 2
    numbers, rows = [], ranks.place.split().rows(size)
    for step in range(first, first + steps):
        algorithm.step = step
        for part in algorithm.parts:
            numbers.append(engine.update(part, algorithm.loss, take_rows(toy_batch(step, size, tensors), rows)))
    with engine.gathered():
        weights = {part: {n: v.detach().clone() for n, v in named.items()} for part, named in engine.weights().items()}
    return Trained(numbers, weights, engine.state(), {part: engine.per_sample(part) for part in algorithm.parts})


def largest_difference(first: Trained, second: Trained) -> float:
    """Of any number and any weight, absolute."""
    assert [list(n) for n in first.numbers] == [list(n) for n in second.numbers]
    found = [abs(a[n] - b[n]) for a, b in zip(first.numbers, second.numbers, strict=True) for n in a]
    for part, named in first.weights.items():
        assert list(named) == list(second.weights[part])
        found += [float((value - second.weights[part][name]).abs().max()) for name, value in named.items()]
    return max(found)
