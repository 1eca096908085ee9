import dataclasses

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.distributions.transforms import AffineTransform

from algorithms.policies.base import Chunk
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError
from fleet.spec import ACTION, STATE

CONFIG = {"reads": {STATE: [6]}, "action_dim": 2, "horizon": 4, "width": 32, "instruction_dim": 0}
B, H, A = 5, 4, 2


def _policy(seed=0, **changes):
    """Every weight moved, so that means and deviations differ by row."""
    torch.manual_seed(seed)
    policy = build("squashed", {**CONFIG, **changes})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def _obs(batch=B):
    return {STATE: torch.randn(batch, 6, generator=torch.Generator().manual_seed(1))}


def _noise(policy, batch=B, seed=0):
    return policy.noise(batch, torch.Generator().manual_seed(seed))


def _known(low, high):
    """Statistics of actions between the two, most of them in the middle."""
    middle = (np.asarray(low) + np.asarray(high)) / 2
    actions = np.concatenate([np.repeat(middle[None], 500, 0), [low], [high]])
    return {STATE: Statistics.of(np.array([[-1.0] * 6, [1.0] * 6])), ACTION: Statistics.of(actions)}


def test_density_is_that_of_the_squashed_gaussian_in_the_robots_units():
    policy = _policy()
    policy.set_statistics(_known([-3.0, 0.1], [1.0, 0.2]))
    mean, std = policy._distribution(_obs())
    assert std.std() > 0.01 and mean.std() > 0.1
    squashed = TransformedDistribution(
        Normal(mean, std), [TanhTransform(), AffineTransform(policy.scale.center_A, policy.scale.half_A)]
    )
    chunk = policy.act(_obs(), _noise(policy))
    torch.testing.assert_close(chunk.log_prob_BT, squashed.log_prob(chunk.actions_BHA).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.act(_obs()).actions_BHA, policy.scale.restore(mean.tanh()))


def test_density_integrates_to_one():
    policy = _policy(action_dim=1, horizon=1, bounds=[-0.5, 2.0])
    grid = torch.linspace(-0.49999, 1.99999, 20_001)
    obs = {STATE: _obs(1)[STATE].expand(len(grid), 6)}
    with torch.no_grad():
        density = policy.log_prob(obs, Chunk(grid[:, None, None])).exp()[:, 0]
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=2e-3)


def test_samples_are_within_the_range_and_of_the_stated_deviation(scale):
    policy, num = _policy(bounds=[-0.1, 0.3]), 4000 * scale
    obs = {STATE: _obs(1)[STATE].expand(num, 6)}
    with torch.no_grad():
        actions = policy.act(obs, _noise(policy, num)).actions_BHA
        mean, std = (value[0] for value in policy._distribution(obs))
    assert actions.min() >= -0.1 and actions.max() <= 0.3
    before = ((actions - 0.1) / 0.2).atanh()
    torch.testing.assert_close(before.std(0), std, rtol=0.1, atol=0)
    torch.testing.assert_close(before.mean(0), mean, rtol=0, atol=0.1)


def test_gradients_of_a_draw_are_those_of_finite_differences():
    policy, obs = _policy(), _obs()
    policy.set_statistics(_known([-3.0, 0.1], [1.0, 0.2]))
    noise = _noise(policy)

    def value():  # what an actor's loss is made of: the action, and the density of it
        chunk = policy.act(obs, noise)
        return (chunk.actions_BHA * torch.tensor([1.0, -20.0])).sum() + 0.3 * chunk.log_prob_BT.sum()

    value().backward()
    for parameter, index in ((policy.head.bias, 3), (policy.spread.bias, 5)):
        around = []
        for step in (1e-2, -2e-2):
            with torch.no_grad():
                parameter[index] += step
                around.append(value().item())
        with torch.no_grad():
            parameter[index] += 1e-2
        assert parameter.grad[index].item() == pytest.approx((around[0] - around[1]) / 2e-2, rel=2e-2)


