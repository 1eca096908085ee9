"""Algorithms for tests of sharded engines, and how they are trained on the rows of one rank."""

import copy
import dataclasses

import torch
from torch import nn

from algorithms.base import LossOutput, Part
from algorithms.ema import Ema
from algorithms.policies.frozen import freeze
from learner.engines import make_engine
from learner.main import EngineConfig
from tests.batches import take_rows
from tests.learner.engine_toys import ACTION_DIM, ALONE, CPU, WIDTH, Actor, toy_batch

STEPS = 15


def rows_of(ranks, step, size=7):
    return take_rows(toy_batch(step, size, torch.float32), ranks.place.split().rows(size))


class TwoParts:
    """An actor trained through a critic, with targets from an average. Every loss uses all parameters."""

    name = "two_parts"

    counts = False  # whether the policy's loss counts rows in a buffer

    def __init__(self, optimizer="AdamW", batch_size=7, seed=0):
        torch.manual_seed(seed)
        self.policy = Actor()
        del self.policy.unused, self.policy.rare
        self.policy.first.bias.requires_grad_(False)
        self.critic = nn.Sequential(nn.Linear(ACTION_DIM, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        self.target, self.optimizers, self._optimizer = Ema(self.critic, 0.9), {}, optimizer
        self.parts = {name: Part(getattr(self, name), self._maker(name)) for name in ("policy", "critic")}
        self.frozen = {}
        self.needs = dataclasses.make_dataclass("Needs", ["batch_size"])(batch_size)

    def _maker(self, name):
        def make(parameters):
            self.optimizers[name] = getattr(torch.optim, self._optimizer)(parameters, lr=0.02, weight_decay=0.1)
            return self.optimizers[name]

        return make

    def prepare(self, batch):
        """Calls what is trained, outside of any loss: the policy's method uses a parameter of its own."""
        with torch.no_grad():
            actions_BA = self.policy.mean(batch.obs["observation.state"]).float()
            goal_B = (
                batch.rewards_BH[:, 0] + 0.5 * self.target.module(actions_BA).squeeze(-1) + 0.1 * self.critic(actions_BA)[:, 0]
            )
        return dataclasses.replace(batch, return_B=goal_B.float())

    def loss(self, part, micro):
        actions_BA = self.policy.mean(micro.obs["observation.state"])
        if part == "critic":
            actions_BA = actions_BA.detach()
        elif self.counts:
            self.policy.count += len(actions_BA)
        value_B = self.critic(actions_BA).squeeze(-1)
        loss_B = 0.2 * actions_BA.square().sum(-1) - value_B if part == "policy" else (value_B - micro.return_B) ** 2
        return LossOutput((loss_B * micro.weight_B).sum(), micro.weight_B.sum(), loss_B, {"value": value_B.mean()})

    def after_step(self, step):
        self.target.update(step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 0.02 if step < 5 else 0.01


def train_frozen(ranks=ALONE, **config):
    """A policy whose first layer is a frozen module, and its average: what is kept of it, and what became of the layer."""
    algorithm = TwoParts()
    policy = algorithm.policy
    policy.frozen = ("first",)
    freeze(policy)
    before = {name: value.clone() for name, value in policy.first.state_dict().items()}
    average = Ema(policy, 0.9)
    engine = make_engine(EngineConfig(**config), algorithm, CPU, ranks)
    for step in range(3):
        batch = algorithm.prepare(rows_of(ranks, step))
        numbers = [engine.update(part, algorithm.loss, batch) for part in algorithm.parts]
        with engine.gathered():
            algorithm.after_step(step)
            average.update(step)
    with engine.gathered():
        acting = {name: value.detach().float().clone() for name, value in average.state_dict().items()}
    kept, names = {n: v.clone() for n, v in engine.weights()["policy"].items()}, list(engine.state()["policy"]["state"])
    engine.load_weights(engine.weights())
    engine.close()
    after = policy.first.state_dict()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    shared = average.module.first is policy.first and not any(p.requires_grad for p in policy.first.parameters())
    return {"numbers": numbers, "kept": kept, "acting": acting, "names": names, "unchanged": unchanged, "shared": shared}


@dataclasses.dataclass
class Curve:
    numbers: list
    weights: dict
    state: dict
    target: dict


def train(ranks=ALONE, steps=STEPS, *, start=None, size=7, optimizer="AdamW", **config):
    algorithm = TwoParts(optimizer, size)
    engine = make_engine(EngineConfig(**config), algorithm, CPU, ranks)
    first = 0
    if start is not None:
        first = len(start.numbers) // 2
        engine.load_weights(start.weights)
        engine.load_state(start.state)
        algorithm.target.load_state_dict(start.target)
    numbers, rows = [], ranks.place.split().rows(size)
    for step in range(first, first + steps):
        batch = algorithm.prepare(take_rows(toy_batch(step, size, torch.float32), rows))
        numbers += [engine.update(part, algorithm.loss, batch) for part in algorithm.parts]
        with engine.gathered():
            algorithm.after_step(step)
    weights = {part: {n: v.clone() for n, v in named.items()} for part, named in engine.weights().items()}
    return Curve(numbers, weights, engine.state(), algorithm.target.state_dict())


def difference(first, second):
    found = [abs(a[n] - b[n]) for a, b in zip(first.numbers, second.numbers, strict=True) for n in a]
    for part, named in first.weights.items():
        found += [float((value - second.weights[part][name]).abs().max()) for name, value in named.items()]
    found += [float((value - second.target[name]).abs().max()) for name, value in first.target.items()]
    return max(found)


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(5, 3), nn.Linear(5, 3)


class SometimesUsed:
    """``uses(step, micro)``: whether a loss uses the second layer. Plain SGD: without a gradient nothing happens."""

    frozen, needs, step = {}, dataclasses.make_dataclass("Needs", ["batch_size"])(7), 0

    def __init__(self, uses):
        torch.manual_seed(0)
        self.module, self.uses = Sometimes(), uses
        self.parts = {"policy": Part(self.module, lambda parameters: torch.optim.SGD(parameters, lr=0.1))}

    def loss(self, part, micro):
        state_BS = micro.obs["observation.state"]
        out_BA = self.module.always(state_BS)
        if self.uses(self.step, micro):
            out_BA = out_BA + self.module.sometimes(state_BS) * (micro.task_B == 1)[:, None]
        loss_B = out_BA.square().sum(-1)
        return LossOutput(loss_B.sum(), micro.weight_B.sum(), loss_B, {})

    def train(self, ranks=ALONE, steps=4, **config):
        engine = make_engine(EngineConfig(**config), self, CPU, ranks)
        numbers = []
        for self.step in range(steps):
            numbers.append(engine.update("policy", self.loss, rows_of(ranks, self.step)))
        return Curve(numbers, copy.deepcopy(engine.weights()), {}, {})


def every_other(step, micro):
    return step % 2 == 0


def with_its_task(step, micro):
    return bool((micro.task_B == 1).any())
