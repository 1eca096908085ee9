"""RLPD's losses and gradients with one action a chunk against stable-baselines3's SAC and torchrl's REDQ: the same weights,
batch and noise. Theirs act and judge; only what is made of it is ours.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from algorithms.policies.base import Chunk, PolicySpec
from algorithms.rlpd import Rlpd, RlpdConfig
from fleet.spec import STATE
from tests.batches import make_batch

B, S, A, GAMMA, ALPHA = 64, 5, 3, 0.9, 0.3


class Actor(nn.Module):
    """Another library's actor as a policy: ``distribution(state_BS)`` gives mean_BA and std_BA before tanh. ``epsilon`` is what
    it adds to 1 - tanh^2, which shows near the bounds."""

    def __init__(self, module, distribution, epsilon=0.0):
        super().__init__()
        self.module, self.distribution, self.epsilon = module, distribution, epsilon
        self.spec = PolicySpec({STATE: (S,)}, {}, A, 1, density=True)
        self.given = iter(())

    def noise(self, batch_size, generator):
        return {"action": next(self.given)}

    def act(self, obs, noise=None, guidance=1.0):
        mean_BA, std_BA = self.distribution(obs[STATE])
        before_BA = mean_BA + std_BA * noise["action"]
        actions_BA = before_BA.tanh()
        log_prob_BA = Normal(mean_BA, std_BA).log_prob(before_BA) - torch.log(1 - actions_BA**2 + self.epsilon)
        return Chunk(actions_BA[:, None], log_prob_BA.sum(-1, keepdim=True))


class Critics(nn.Module):
    def __init__(self, judges):
        super().__init__()
        self.judges = nn.ModuleList(judges)

    def noise(self, batch_size, generator):
        return None

    def forward(self, obs, actions_BHA, noise=None):
        return torch.stack([judge(torch.cat([obs[STATE], actions_BHA[:, 0]], -1))[:, 0] for judge in self.judges])


def numbers(seed):
    """state, next state, action, reward, done."""
    g = torch.Generator().manual_seed(seed)
    state, after = (torch.randn(B, S, generator=g) for _ in range(2))
    action, reward = torch.rand(B, A, generator=g) * 1.8 - 0.9, torch.randn(B, 1, generator=g)
    return state, after, action, reward, (torch.rand(B, 1, generator=g) < 0.3).float()


def ours(actor, critics, targets, given, **config):
    state, after, action, reward, done = given
    settings = {"batch_size": B, "utd": 1, "reward": "environment", "discount": GAMMA, "temperature": ALPHA}
    algorithm = Rlpd(actor, RlpdConfig(num_critics=len(critics.judges), **settings, **config))
    algorithm._critic, algorithm._target.module = critics, targets
    batch = make_batch(
        {STATE: state},
        action[:, None],
        rewards_BH=reward,
        terminated_BH=done > 0,
        terminated_B=done[:, 0] > 0,
        steps_to_go_B=torch.where(done[:, 0] > 0, 1, 5),
        obs_at={1: {STATE: after}},
        inside_at={1: done[:, 0] == 0},
    )
    return algorithm, batch


def mean_and_gradients(out, module):
    parameters = [p for p in module.parameters() if p.requires_grad]
    loss = out.sum / out.weight
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_near(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_losses_and_gradients_are_those_of_sac_in_stable_baselines(monkeypatch):
    sb3 = pytest.importorskip("stable_baselines3")
    gymnasium = pytest.importorskip("gymnasium")
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    class Still(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-9, 9, (S,))
        action_space = gymnasium.spaces.Box(-1, 1, (A,))

    model = sb3.SAC(
        "MlpPolicy",
        Still(),
        learning_rate=0.0,  # each loss is of the weights that it began with, and so are ours afterwards
        tau=0.0,
        gamma=GAMMA,
        ent_coef=f"auto_{ALPHA}",
        target_entropy=-0.5 * A,
        policy_kwargs={"net_arch": [16]},
        device="cpu",
        seed=0,
    )
    with torch.no_grad():
        for parameter in (*model.critic_target.parameters(), *model.actor.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    state, after, action, reward, done = given = numbers(0)
    monkeypatch.setattr(
        model.replay_buffer, "sample", lambda *args, **kwargs: ReplayBufferSamples(state, action, after, done, reward)
    )
    model.set_logger(Logger(None, []))
    critic_gradients = []
    step = model.critic.optimizer.step
    monkeypatch.setattr(
        model.critic.optimizer,
        "step",
        lambda: (critic_gradients.extend(p.grad.clone() for p in model.critic.parameters()), step())[1],
    )
    torch.manual_seed(7)
    model.train(1, B)
    told = model.logger.name_to_value
    torch.manual_seed(7)
    now, next_one = ({"action": torch.normal(torch.zeros(B, A), torch.ones(B, A))} for _ in range(2))

    def distribution(state_BS):
        mean_BA, log_std_BA, _ = model.actor.get_action_dist_params(state_BS)
        return mean_BA, log_std_BA.exp()

    actor = Actor(model.actor, distribution, model.actor.action_dist.epsilon)
    algorithm, batch = ours(
        actor, Critics(model.critic.q_networks), Critics(model.critic_target.q_networks), given, num_targets=2, actor_q="min"
    )
    actor.given = iter([next_one["action"], now["action"], now["action"]])
    loss, gradients = mean_and_gradients(algorithm.loss("critic", batch), algorithm._critic)
    assert_near(loss.item(), told["train/critic_loss"])  # a half of the sum of two is their mean
    for mine, theirs in zip(gradients, critic_gradients, strict=True):
        assert_near(mine, theirs)
    loss, gradients = mean_and_gradients(algorithm.loss("policy", batch), model.actor)
    assert_near(loss.item(), told["train/actor_loss"])
    for mine, parameter in zip(gradients, model.actor.parameters(), strict=True):
        assert_near(mine, parameter.grad)
    _, (gradient,) = mean_and_gradients(algorithm.loss("temperature", batch), algorithm._temperature)
    assert_near(gradient, ALPHA * model.log_ent_coef.grad[0])  # theirs is of log alpha in alpha's place


@pytest.mark.parametrize("num_critics", [2, 10])
def test_losses_and_gradients_are_those_of_redq_in_torchrl(num_critics):
    redq = pytest.importorskip("torchrl.objectives.redq")
    modules = pytest.importorskip("torchrl.modules")
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.data import Bounded

    def judge():
        return nn.Sequential(nn.Linear(S + A, 16), nn.ReLU(), nn.Linear(16, 1))

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = judge()

        def forward(self, state_BS, action_BA):
            return self.net(torch.cat([state_BS, action_BA], -1))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(S, 2 * A), modules.NormalParamExtractor())
    theirs = redq.REDQLoss(
        modules.ProbabilisticActor(
            module=TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=Bounded(-torch.ones(A), torch.ones(A), (A,)),
            distribution_class=modules.TanhNormal,
        ),
        modules.ValueOperator(module=Joined(), in_keys=["observation", "action"]),
        num_qvalue_nets=num_critics,
        sub_sample_len=2,
        alpha_init=ALPHA,
        target_entropy=-0.5 * A,
        loss_function="l2",
        deactivate_vmap=True,
    )
    theirs.make_value_estimator(gamma=GAMMA)

    critics, targets = (Critics([judge() for _ in range(num_critics)]) for _ in range(2))
    copies = ((critics, theirs.qvalue_network_params), (targets, theirs.target_qvalue_network_params))
    for mine, stacked in copies:
        flat = stacked.flatten_keys(".")
        for name, _ in mine.judges[0].named_parameters():
            values = torch.stack([dict(one.named_parameters())[name].detach() for one in mine.judges])
            flat.get(f"module.net.{name}").data.copy_(values)
    state, after, action, reward, done = given = numbers(1)
    ended = done > 0
    data = {
        "observation": state,
        "action": action,
        "next": {"observation": after, "reward": reward, "done": ended, "terminated": ended},
    }
    torch.manual_seed(7)
    told = theirs(TensorDict(data, [B]))
    torch.manual_seed(7)
    subset = torch.randperm(num_critics)[: theirs.sub_sample_len].sort()[0]
    now, next_one = torch.normal(torch.zeros(2, B, A), torch.ones(2, B, A))
    actor = Actor(net, lambda state_BS: net(state_BS))
    algorithm, batch = ours(actor, critics, targets, given, num_targets=len(subset))
    algorithm._subset = lambda: subset
    actor.given = iter([next_one, now])
    loss, gradients = mean_and_gradients(algorithm.loss("critic", batch), critics)
    assert_near(loss, told["loss_qvalue"].detach())
    told["loss_qvalue"].backward(retain_graph=True)
    names = [name for name, _ in critics.judges[0].named_parameters()]
    stacked = theirs.qvalue_network_params.flatten_keys(".")
    for i, name in enumerate(names):
        assert_near(torch.stack(gradients[i :: len(names)]), stacked.get(f"module.net.{name}").grad)
    loss, gradients = mean_and_gradients(algorithm.loss("policy", batch), net)
    assert_near(loss, told["loss_actor"].detach())
    told["loss_actor"].backward()
    for mine, parameter in zip(gradients, theirs.actor_network_params.flatten_keys(".").values(), strict=True):
        assert_near(mine, parameter.grad)
    assert math.isfinite(loss.item()) and gradients[0].abs().max() > 1e-3
