import pytest
import torch

from algorithms.conservative import conservative_gap
from algorithms.expectile import advantage_weights, expectile_loss

# Two uniform samples, two of the policy in the next state, two of it in this one; densities of the policy's are given.
VALUES = torch.tensor([0.0, 3.0, 0.5, 1.5, 1.0, 2.0], dtype=torch.float64)
DENSITY = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.25], dtype=torch.float64)
POLICYS = torch.tensor([False, False, True, True, True, True])


def gap(values=VALUES, data=1.2, **given):
    return conservative_gap(values[None, None], torch.tensor([[data]], dtype=torch.float64), **given)[0, 0]


def test_cql_and_cal_ql_in_numbers():
    given = {"log_density_BN": DENSITY.log()[None], "bounded_N": POLICYS}
    assert gap(**given).item() == pytest.approx(3.293397, abs=1e-6)
    assert gap(**given, bound_B=torch.tensor([1.6])).item() == pytest.approx(3.419522, abs=1e-6)
    assert gap(**given, bound_B=torch.tensor([-torch.inf])).item() == gap(**given).item()  # Cal-QL without a bound is CQL


def test_samples_without_densities():
    assert gap(VALUES[:1]).item() == pytest.approx(-1.2)  # one sample: Q(s, pi(s)) - Q(s, c)
    assert gap(VALUES, temperature=1e-6).item() == pytest.approx(3 - 1.2, abs=1e-4)  # T -> 0: the largest
    assert gap(VALUES, temperature=1e6).item() == pytest.approx(VALUES.mean().item() - 1.2, abs=1e-4)
    assert gap(VALUES.repeat(7)).item() == pytest.approx(gap(VALUES).item())  # how many are drawn does not matter


def test_a_value_below_what_was_reached_is_not_pushed_down():
    values = VALUES.clone().requires_grad_()
    gap(values, bound_B=torch.tensor([1.2])).backward()
    assert ((values.grad == 0) == (VALUES < 1.2)).all() and (values.grad >= 0).all()
    unknown = gap(VALUES, bound_B=torch.tensor([-torch.inf]))
    assert torch.isfinite(unknown) and unknown == gap(VALUES)


def test_each_critic_and_state_has_its_own_gap():
    g = torch.Generator().manual_seed(0)
    values, data, bound = (torch.randn(*n, generator=g) for n in ((3, 4, 5), (3, 4), (4,)))
    whole = conservative_gap(values, data, bound_B=bound, temperature=0.7)
    for k in range(3):
        for b in range(4):
            lifted = torch.maximum(values[k, b], bound[b])
            expected = 0.7 * torch.log(torch.exp(lifted / 0.7).mean()) - data[k, b]
            torch.testing.assert_close(whole[k, b], expected)


def test_iql_in_numbers():
    difference = torch.tensor([0.5, -0.5], dtype=torch.float64)
    assert expectile_loss(difference, 0.7).mean().item() == pytest.approx(0.125)
    assert advantage_weights(difference, 3.0).tolist() == pytest.approx([4.481689, 0.223130], abs=1e-6)


def test_an_expectile_of_one_half_is_the_mean_and_near_one_the_largest():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(100, generator=g)
    torch.testing.assert_close(expectile_loss(values, 0.5), 0.5 * values**2)
    grid = torch.linspace(-5, 5, 1001)

    def best(tau):
        return grid[expectile_loss(values[:, None] - grid, tau).mean(0).argmin()].item()

    assert best(0.5) == pytest.approx(values.mean().item(), abs=0.01)
    assert best(0.5) < best(0.7) < best(0.9) < best(0.999999) == pytest.approx(values.max().item(), abs=0.01)


def test_weights_have_a_largest_one_and_no_overflow():
    weights = advantage_weights(torch.tensor([-1e30, 0.0, 1.5, 1e30]), 3.0, 50.0)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 50.0, 50.0]))
