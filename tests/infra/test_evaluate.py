import copy
import functools
import multiprocessing

import numpy as np
import pytest
import torch

from algorithms.instruction import encode
from algorithms.policies.registry import build
from fleet.errors import ConfigError, PolicyError, RobotError
from fleet.seeds import HELD_OUT, TRAINING, held_out_seeds, training_seed
from fleet.spec import STATE
from infra.evaluate import evaluate
from infra.intervals import wilson

TASKS = {"reach": encode("reach the target"), "mirror": encode("go to the mirror image")}


@functools.cache
def _policy(gain=2.0):
    """A linear controller hidden in an mlp cannot be written down; this one is trained by hand for "reach"."""
    torch.manual_seed(0)
    policy = build("mlp", {"reads": {STATE: [6]}, "action_dim": 2, "horizon": 4, "width": 64})
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    condition = torch.from_numpy(TASKS["reach"])
    for _ in range(400):
        state = torch.randn(128, 6) * 0.8
        error = gain * (state[:, 4:] - state[:, :2])
        target = torch.stack([(error - 0.4 * gain * i * error.sign() * 0.1).clamp(-1, 1) for i in range(4)], 1)
        loss = (policy.act({STATE: state, "instruction": condition.expand(128, -1)}).actions_BHA - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def test_counts_successes_by_task_the_same_in_workers_and_here():
    policy = _policy()
    here = evaluate(policy, "toy", {"max_steps": 40}, TASKS, held_out_seeds(12), execute=1, num_workers=0)
    workers = evaluate(policy, "toy", {"max_steps": 40}, TASKS, held_out_seeds(12), execute=1, num_workers=2)
    assert here == workers
    reach, mirror = here.rows
    assert (reach.task, mirror.task) == ("reach", "mirror")
    assert reach.num_successes == 12 and mirror.num_successes == 0
    assert mirror.mean_steps == 40 and reach.mean_steps < 40  # an episode ends at its success
    assert here.total.num_episodes == 24 and here.total.rate == 0.5
    assert [e.seed for e in here.episodes] == held_out_seeds(12) * 2
    assert here.to_dict()["rows"][0]["low"] == pytest.approx(wilson(12, 12)[0])


def test_weights_of_any_type_reach_the_workers():
    halves = copy.deepcopy(_policy()).to(torch.bfloat16)
    table = evaluate(halves, "toy", {"max_steps": 40}, {"reach": TASKS["reach"]}, held_out_seeds(4), execute=1, num_workers=0)
    assert table.total.num_successes == 4


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (48, 50), (1, 3)])
def test_wilson_interval_ends_where_the_score_test_rejects(k, n):
    low, high = wilson(k, n)
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            assert (k / n - bound) ** 2 / (bound * (1 - bound) / n) == pytest.approx(1.959964**2, rel=1e-6)
    assert low <= k / n <= high and (low == 0) == (k == 0) and (high > 1 - 1e-9) == (k == n)


def test_training_and_held_out_seeds_never_meet():
    drawn = {training_seed(7, "robot-1", episode) for episode in range(1000)}
    assert len(drawn) == 1000 and all(seed in TRAINING for seed in drawn)
    assert training_seed(7, "robot-1", 0) != training_seed(7, "robot-2", 0) != training_seed(8, "robot-2", 0)
    assert not set(TRAINING[:10]) & set(HELD_OUT[:10]) and TRAINING.stop <= HELD_OUT.start
    assert held_out_seeds(3, first=2) == held_out_seeds(5)[2:]
    with pytest.raises(ConfigError, match="may have been trained on"):
        evaluate(_untrained(), "toy", {}, TASKS, [next(iter(drawn))], execute=1)
    with pytest.raises(ConfigError, match="held-out"):
        held_out_seeds(0)


def _untrained(state_dim=6):
    return build("mlp", {"reads": {STATE: [state_dim]}, "action_dim": 2, "horizon": 4, "width": 8})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_refusals_reach_the_caller(num_workers):
    seeds = held_out_seeds(1)
    with pytest.raises(PolicyError, match="toy_two_joint"):
        evaluate(_untrained(39), "toy", {}, TASKS, seeds, execute=1, num_workers=num_workers)
    with pytest.raises(RobotError, match="did you mean 'toy'"):
        evaluate(_untrained(), "toyy", {}, TASKS, seeds, execute=1, num_workers=num_workers)
    with pytest.raises(ConfigError, match="execute 5"):
        evaluate(_untrained(), "toy", {}, {"reach": np.zeros(32)}, seeds, execute=5, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_episode_that_the_robot_never_ends_is_ended(num_workers):
    robot, settings = "tests.infra.odd_robots:Endless", {"max_steps": 5}
    table = evaluate(_policy(), robot, settings, TASKS, held_out_seeds(2), execute=3, num_workers=num_workers, max_steps=31)
    assert [(e.num_steps, e.success) for e in table.episodes] == [(31, False)] * 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_whoever_watches_can_end_it(num_workers):
    done = []

    def watch(num):
        done.append(num)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(_untrained(), "toy", {}, TASKS, held_out_seeds(12), execute=1, num_workers=num_workers, watch=watch)
    assert done == [5 if num_workers else 1] and not multiprocessing.active_children()
