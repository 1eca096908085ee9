import dataclasses

import numpy as np
import pytest
import torch

from algorithms.policies.base import INSTRUCTION, Chunk
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError
from fleet.spec import ACTION, STATE
from tests.algorithms.policies import cases
from tests.algorithms.policies.cases import CAMERA

CONFIG = {"reads": {STATE: [6], "observation.effort": [2, 2]}, "action_dim": 2, "horizon": 4, "width": 32}
B, H, A = 5, 4, 2


CAMERAS = {"reads": {STATE: [6], CAMERA: [32, 32, 3]}, "action_dim": 2, "horizon": 4, "width": 32, "vision_width": 16}


def _policy(seed=0, **changes):
    torch.manual_seed(seed)
    return build("mlp", {**CONFIG, **changes})


def _obs(batch=B):
    g = torch.Generator().manual_seed(1)
    shapes = {STATE: (6,), "observation.effort": (2, 2), INSTRUCTION: (32,)}
    return {name: torch.randn(batch, *shape, generator=g) for name, shape in shapes.items()}


def test_act_is_deterministic_without_noise_and_a_gaussian_with_it():
    policy = _policy()
    chunk = policy.act(_obs())
    assert chunk.actions_BHA.shape == (B, H, A) and chunk.log_prob_BT.shape == (B, H)
    torch.testing.assert_close(chunk.actions_BHA, policy.act(_obs()).actions_BHA)
    one = {name: value[:1].expand(4000, *value.shape[1:]) for name, value in _obs().items()}
    samples = policy.act(one, policy.noise(4000, torch.Generator().manual_seed(0))).actions_BHA
    torch.testing.assert_close(samples.std(0), policy.log_std_A.exp().expand(H, A), rtol=0.05, atol=0)
    torch.testing.assert_close(samples.mean(0), chunk.actions_BHA[0], rtol=0, atol=0.02)


def test_log_prob_is_the_density_of_each_step():
    policy = _policy()
    with torch.no_grad():
        policy.log_std_A.copy_(torch.tensor([-1.0, 0.5]))
    noise = policy.noise(B, torch.Generator().manual_seed(0))
    chunk = policy.act(_obs(), noise)
    mean = policy.act(_obs()).actions_BHA
    expected = torch.distributions.Normal(mean, policy.log_std_A.exp()).log_prob(chunk.actions_BHA).sum(-1)
    torch.testing.assert_close(chunk.log_prob_BT, expected)
    assert torch.equal(policy.log_prob(_obs(), chunk), chunk.log_prob_BT)  # ratio exactly 1 before the first update


def test_imitation_loss_is_masked_l1():
    policy = _policy()
    mean = policy.act(_obs()).actions_BHA.detach()
    actions = mean + torch.tensor([0.3, -0.1])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).float()
    actions[mask == 0] = float("nan")  # padding may be anything
    loss = policy.imitation_loss(_obs(), Chunk(actions), mask)
    torch.testing.assert_close(loss, torch.tensor([0.2, 0.2, 0.2, 0.0, 0.2]))
    loss.sum().backward()
    gradients = [p.grad for name, p in policy.named_parameters() if name != "log_std_A"]
    assert all(torch.isfinite(g).all() for g in gradients) and policy.log_std_A.grad is None
    head = policy.head.weight.grad.unflatten(0, (H, A)).abs().sum((1, 2))
    assert (head > 0).all()
    one = policy.imitation_loss({n: v[1:2] for n, v in _obs().items()}, Chunk(actions[1:2]), mask[1:2])
    policy.zero_grad()
    one.sum().backward()
    head = policy.head.weight.grad.unflatten(0, (H, A)).abs().sum((1, 2))
    assert head[0] > 0 and (head[1:] == 0).all()


def test_statistics_travel_with_the_weights_and_normalise():
    policy, obs = _policy(), _obs()
    before = policy.act(obs).actions_BHA
    spread = np.array([-1.0, 1.0])
    statistics = {
        STATE: Statistics.of(10 + 2 * spread[:, None].repeat(6, 1)),
        "observation.effort": Statistics.of(-3 + 0.5 * spread[:, None, None] * np.ones((2, 2))),
    }
    policy.set_statistics(statistics)
    shifted = {
        STATE: obs[STATE] * 2 + 10,
        "observation.effort": obs["observation.effort"] * 0.5 - 3,
        INSTRUCTION: obs[INSTRUCTION],
    }
    torch.testing.assert_close(policy.act(shifted).actions_BHA, before, rtol=1e-4, atol=1e-5)
    other = build(policy.family, policy.config)
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(other.act(shifted).actions_BHA, policy.act(shifted).actions_BHA)
    policy.set_statistics({name: dataclasses.replace(known, std=known.std * 0) for name, known in statistics.items()})
    far = {name: value * 1e9 for name, value in obs.items()} | {INSTRUCTION: obs[INSTRUCTION]}
    assert policy.act(far).actions_BHA.abs().max() < 100
    with pytest.raises(PolicyError, match=r"observation\.effort"):
        policy.set_statistics({STATE: statistics[STATE]})
    with pytest.raises(PolicyError, match="finite"):
        policy.set_statistics({**statistics, STATE: Statistics.of(np.full((2, 6), np.nan))})


