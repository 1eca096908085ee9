"""Chunks that continue the one before, by a policy that was not trained for it."""

import pytest
import torch

from algorithms.policies.flow_rtc import continue_chunk, guidance_weight, guided_velocity, soft_weights
from algorithms.policies.registry import build
from fleet.errors import PolicyError
from tests.algorithms.policies.cases import A, B, H, make, observe


def test_golden_weights():
    golden = [1, 1, 0.570589, 0.287072, 0.114492, 0.025770, 0, 0, 0, 0]
    torch.testing.assert_close(soft_weights(2, 6, 10), torch.tensor(golden).double(), rtol=0, atol=6e-7)
    assert torch.equal(soft_weights(0, 0, 3), torch.zeros(3).double()) and torch.equal(
        soft_weights(3, 3, 3), torch.ones(3).double()
    )
    times = torch.tensor([1.0, 0.9, 0.5, 0.1])  # of a paper whose time runs the other way: 0, .1, .5, .9
    torch.testing.assert_close(guidance_weight(times, 5.0), torch.tensor([5.0, 5, 2, 5]))
    assert guidance_weight(times, 100.0)[1].item() == pytest.approx(0.82 / 0.09)


def test_the_pull_goes_through_the_network():
    """Of the linear field v = x M it is known: J = I - t M. A detached network would give J = I."""
    g = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(A, A, generator=g), torch.randn(B, H, A, generator=g)
    known, weight, t = torch.randn(B, H, A, generator=g), torch.tensor([1.0, 1, 0.5, 0]), 0.5
    with torch.no_grad():
        v = guided_velocity(lambda x, time: (x @ matrix, None), x, torch.full((B,), t), known, weight, 5.0)
    jacobian = torch.eye(A) - t * matrix
    pull = ((known - x @ jacobian) * weight[:, None]) @ jacobian.T
    torch.testing.assert_close(v, x @ matrix - 2 * pull)


def test_a_chunk_follows_the_one_before():
    policy, many = make("flow"), build("flow", {**make("flow").config, "num_steps": 100})
    many.load_state_dict(policy.state_dict())
    obs = observe(policy.spec)
    with torch.inference_mode():
        free = policy.act(obs).actions_BHA
        before = free + torch.linspace(1, 2, B)[:, None, None]
        torch.testing.assert_close(continue_chunk(policy, obs, before, 0, H).actions_BHA, free)  # nothing is left of it
        bound = continue_chunk(many, obs, before, 2, 1).actions_BHA
    away = (bound - many.act(obs).actions_BHA).norm(dim=-1).mean(0)
    left = (bound - before).norm(dim=-1).mean(0) / (many.act(obs).actions_BHA - before).norm(dim=-1).mean(0)
    assert (left[:2] < 0.15).all() and left[2] > left[0] and away[0] > away[3]
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize(("delay", "execute", "horizon"), [(3, 2, H), (-1, 2, H), (0, 2, H + 1)])
def test_refusals(delay, execute, horizon):
    policy = make("flow")
    with pytest.raises(PolicyError, match="delay"):
        continue_chunk(policy, observe(policy.spec), torch.zeros(B, horizon, A), delay, execute)
