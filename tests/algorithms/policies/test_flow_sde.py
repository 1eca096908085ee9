"""Transitions of flow policies against numbers that were computed elsewhere, and against exact Gaussian chains."""

import math

import pytest
import torch

from algorithms.policies.flow_sde import log_normal, normal_kl, sde_step, sigmas, times

MEAN, STD = 0.8, 0.3  # of the data in chains whose velocity is known


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_golden_step():
    """Flow-GRPO's step at t = .6 of ten, a = .7, x = 1, v = .5."""
    t, sigma = times(10)[4], sigmas(10, 0.7)[4]
    mean, std = sde_step(tensor(1.0), tensor(0.5), t, 0.1, sigma)
    torch.testing.assert_close(t, torch.tensor(0.6, dtype=torch.float64))
    for value, golden in ((sigma, 0.857321), (mean, 0.876500), (std, 0.271109), (log_normal(tensor(0.9), mean, std), 0.382540)):
        assert value.item() == pytest.approx(golden, abs=6e-7)


def test_the_same_step_written_by_its_ends():
    """RLinf's form of the mean: a mix of the data and of the noise that the velocity points at."""
    g = torch.Generator().manual_seed(0)
    for num_steps, a in ((4, 0.5), (10, 0.7), (40, 1.0)):
        t, sigma, d = times(num_steps), sigmas(num_steps, a), 1 / num_steps
        x, v = torch.randn(2, num_steps, dtype=torch.float64, generator=g)
        data, noise = x - v * t, x + v * (1 - t)
        mixed = data * (1 - (t - d)) + noise * (t - d - sigma**2 * d / (2 * t))
        torch.testing.assert_close(sde_step(x, v, t, d, sigma)[0], mixed, rtol=0, atol=1e-15)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_every_step_has_a_finite_spread(num_steps):
    sigma = sigmas(num_steps, 0.7)
    assert sigma[0].item() == pytest.approx(0.7 * math.sqrt(num_steps))  # the next time's denominator, 1 / K
    mean, std = sde_step(
        torch.zeros(num_steps).double(), torch.ones(num_steps).double(), times(num_steps), 1 / num_steps, sigma
    )
    assert (std > 0).all() and torch.isfinite(mean).all() and torch.isfinite(log_normal(mean, mean, std)).all()


def velocity(x, t):
    """E[e - x_0 | x_t = x] where the data are N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def end_of_chain(num_steps, a):
    """Mean and standard deviation at t = 0, exactly: each step is affine in x."""
    mean, variance = tensor(0.0), tensor(1.0)
    for t, sigma in zip(times(num_steps), sigmas(num_steps, a), strict=True):
        (at_zero, std), (at_one, _) = (sde_step(x, velocity(x, t), t, 1 / num_steps, sigma) for x in tensor([0.0, 1.0]).T)
        slope = at_one - at_zero
        mean, variance = at_zero + slope * mean, slope**2 * variance + std**2
    return mean.item(), variance.sqrt().item()


@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 1.0])
def test_many_steps_end_at_the_data_however_they_are_drawn(a):
    mean, std = end_of_chain(400, a)
    assert mean == pytest.approx(MEAN, abs=2e-3) and 0.2985 < std < 0.3005


@pytest.mark.parametrize(("a", "golden"), [(0.0, 0.247), (0.5, 0.271), (0.7, 0.281)])
def test_ten_steps_have_a_known_bias(a, golden):
    assert end_of_chain(10, a)[1] == pytest.approx(golden, abs=1.2e-3)  # those were drawn


def test_kl_is_that_of_gaussians():
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 6, dtype=torch.float64, generator=g)
    stds = torch.rand(2, 6, dtype=torch.float64, generator=g) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(one, stds[0]), torch.distributions.Normal(other, stds[1])
    )
    torch.testing.assert_close(normal_kl(one, stds[0], other, stds[1]), expected)
    t, d = times(10), 0.1
    sigma = sigmas(10, 0.7)
    x, v, v_other = torch.randn(3, 10, dtype=torch.float64, generator=g)
    (mean, std), (mean_other, _) = sde_step(x, v, t, d, sigma), sde_step(x, v_other, t, d, sigma)
    by_velocity = d / 2 * (1 / sigma + sigma * (1 - t) / (2 * t)) ** 2 * (v - v_other) ** 2
    torch.testing.assert_close(normal_kl(mean, std, mean_other, std), by_velocity)
