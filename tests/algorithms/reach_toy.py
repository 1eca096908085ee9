"""Learning in seconds: a point on a line that is to come to a goal, what it did as a batch, and the learner's loop in lockstep.

The observation is how far away it is, the action a speed in [-1, 1]; a chunk of H of them is executed without looking.
Demonstrations are imperfect: a third as fast as could be, and shaky.
"""

from __future__ import annotations

import numpy as np
import torch

from algorithms.base import DataFacts
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.batch import Outcome
from fleet.robot import Source
from fleet.spec import ACTION, STATE
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.minibatches import minibatches
from tests.batches import make_batch
from tests.learner.engine_toys import ALONE, CPU

H, LIMIT, SPEED, NEAR = 3, 9, 0.2, 0.1


def play(act, rng, num, source):
    """Episodes of ``num`` points. act: (obs (N, 1), rng) -> actions (N, H)."""
    far = rng.uniform(-1.6, 1.6, num)
    episodes = [{"source": source, "success": False, "obs": [], "action": []} for _ in range(num)]
    for t in range(LIMIT):
        obs = far[:, None].astype(np.float32)
        if t % H == 0:
            chunk = np.clip(act(obs, rng), -1, 1)
        far = far - SPEED * chunk[:, t % H]
        for i, episode in enumerate(episodes):
            if not episode["success"]:
                episode["obs"].append(obs[i])
                episode["action"].append(chunk[i, t % H : t % H + 1])
                episode["success"] = bool(abs(far[i]) < NEAR)
    return episodes


def demonstrate(obs, rng):
    speed = np.clip(obs / SPEED, -0.35, 0.35) * np.ones(H)
    return speed + rng.normal(0, 0.2, speed.shape)


def acting(policy, sample):
    def act(obs, rng):
        noise = policy.noise(len(obs), torch.Generator().manual_seed(int(rng.integers(1 << 30)))) if sample else None
        with torch.no_grad():
            return policy.act({STATE: torch.from_numpy(obs)}, noise).actions_BHA[..., 0].numpy()

    return act


def score(policy, num=200):
    """Share of successes, and mean steps."""
    episodes = play(acting(policy, sample=False), np.random.default_rng(99), num, Source.POLICY)
    return np.mean([e["success"] for e in episodes]), np.mean([len(e["obs"]) for e in episodes])


class Memory:
    """Episodes, and batches of them by the shares that an algorithm asks for."""

    def __init__(self, episodes):
        self.episodes, self.steps = [], {}
        self.add(episodes)

    def add(self, episodes):
        for episode in episodes:
            at = self.steps.setdefault(episode["source"], [])
            at += [(len(self.episodes), t) for t in range(len(episode["obs"]))]
            self.episodes.append({**episode, **{name: np.array(episode[name], np.float32) for name in ("obs", "action")}})

    def facts(self):
        rows = {key: np.concatenate([e[name] for e in self.episodes]) for key, name in ((STATE, "obs"), (ACTION, "action"))}
        return DataFacts(("reach",), {name: Statistics.of(values) for name, values in rows.items()}, (LIMIT,))

    def batch(self, needs, step):
        rng = np.random.default_rng(step)
        groups = [([at for one in group for at in self.steps.get(one, [])], share) for group, share in needs.shares.items()]
        groups = [(np.array(steps), share) for steps, share in groups if steps and share]
        ends = np.floor(np.cumsum([share for _, share in groups]) / sum(share for _, share in groups) * needs.batch_size)
        counts = np.diff(ends.astype(int), prepend=0)
        drawn = [steps[rng.integers(len(steps), size=count)] for (steps, _), count in zip(groups, counts, strict=True)]
        windows = [self._window(*at, needs) for at in rng.permutation(np.concatenate(drawn))]
        obs, after, action, mask, success, to_go, source = (torch.from_numpy(np.array(c)) for c in zip(*windows, strict=True))
        last = mask & (torch.arange(needs.horizon) == to_go[:, None] - 1)
        return make_batch(
            {STATE: obs},
            action,
            mask_BH=mask,
            obs_at={needs.horizon: {STATE: after}},
            inside_at={needs.horizon: to_go > needs.horizon},
            terminated_BH=last & success[:, None],
            truncated_BH=last & ~success[:, None],
            terminated_B=success,
            steps_to_go_B=to_go,
            outcome_B=torch.where(success, int(Outcome.SUCCESS), int(Outcome.FAILURE)),
            source_B=source.to(torch.uint8),
        )

    def _window(self, number, t, needs):
        episode = self.episodes[number]
        length, at = len(episode["obs"]), t + np.arange(needs.horizon)
        inside = np.minimum(at, length - 1)
        after = episode["obs"][min(t + needs.horizon, length - 1)]
        return (
            episode["obs"][t],
            after,
            episode["action"][inside],
            at < length,
            episode["success"],
            length - t,
            episode["source"],
        )


class Trainer:
    """An algorithm and its engine, driven as ``learner/loop.py`` does."""

    def __init__(self, algorithm, **engine):
        self.algorithm, self.engine = algorithm, make_engine(EngineConfig(**engine), algorithm, CPU, ALONE)
        self.step = 0

    def __call__(self, batch):
        algorithm, stats = self.algorithm, {}
        with torch.no_grad():
            batch = algorithm.prepare(batch)
        for name, part in algorithm.parts.items():
            if self.step % part.every:
                continue
            each = []
            for _, minibatch in minibatches(batch, part):
                each.append(self.engine.update(name, algorithm.loss, minibatch))
                if part.after_update is not None:
                    part.after_update()
            prefix = "" if len(algorithm.parts) == 1 else f"{name}."
            stats |= {prefix + key: sum(one[key] for one in each) / len(each) for key in each[0]}
        algorithm.after_step(self.step, stats)
        self.step += 1
        return stats


def make_policy(family, facts, **config):
    sizes = {"reads": {STATE: [1]}, "action_dim": 1, "horizon": H, "instruction_dim": 0, "width": 32, "num_layers": 2}
    policy = build(family, {**sizes, **config})
    policy.set_statistics(facts.statistics)
    return policy
