"""A point on a line that is to reach the middle: a task of some lines, for algorithms that learn from mixed data.

The state is the place x in [-1, 1], an action in [-1, 1] moves it by a tenth of itself, and |x| < 0.1 is success. Windows are
those that the sampler would make of the episodes, within each episode.
"""

from __future__ import annotations

import numpy as np
import torch

from algorithms.policies.base import INSTRUCTION
from algorithms.policies.statistics import Statistics
from fleet.batch import Outcome
from fleet.robot import Source
from fleet.spec import ACTION, STATE
from tests.batches import make_batch

NEAR, MAX_STEPS, TASKS = 0.1, 24, 2
INSTRUCTIONS_KE = torch.eye(TASKS, 4)


class Episodes:
    """Steps of all episodes, one after the other."""

    def __init__(self):
        self.columns = {name: [] for name in ("x", "a", "source", "task", "frame", "left", "outcome", "end")}
        self.num_episodes = 0

    def add(self, xs, actions, outcome, source=Source.POLICY, task=0):
        """One episode; ``source`` is one for all steps or one for each."""
        n, first = len(actions), len(self)
        closed = outcome != Outcome.OPEN
        values = (xs[:n], actions, source, task, np.arange(n), np.arange(n, 0, -1) if closed else -1, int(outcome), first + n)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.extend(np.broadcast_to(value, n).tolist())
        self.num_episodes += 1

    def __len__(self):
        return len(self.columns["x"])

    def statistics(self):
        return {
            STATE: Statistics.of(np.array(self.columns["x"])[:, None]),
            ACTION: Statistics.of(np.array(self.columns["a"])[:, None]),
        }

    def windows(self, steps_B, horizon, offsets):
        """A batch of windows at these steps."""
        table = {name: np.array(column) for name, column in self.columns.items()}
        steps_B, end_B = np.asarray(steps_B), table["end"][steps_B]
        steps_BH = steps_B[:, None] + np.arange(horizon)
        mask_BH, steps_BH = steps_BH < end_B[:, None], np.minimum(steps_BH, end_B[:, None] - 1)
        task_B = torch.from_numpy(table["task"][steps_B])

        def observed(offset):
            x_B = table["x"][np.minimum(steps_B + offset, end_B - 1)]
            return {STATE: torch.from_numpy(x_B).float()[:, None], INSTRUCTION: INSTRUCTIONS_KE[task_B]}

        others = [offset for offset in offsets if offset]
        return make_batch(
            observed(0),
            torch.from_numpy(table["a"][steps_BH]).float()[..., None],
            mask_BH=torch.from_numpy(mask_BH),
            obs_at={offset: observed(offset) for offset in others},
            inside_at={offset: torch.from_numpy(steps_B + offset < end_B) for offset in others},
            source_BH=torch.from_numpy(table["source"][steps_BH].astype(np.uint8)),
            source_B=torch.from_numpy(table["source"][steps_B].astype(np.uint8)),
            task_B=task_B,
            step_B=torch.from_numpy(steps_B),
            frame_B=torch.from_numpy(table["frame"][steps_B]),
            steps_to_go_B=torch.from_numpy(table["left"][steps_B]),
            outcome_B=torch.from_numpy(table["outcome"][steps_B]),
        )

    def draw(self, needs, step):
        """A batch of ``needs``, every step alike; a function of ``step``."""
        steps_B = np.random.default_rng((7, step)).integers(len(self), size=needs.batch_size)
        return self.windows(steps_B, needs.horizon, needs.offsets)


def mixed(num_episodes, *, horizon=4, good=0.5, seed=0, task=0):
    """Episodes of somebody who moves to the middle in some chunks, and away from it in the others."""
    rng, episodes = np.random.default_rng(seed), Episodes()
    for _ in range(num_episodes):
        xs, actions = [float(rng.uniform(0.3, 1) * rng.choice([-1, 1]))], []
        while len(actions) < MAX_STEPS and abs(xs[-1]) >= NEAR:
            if len(actions) % horizon == 0:
                towards = 1 if rng.random() < good else -1
            actions.append(float(np.clip(-towards * np.sign(xs[-1]) * 0.7 + rng.normal(0, 0.1), -1, 1)))
            xs.append(float(np.clip(xs[-1] + 0.1 * actions[-1], -1, 1)))
        outcome = Outcome.SUCCESS if abs(xs[-1]) < NEAR else Outcome.FAILURE
        episodes.add(np.array(xs), np.array(actions), outcome, task=task)
    return episodes


@torch.no_grad()
def success(policy, conditions=None, num=128, task=0, **how):
    """Part of the episodes in which a policy reaches the middle in time, from the same starts each time."""
    generator = torch.Generator().manual_seed(1)
    x_B = torch.linspace(0.3, 1, num) * (1 - 2 * (torch.arange(num) % 2))
    reached_B = torch.zeros(num, dtype=torch.bool)
    for _ in range(MAX_STEPS // policy.spec.horizon):
        obs = {STATE: x_B[:, None], INSTRUCTION: INSTRUCTIONS_KE[task].expand(num, -1), **(conditions or {})}
        chunk = policy.act(obs, policy.noise(num, generator), **how).actions_BHA
        for action_B in chunk[..., 0].clamp(-1, 1).unbind(1):
            x_B = torch.where(reached_B, x_B, (x_B + 0.1 * action_B).clamp(-1, 1))
            reached_B |= x_B.abs() < NEAR
    return reached_B.float().mean().item()
