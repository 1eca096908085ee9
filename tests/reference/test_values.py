"""Two-hot targets, expectations and their cross-entropy against rlax's distributional values; chunked IQL's critics and state
values against d3rlpy's."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from algorithms.base import DataFacts
from algorithms.chunked_rl import ChunkedRl, ChunkedRlConfig
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from algorithms.values import cross_entropy, expectation, two_hot
from tests.reference.chunks import ACTION_DIM, NUM, STATE, STATE_DIM, as_n_step, numbers, windows

LOW, HIGH, BINS = -1.0, 0.0, 201
HORIZON, DISCOUNT, EXPECTILE = 3, 0.9, 0.8


def test_two_hot_is_the_projection_of_rlax():
    """Also of values beyond the range, and of the bins' own values."""
    rlax = pytest.importorskip("rlax")
    bins_V = torch.linspace(LOW, HIGH, BINS, dtype=torch.float64)
    value_B = torch.cat([torch.tensor([-0.3337, -1.7, 0.4, -1.0, 0.0], dtype=torch.float64), bins_V[[7, 100]]])
    hot_BV = two_hot(value_B, LOW, HIGH, BINS)
    for row, value in enumerate(value_B):
        theirs_V = rlax.categorical_l2_project(np.array([float(value)]), np.array([1.0]), bins_V.numpy())
        torch.testing.assert_close(hot_BV[row], torch.tensor(theirs_V.tolist(), dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # theirs is to move to another library
def test_the_cross_entropy_and_its_gradient_are_those_of_rlax():
    rlax, jax = pytest.importorskip("rlax"), pytest.importorskip("jax")
    draw = torch.Generator().manual_seed(0)
    logits_BV = (3 * torch.randn(5, BINS, generator=draw, dtype=torch.float64)).requires_grad_()
    value_B = -torch.rand(5, generator=draw, dtype=torch.float64)
    hot_BV = two_hot(value_B, LOW, HIGH, BINS)
    loss_B = cross_entropy(logits_BV, hot_BV)
    (gradient_BV,) = torch.autograd.grad(loss_B.sum(), logits_BV)
    for row in range(5):
        inputs = hot_BV[row].numpy(), logits_BV[row].detach().numpy()
        loss, gradient_V = jax.value_and_grad(rlax.categorical_cross_entropy, argnums=1)(*inputs)
        assert loss_B[row].item() == pytest.approx(float(loss), rel=1e-9)
        torch.testing.assert_close(gradient_BV[row], torch.tensor(gradient_V.tolist(), dtype=torch.float64))
        mean = rlax.transform_from_2hot(jax.nn.softmax(inputs[1]), LOW, HIGH, BINS)
        ours = expectation(logits_BV[row : row + 1], torch.linspace(LOW, HIGH, BINS, dtype=torch.float64))
        assert ours.item() == pytest.approx(float(mean[0]), rel=1e-9)


class Member:
    """One critic of an ensemble, as d3rlpy's networks of Q functions are called."""

    def __init__(self, critic, number):
        self._critic, self._number = critic, number

    def __call__(self, obs, actions_BE):
        chunk_BHA = self._critic.scale.restore(actions_BE.unflatten(1, (-1, ACTION_DIM)))
        return types.SimpleNamespace(q_value=self._critic({STATE: obs}, chunk_BHA)[self._number][:, None])


def iql():
    """The algorithm, its target no longer like its critics."""
    torch.manual_seed(5)
    settings = {"width": 32, "num_layers": 1, "horizon": HORIZON, "action_dim": ACTION_DIM, "instruction_dim": 0}
    policy = build("mlp", {"reads": {STATE: (STATE_DIM,)}, **settings})
    seen = {STATE: numbers(90, STATE_DIM, seed=6).numpy(), "action": numbers(90, ACTION_DIM, seed=7).numpy()}
    data = DataFacts(statistics={name: Statistics.of(rows) for name, rows in seen.items()})
    networks = {"critic": {"width": 32, "num_layers": 2}, "value": {"width": 32, "num_layers": 2}}
    settings = {"method": "iql", "reward": "environment", "discount": DISCOUNT, "expectile": EXPECTILE, **networks}
    algorithm = ChunkedRl(policy, ChunkedRlConfig(batch_size=NUM, num_critics=2, **settings), data)
    for weight in algorithm._target.module.parameters():
        weight.data += 0.05 * torch.randn(weight.shape)
    return algorithm


def test_losses_and_gradients_of_iql_are_those_of_d3rlpy():
    """Of the same networks, in float32 as ours compute. Their loss of the critics is a sum over the ensemble, ours the mean."""
    impl_module = pytest.importorskip("d3rlpy.algos.qlearning.torch.iql_impl")
    from d3rlpy.models.torch import q_functions
    from d3rlpy.torch_utility import TorchMiniBatch

    algorithm = iql()
    batch = algorithm.prepare(windows(HORIZON))
    actions, ends, rewards, discounts = as_n_step(batch, algorithm.critic.scale, DISCOUNT)
    intervals = discounts.log() / np.log(DISCOUNT)

    def ensemble(critic):
        members = [q_functions.ContinuousMeanQFunctionForwarder(Member(critic, number)) for number in range(2)]
        return q_functions.ContinuousEnsembleQFunctionForwarder(members, actions.shape[1])

    impl = object.__new__(impl_module.IQLImpl)
    impl._q_func_forwarder, impl._targ_q_func_forwarder = ensemble(algorithm.critic), ensemble(algorithm._target.module)
    impl._modules = types.SimpleNamespace(value_func=lambda obs: algorithm.value({STATE: obs})[:, None])
    impl._gamma, impl._expectile = DISCOUNT, EXPECTILE
    after = batch.obs_at[HORIZON][STATE]
    theirs = TorchMiniBatch(batch.obs[STATE], actions, rewards, after, actions, rewards, ends, intervals, "cpu:0")
    expected = impl.compute_critic_loss(theirs, impl.compute_target(theirs))

    for name, loss, module in (("critic", expected.q_loss / 2, algorithm.critic), ("value", expected.v_loss, algorithm.value)):
        out, weights = algorithm.loss(name, batch), list(module.parameters())
        torch.testing.assert_close(out.sum / out.weight, loss)
        ours = torch.autograd.grad(out.sum / out.weight, weights)
        torch.testing.assert_close(ours, torch.autograd.grad(loss, weights), rtol=1e-4, atol=1e-5)
        assert all(gradient.abs().max() > 1e-3 for gradient in ours[-2:])
