"""RLPD in its plainest form is SAC: one step of stable-baselines3's ``SAC.train`` on the same rows, networks and noise.

Their actor and critics are ours behind their interface, so that weights can be compared after a step of plain gradient
descent; density, target, losses, order and gradients are theirs. Of a chunk they are shown what their n-step buffer would hold:
the discounted sum of its rewards and the discount of what follows.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import rlpd
from algorithms.base import DataFacts
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from tests.reference.chunks import ACTION_DIM, NUM, STATE, STATE_DIM, as_n_step, numbers, windows

DISCOUNT, RATE, TAU, ALPHA = 0.9, 0.05, 0.1, 0.3


def made(horizon):
    """The algorithm, its target no longer like its critics."""
    torch.manual_seed(5)
    settings = {"width": 32, "num_layers": 1, "horizon": horizon, "action_dim": ACTION_DIM, "instruction_dim": 0}
    policy = build("squashed", {"reads": {STATE: (STATE_DIM,)}, "log_std": -1.0, **settings})
    seen = {STATE: numbers(90, STATE_DIM, seed=6).numpy(), "action": numbers(90, ACTION_DIM, seed=7).numpy()}
    statistics = {name: Statistics.of(rows) for name, rows in seen.items()}
    policy.set_statistics(statistics)
    config = rlpd.RlpdConfig(
        batch_size=NUM, utd=1, reward="environment", discount=DISCOUNT, num_critics=2, num_targets=2, tau=TAU,
        actor_q="min", temperature=ALPHA, critic={"width": 32, "num_layers": 2},
    )  # fmt: skip
    algorithm = rlpd.Rlpd(policy, config, DataFacts(statistics=statistics))
    for weight in algorithm._target.module.parameters():
        weight.data += 0.05 * torch.randn(weight.shape)
    return algorithm


class Actor(nn.Module):
    def __init__(self, policy, noises, distribution):
        super().__init__()
        self.policy, self._noises, self._distribution = policy, iter(noises), distribution
        self.optimizer = torch.optim.SGD(policy.parameters(), RATE)

    def action_log_prob(self, obs):
        """Actions on [-1, 1]; of SAC.train's two calls the first is for these states, the second for those that follow."""
        mean_BHA, std_BHA = self.policy._distribution({STATE: obs})
        self._distribution.proba_distribution(mean_BHA.flatten(1), std_BHA.log().flatten(1))
        before_BE = (mean_BHA + std_BHA * next(self._noises)["action"]).flatten(1)
        return before_BE.tanh(), self._distribution.log_prob(before_BE.tanh(), before_BE)


class Critic(nn.Module):
    def __init__(self, critic, scale):
        super().__init__()
        self.critic, self._scale = critic, scale
        self.optimizer = torch.optim.SGD(critic.parameters(), RATE)

    def forward(self, obs, actions_BE):
        chunk_BHA = self._scale.restore(actions_BE.unflatten(1, (-1, ACTION_DIM)))
        return tuple(value_B[:, None] for value_B in self.critic({STATE: obs}, chunk_BHA))


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_step_is_that_of_stable_baselines(horizon, monkeypatch):
    sb3, spaces = pytest.importorskip("stable_baselines3"), pytest.importorskip("gymnasium.spaces")
    from gymnasium import Env
    from stable_baselines3.common import logger, type_aliases

    monkeypatch.setattr(rlpd, "_TEMPERATURE", rlpd._ACTOR)  # theirs learns from the policy's draws
    algorithm = made(horizon)
    batch = algorithm.prepare(windows(horizon))
    scale, size = algorithm.parts["policy"].module.scale, horizon * ACTION_DIM

    class Nowhere(Env):
        observation_space = spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
        action_space = spaces.Box(-1, 1, (size,), np.float32)

    sac = sb3.SAC(
        "MlpPolicy", Nowhere(), RATE, 10, tau=TAU, gamma=DISCOUNT, ent_coef=f"auto_{ALPHA}",
        target_entropy=-0.5 * size, device="cpu", policy_kwargs={"net_arch": [4]},
    )  # fmt: skip
    sac.set_logger(logger.Logger(None, []))
    noises = [algorithm._noise(algorithm._policy, batch, stream) for stream in (rlpd._ACTOR, rlpd._TARGET)]
    density = sb3.common.distributions.SquashedDiagGaussianDistribution(size, epsilon=1e-9)
    theirs = {name: copy.deepcopy(part.module) for name, part in algorithm.parts.items()}
    sac.actor, sac.critic = Actor(theirs["policy"], noises, density), Critic(theirs["critic"], scale)
    sac.critic_target = Critic(copy.deepcopy(algorithm._target.module).requires_grad_(True), scale)
    sac.ent_coef_optimizer = torch.optim.SGD([sac.log_ent_coef], RATE)
    actions, ends, rewards, discounts = as_n_step(batch, scale, DISCOUNT)
    samples = type_aliases.ReplayBufferSamples(
        batch.obs[STATE], actions, batch.obs_at[horizon][STATE], ends, rewards, discounts
    )
    monkeypatch.setattr(sac.replay_buffer, "sample", lambda *args, **kwargs: samples)
    sac.train(1, NUM)

    losses, gradients = {}, {}
    for name in ("temperature", "critic", "policy"):
        out, weights = algorithm.loss(name, batch), list(algorithm.parts[name].module.parameters())
        losses[name] = out.sum / out.weight
        gradients[name] = torch.autograd.grad(losses[name], weights)
        for weight, gradient in zip(weights, gradients[name], strict=True) if name != "temperature" else ():
            weight.data -= RATE * gradient
    algorithm.parts["critic"].after_update()

    said = sac.logger.name_to_value
    assert losses["critic"].item() == pytest.approx(said["train/critic_loss"], rel=1e-4)
    assert losses["policy"].item() == pytest.approx(said["train/actor_loss"], rel=1e-4)
    ours = [*algorithm.parts["critic"].module.parameters(), *algorithm._target.module.parameters()]
    other = [*sac.critic.parameters(), *sac.critic_target.parameters()]
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([*algorithm._policy.parameters()], [*sac.actor.parameters()], rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().max() > 1e-3 for name in ("critic", "policy") for gradient in gradients[name][-2:])
    # Their loss is log alpha times what ours is alpha times.
    change = sac.log_ent_coef.item() - np.log(ALPHA)
    assert change == pytest.approx(-RATE * gradients["temperature"][0].item() / ALPHA, rel=1e-3) and abs(change) > 1e-4
