"""Returns, targets, densities and target networks against rlax's, torchrl's and stable-baselines3's, on the same numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from algorithms.critics import build_critic
from algorithms.ema import Target
from algorithms.policies.base import Chunk
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from algorithms.rewards import Rewards
from algorithms.td import chunk_return, prefix_return
from fleet.batch import Outcome
from tests.batches import make_batch

DISCOUNT, LENGTH, HORIZON = 0.9, 11, 4
READS = {"observation.state": (3,)}


def numbers(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def windows(rewards_T, values_T, ends_by_itself):
    """A window from each step of one episode, and the values of what its offsets see, (T, HORIZON)."""
    t, num = np.arange(LENGTH), len(rewards_T)
    step_TH = t[:, None] + np.arange(HORIZON)
    inside_TH = step_TH < num
    last_TH = step_TH == num - 1
    offset_TL = t[:, None] + 1 + np.arange(HORIZON)
    batch = make_batch(
        {},
        torch.zeros(LENGTH, HORIZON, 1),
        mask_BH=torch.tensor(inside_TH),
        rewards_BH=torch.tensor(np.where(inside_TH, rewards_T[np.minimum(step_TH, num - 1)], 0)),
        terminated_BH=torch.tensor(last_TH & ends_by_itself),
        truncated_BH=torch.tensor(last_TH & (not ends_by_itself)),
        inside_at={length: torch.tensor(offset_TL[:, length - 1] < num) for length in range(1, HORIZON + 1)},
        steps_to_go_B=torch.tensor(num - t),
    )
    return batch, torch.tensor(values_T[np.minimum(offset_TL, num - 1)])


@pytest.mark.parametrize("num_steps", range(1, HORIZON + 1))
@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_chunk_targets_are_the_n_step_returns_of_rlax(ends_by_itself, num_steps):
    """Of an episode that was cut rlax is shown what is in the log: all steps but the last, and the observation before it."""
    rlax = pytest.importorskip("rlax")
    rewards_T, values_T = numbers(LENGTH, seed=1), numbers(LENGTH, seed=2)
    batch, values_TL = windows(rewards_T, values_T, ends_by_itself)
    parts = prefix_return(batch, batch.rewards_BH, DISCOUNT, range(1, HORIZON + 1))
    if num_steps == HORIZON:
        whole = chunk_return(batch, batch.rewards_BH, DISCOUNT)
        torch.testing.assert_close(whole, tuple(part[:, -1] for part in parts))
    reward_T, bootstrap_T, weight_T = (part[:, num_steps - 1] for part in parts)
    num = LENGTH if ends_by_itself else LENGTH - 1
    discounts_T = np.full(num, DISCOUNT, np.float32)
    discounts_T[-1] *= not ends_by_itself
    behind_T = np.append(values_T[1:], np.float32(99.0))[:num]  # what follows a terminal step is not to count
    theirs_T = rlax.n_step_bootstrapped_returns(rewards_T[:num], discounts_T, behind_T, num_steps)
    ours_T = reward_T + bootstrap_T * values_TL[:, num_steps - 1]
    torch.testing.assert_close(ours_T[:num], torch.tensor(theirs_T.tolist()))
    assert weight_T.tolist() == [1.0] * num + [0.0] * (LENGTH - num)


@pytest.mark.parametrize("kind", ["success", "steps"])
@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.FAILURE])
def test_returns_are_the_discounted_sums_of_rlax(kind, outcome):
    rlax = pytest.importorskip("rlax")
    rewards = Rewards(kind, DISCOUNT, failure_cost=7.0, step_cost=0.25 if kind == "success" else 0.0, timeouts="end")
    batch, _ = windows(np.zeros(LENGTH, np.float32), np.zeros(LENGTH, np.float32), outcome == Outcome.SUCCESS)
    batch.outcome_B = torch.full((LENGTH,), int(outcome))
    rewards_T, discounts_T = rewards.rewards_BH(batch)[:, 0].numpy(), np.full(LENGTH, DISCOUNT, np.float32)
    assert len(set(rewards_T.tolist())) == (1 if kind == "success" and outcome == Outcome.FAILURE else 2)
    theirs_T = rlax.discounted_returns(rewards_T, discounts_T, np.zeros(LENGTH, np.float32))
    torch.testing.assert_close(rewards.return_B(batch), torch.tensor(theirs_T.tolist()))


@pytest.mark.parametrize("family", ["mlp", "squashed"])
def test_densities_and_their_gradients_are_those_of_stable_baselines(family):
    """Theirs is of actions in [-1, 1]; ours of the robot's units adds the constant log of the range."""
    distributions = pytest.importorskip("stable_baselines3.common.distributions")
    settings = {"width": 16, "num_layers": 1, "horizon": 2, "action_dim": 2, "instruction_dim": 0, "log_std": -0.7}
    policy = build(family, {"reads": READS, **settings})
    seen = {"observation.state": numbers(50, 3, seed=3), "action": numbers(50, 2, seed=6) * (0.5, 2.0) + (0.0, 1.0)}
    policy.set_statistics({name: Statistics.of(rows) for name, rows in seen.items()})
    obs = {"observation.state": torch.tensor(numbers(20, 3, seed=4))}
    noise = {"action": torch.tensor(numbers(20, 2, 2, seed=5))}
    chunk = Chunk(policy.act(obs, noise).actions_BHA.detach())
    mean_BHA, std_BHA = policy._distribution(obs)
    if family == "squashed":
        theirs = distributions.SquashedDiagGaussianDistribution(2, epsilon=1e-9)
        half_A, actions_BHA = policy.scale.half_A, policy.scale.normalise(chunk.actions_BHA)
    else:
        theirs, half_A, actions_BHA = distributions.DiagGaussianDistribution(2), torch.ones(2), chunk.actions_BHA
    log_std_BHA = std_BHA.log().expand_as(mean_BHA)
    theirs.proba_distribution(mean_BHA.flatten(0, 1), log_std_BHA.flatten(0, 1))
    expected_BH = theirs.log_prob(actions_BHA.flatten(0, 1)).view(20, 2) - half_A.log().sum()
    ours_BH = policy.log_prob(obs, chunk)
    torch.testing.assert_close(ours_BH, expected_BH, rtol=1e-4, atol=1e-4)
    weights = [p for p in policy.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(log_prob.mean(), weights, allow_unused=True) for log_prob in (ours_BH, expected_BH)]
    assert any(gradient is not None and gradient.abs().max() > 0.01 for gradient in gradients[0])
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


def test_target_networks_follow_as_those_of_stable_baselines():
    utils = pytest.importorskip("stable_baselines3.common.utils")
    torch.manual_seed(7)
    critic = build_critic("causal", {"reads": READS, "action_dim": 2, "horizon": 3, "instruction_dim": 0, "width": 8})
    target, theirs = Target(critic, 0.05), copy.deepcopy(critic)
    for _ in range(3):
        for weight in critic.parameters():
            weight.data += torch.randn(weight.shape)
        target.follow()
        utils.polyak_update(critic.parameters(), theirs.parameters(), 0.05)
    torch.testing.assert_close(list(target.module.parameters()), list(theirs.parameters()))
    assert all(not torch.equal(a, b) for a, b in zip(target.module.parameters(), critic.parameters(), strict=True))