def test_the_instruction_matters_and_can_be_left_out():
    policy, obs = _policy(), _obs()
    moved = policy.act({**obs, INSTRUCTION: -obs[INSTRUCTION]}).actions_BHA
    assert (moved - policy.act(obs).actions_BHA).abs().max() > 1e-3
    single = _policy(instruction_dim=0)
    assert single.spec.conditions == {} and single.act(
        {n: v for n, v in obs.items() if n != INSTRUCTION}
    ).actions_BHA.shape == (B, H, A)
    assert single.embed(obs).shape == (B, 32)


def test_normalised_actions_are_learnt_in_their_own_units_and_their_density_is_in_the_robots():
    policy, obs = _policy(normalise_actions=True), _obs()
    known = cases.statistics_of(policy.spec)
    policy.set_statistics(known)
    half = torch.from_numpy((known[ACTION].high - known[ACTION].low) / 2).float()
    chunk = policy.act(obs, policy.noise(B, torch.Generator().manual_seed(0)))
    mean, std = policy.act(obs).actions_BHA, half * policy.log_std_A.exp()
    expected = torch.distributions.Normal(mean, std).log_prob(chunk.actions_BHA).sum(-1)
    torch.testing.assert_close(chunk.log_prob_BT, expected)
    loss = policy.imitation_loss(obs, Chunk(mean.detach() + half * torch.tensor([0.3, -0.1])), torch.ones(B, H))
    torch.testing.assert_close(loss, torch.full((B,), 0.2))
    with pytest.raises(PolicyError, match=ACTION):
        policy.set_statistics({name: value for name, value in known.items() if name != ACTION})


def test_the_expected_ratio_of_another_policy_is_1(scale):
    one, other = _policy(), _policy()
    with torch.no_grad():
        other.head.bias.add_(0.02)
        other.log_std_A.sub_(0.05)
        num = 20_000 * scale
        obs = {name: value[:1].expand(num, *value.shape[1:]) for name, value in _obs().items()}
        chunk = one.act(obs, one.noise(num, torch.Generator().manual_seed(0)))
        ratio = (other.log_prob(obs, chunk) - chunk.log_prob_BT).exp()
    assert ratio.std() > 0.1
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / num**0.5).all()


def test_gradients_of_the_density_are_those_of_finite_differences():
    policy, obs = _policy(normalise_actions=True), _obs()
    policy.set_statistics(cases.statistics_of(policy.spec))
    chunk = Chunk(torch.randn(B, H, A, generator=torch.Generator().manual_seed(0)))
    policy.log_prob(obs, chunk).sum().backward()
    for parameter, index in ((policy.log_std_A, 1), (policy.head.bias, 3)):
        around = []
        for step in (1e-2, -2e-2):
            with torch.no_grad():
                parameter[index] += step
                around.append(policy.log_prob(obs, chunk).sum().item())
        slope = (around[0] - around[1]) / 2e-2
        assert parameter.grad[index].item() == pytest.approx(slope, rel=1e-2)
        with torch.no_grad():
            parameter[index] += 1e-2


def test_the_camera_is_seen_and_may_be_all_there_is():
    torch.manual_seed(0)
    for reads in (CAMERAS["reads"], {CAMERA: [32, 32, 3]}):
        policy = build("cnn", {**CAMERAS, "reads": reads})
        assert policy.cameras is True  # a run file that does not list what it reads means all cameras
        obs = cases.observe(policy.spec)
        seen = policy.act({**obs, CAMERA: 255 - obs[CAMERA]}).actions_BHA
        assert (seen - policy.act(obs).actions_BHA).abs().amax((1, 2)).min() > 1e-3
        with pytest.raises(PolicyError, match=f"{CAMERA}.* is missing"):
            policy.act({name: value for name, value in obs.items() if name != CAMERA})


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("mpl", CONFIG, "did you mean 'mlp'"),
        ("mlp", {**CONFIG, "horizn": 3}, "did you mean 'horizon'"),
        ("mlp", {"reads": {STATE: [6]}}, "action_dim"),
        ("mlp", {**CONFIG, "horizon": 0}, "sizes are at least 1"),
        ("mlp", {**CONFIG, "reads": {}}, "reads is not empty"),
        ("mlp", {**CONFIG, "reads": CAMERAS["reads"]}, "use the family 'cnn'"),
        ("mlp", {**CONFIG, "select": {STATE: [6]}}, "different elements of 6"),
        ("cnn", {**CAMERAS, "reads": CONFIG["reads"]}, "use the family 'mlp'"),
        ("cnn", {**CAMERAS, "vision_width": 12}, CAMERA),
        ("cnn", {**CAMERAS, "image_dims": 0}, "image_dims"),
    ],
)
def test_refusals(family, config, said):
    with pytest.raises(PolicyError) as caught:
        build(family, config)
    assert said in str(caught.value)