def test_range_is_of_the_data_widened_or_of_the_bounds():
    known = _known([-1.0, 0.5], [1.0, 0.7])
    policy = _policy()
    policy.set_statistics(known)
    torch.testing.assert_close(policy.scale.center_A, torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(policy.scale.half_A, torch.tensor([1.1, 0.11]))  # the rare ends count: others could not be said
    bounded = _policy(bounds=[-2.0, 1.0])
    for _ in range(2):  # before and after there is data
        assert bounded.scale.center_A.tolist() == [-0.5, -0.5] and bounded.scale.half_A.tolist() == [1.5, 1.5]
        bounded.set_statistics(known)
    still = _policy()
    still.set_statistics(_known([-1.0, 50.0], [1.0, 50.0]))
    actions = still.act(_obs(), _noise(still))
    assert (actions.actions_BHA[..., 1] - 50).abs().max() <= 5e-3 + 1e-5  # what does not move in the data stays nearly still
    assert torch.isfinite(actions.log_prob_BT).all() and actions.log_prob_BT.abs().max() < 100


def test_demonstrations_at_and_beyond_the_bounds_are_finite():
    policy = _policy(bounds=[-1.0, 1.0])
    inside, at, beyond = (Chunk(torch.full((B, H, A), value)) for value in (0.99999, 1.0, 7.0))
    for chunk in (at, beyond):
        policy.zero_grad()
        log_prob = policy.log_prob(_obs(), chunk)
        torch.testing.assert_close(log_prob, policy.log_prob(_obs(), inside), rtol=1e-3, atol=1e-2)
        log_prob.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in policy.parameters())
    torch.testing.assert_close(*(policy.imitation_loss(_obs(), chunk, torch.ones(B, H)) for chunk in (at, beyond)))


def test_a_gradient_is_left_at_the_ends_of_mean_and_deviation():
    policy = _policy()
    with torch.no_grad():
        policy.head.bias.fill_(8.0)
        policy.spread.bias.fill_(4.0)
    mean, std = policy._distribution(_obs())
    assert mean.max() <= 4 and std.max() <= 1
    policy.act(_obs(), _noise(policy)).log_prob_BT.sum().backward()
    assert (policy.head.bias.grad.abs() > 0).all() and (policy.spread.bias.grad.abs() > 0).all()
    assert (policy.head.bias.grad > 0).all()  # the entropy bonus leads back from the bound


def test_the_expected_ratio_of_another_policy_is_1(scale):
    one, other, num = _policy(), _policy(), 20_000 * scale
    with torch.no_grad():
        for policy in (one, other):
            policy.spread.weight.mul_(0.1)  # a tiny deviation makes a ratio whose mean takes for ever
        other.head.bias.add_(0.03)
        other.spread.bias.sub_(0.1)
        obs = {STATE: _obs(1)[STATE].expand(num, 6)}
        chunk = one.act(obs, _noise(one, num))
        ratio = (other.log_prob(obs, chunk) - chunk.log_prob_BT).exp()
    assert ratio.std() > 0.1
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / num**0.5).all()


def test_the_deviation_begins_as_stated_everywhere():
    torch.manual_seed(0)
    policy = build("squashed", {**CONFIG, "log_std": -1.5})
    torch.testing.assert_close(policy._distribution(_obs())[1].log(), torch.full((B, H, A), -1.5))


def test_the_imitation_loss_is_on_the_scale_of_the_network_and_leaves_the_deviation_alone():
    policy = _policy(bounds=[-2.0, 6.0])
    mean = policy.act(_obs()).actions_BHA.detach()
    mask = (torch.arange(H) < torch.tensor([4, 1, 2, 0, 3])[:, None]).float()
    loss = policy.imitation_loss(_obs(), Chunk(mean - 0.4 * (mean - 2).sign()), mask)
    torch.testing.assert_close(loss, 0.1 * (mask.sum(1) > 0), atol=1e-5, rtol=0)
    loss.sum().backward()
    assert policy.spread.weight.grad is None and policy.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bounds": [1.0, -1.0]}, "[1.0, -1.0]"),
        ({"bounds": [-1.0]}, "[-1.0]"),
        ({"log_std": 0.5}, "log_std is 0.5"),
        ({"reads": {}}, "reads is not empty"),
        ({"horizon": 0}, "sizes are at least 1"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(PolicyError) as caught:
        build("squashed", {**CONFIG, **changes})
    assert said in str(caught.value)


def test_statistics_of_the_actions_are_checked():
    known = _known([-1.0, -1.0], [1.0, 1.0])
    for changes in ({}, {"bounds": [-1.0, 1.0]}):
        policy = _policy(**changes)
        with pytest.raises(PolicyError, match=ACTION):
            policy.set_statistics({STATE: known[STATE]})
        with pytest.raises(PolicyError, match="finite"):
            policy.set_statistics({**known, ACTION: dataclasses.replace(known[ACTION], low=np.full(2, np.nan))})
