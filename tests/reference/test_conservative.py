"""Conservative gaps and expectiles against d3rlpy's CQL, Cal-QL and IQL, and torchrl's: the same networks, the same rows, the
same sampled actions, in float64. d3rlpy's losses are read from its own objects, as its training calls them."""

from __future__ import annotations

import pytest
import torch

from algorithms.conservative import conservative_gap
from algorithms.expectile import advantage_weights, expectile_loss

NUM, SAMPLES, STATE_DIM, ACTION_DIM, WEIGHT = 32, 5, 3, 2, 2.5


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learner(config):
    """d3rlpy's implementation with networks of its own; the learnt factor of CQL stands at 1."""
    torch.manual_seed(1)
    algorithm = config.create(device=False)
    algorithm.create_impl((STATE_DIM,), ACTION_DIM)
    return algorithm.impl


def batch_of(torch_utility):
    draw = torch.Generator().manual_seed(2)
    obs, after = (torch.randn(NUM, STATE_DIM, generator=draw) for _ in range(2))
    actions = torch.rand(NUM, ACTION_DIM, generator=draw) * 2 - 1
    rewards, returns = torch.randn(NUM, 1, generator=draw), 0.3 * torch.randn(NUM, 1, generator=draw)
    ends = (torch.rand(NUM, 1, generator=draw) < 0.3).double()
    return torch_utility.TorchMiniBatch(obs, actions, rewards, after, actions, returns, ends, torch.ones(NUM, 1), "cpu:0")


@pytest.mark.parametrize("name", ["CQL", "CalQL"])
def test_the_gap_and_its_gradient_are_those_of_d3rlpy(name, monkeypatch):
    """Theirs is over uniform actions and the policy's of this state and the next, each with its density."""
    algos, torch_utility = pytest.importorskip("d3rlpy.algos"), pytest.importorskip("d3rlpy.torch_utility")
    settings = {"conservative_weight": WEIGHT, "alpha_threshold": 0.0, "initial_alpha": 1.0, "alpha_learning_rate": 0.0}
    impl = learner(getattr(algos, f"{name}Config")(n_action_samples=SAMPLES, **settings))
    batch = batch_of(torch_utility)
    judged, densities, forwarder = [], [], impl._q_func_forwarder
    compute, sample = forwarder.compute_expected_q, type(impl)._compute_policy_is_values

    def see_actions(obs, actions, reduction):
        judged.append(actions)
        return compute(obs, actions, reduction)

    def see_densities(*args, **kwargs):
        values, log_density = sample(impl, *args, **kwargs)
        densities.append(log_density[0])
        return values, log_density

    monkeypatch.setattr(forwarder, "compute_expected_q", see_actions)
    monkeypatch.setattr(impl, "_compute_policy_is_values", see_densities)
    theirs_K = impl._compute_conservative_loss(batch.observations, batch.actions, batch.next_observations, batch.returns_to_go)
    monkeypatch.undo()

    *sampled, data = judged
    assert torch.equal(data, batch.actions) and len(sampled) == 3
    uniform = torch.full((NUM, SAMPLES), 0.5**ACTION_DIM).log()
    repeated = batch.observations.repeat_interleave(SAMPLES, 0)
    values_KBN = torch.cat([compute(repeated, actions, "none").view(-1, NUM, SAMPLES) for actions in sampled], 2)
    gap_KB = conservative_gap(
        values_KBN,
        compute(batch.observations, batch.actions, "none")[..., 0],
        bound_B=batch.returns_to_go[:, 0] if name == "CalQL" else None,
        bounded_N=torch.arange(3 * SAMPLES) < 2 * SAMPLES,
        log_density_BN=torch.cat([*densities, uniform], 1),
    )
    torch.testing.assert_close(WEIGHT * gap_KB.mean(1), theirs_K)
    below = (values_KBN[..., : 2 * SAMPLES] < batch.returns_to_go).double().mean()
    assert 0.2 < below < 0.8  # the bound decides for some samples, and for some it does not
    weights = list(impl.q_function.parameters())
    ours, expected = (torch.autograd.grad(loss, weights) for loss in (WEIGHT * gap_KB.mean(1).sum(), theirs_K.sum()))
    assert all(gradient.abs().max() > 0 for gradient in expected[:-1])
    torch.testing.assert_close(ours, expected)


def test_values_and_weights_are_those_of_d3rlpys_iql():
    algos, torch_utility = pytest.importorskip("d3rlpy.algos"), pytest.importorskip("d3rlpy.torch_utility")
    impl = learner(algos.IQLConfig(expectile=0.8, weight_temp=30.0, max_weight=20.0))
    batch = batch_of(torch_utility)
    q_B = impl._targ_q_func_forwarder.compute_expected_q(batch.observations, batch.actions, "min")[:, 0].detach()
    difference_B = q_B - impl._modules.value_func(batch.observations)[:, 0]
    assert (difference_B > 0).any() and (difference_B < 0).any()
    loss, theirs = expectile_loss(difference_B, 0.8).mean(), impl.compute_value_loss(batch)
    torch.testing.assert_close(loss, theirs)
    weights = list(impl._modules.value_func.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, weights, retain_graph=True), torch.autograd.grad(theirs, weights))
    weight_B = advantage_weights(difference_B, 30.0, 20.0)
    assert (weight_B > 19.99).any() and (weight_B < 19.99).any()
    torch.testing.assert_close(weight_B, impl._compute_weight(batch)[:, 0])


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.95])
def test_the_expectile_is_that_of_torchrl(tau):
    objectives = pytest.importorskip("torchrl.objectives")
    difference_B = torch.randn(100, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(expectile_loss(difference_B, tau), objectives.IQLLoss.loss_value_diff(difference_B, tau))
