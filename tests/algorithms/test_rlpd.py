"""RLPD's losses. How it trains: test_rlpd_training.py."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.base import DataFacts
from algorithms.policies.base import INSTRUCTION, Chunk
from algorithms.policies.statistics import Statistics
from algorithms.windows import fill_with_last_action
from fleet.robot import Source
from fleet.spec import ACTION, STATE
from tests.algorithms.rlpd_toys import GAMMA, PARTS, A, B, H, Says, always, make_policy, make_rlpd, make_rows, mean_of
from tests.batches import make_batch, take_rows


def test_with_one_action_a_chunk_and_two_critics_it_is_sac():
    policy = make_policy(horizon=1)
    algorithm = make_rlpd(policy, num_critics=2, num_targets=2, actor_q="min", temperature=0.3)
    batch = make_rows(horizon=1)
    batch.terminated_BH, batch.truncated_BH = batch.terminated_BH & False, batch.truncated_BH & False
    batch.terminated_BH[::4] = True
    batch.inside_at[1] = ~batch.terminated_BH[:, 0]
    noise, after = algorithm._noise(policy, batch, 0), batch.obs_at[1]
    mean, std = policy._distribution(after)
    u = mean + std * noise["action"]
    log_pi = (torch.distributions.Normal(mean, std).log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum((1, 2))
    q = algorithm._target.module(after, u.tanh()).amin(0)
    mask = 1 - batch.terminated_BH[:, 0].float()
    y = (batch.rewards_BH[:, 0] + GAMMA * mask * (q - 0.3 * log_pi)).detach()
    ours, weight = algorithm._target_value(batch)
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
    assert (weight == 1).all()
    loss = mean_of(algorithm.loss("critic", batch))
    values = algorithm._critic(batch.obs, batch.actions_BHA)
    torch.testing.assert_close(loss, sum(nn.functional.mse_loss(q, y) for q in values) / 2, rtol=1e-4, atol=1e-4)
    chunk = policy.act(batch.obs, algorithm._noise(policy, batch, 1))
    expected = (0.3 * chunk.log_prob_BT.sum(1) - algorithm._critic(batch.obs, chunk.actions_BHA).amin(0)).mean()
    torch.testing.assert_close(mean_of(algorithm.loss("policy", batch)), expected)
    entropy = -policy.act(batch.obs, algorithm._noise(policy, batch, 2)).log_prob_BT.sum(1).mean()
    out = algorithm.loss("temperature", batch)
    mean_of(out).backward()
    torch.testing.assert_close(mean_of(out), 0.3 * (entropy + 0.5 * A))
    torch.testing.assert_close(algorithm._temperature.log_alpha.grad, 0.3 * (entropy + 0.5 * A))


def test_the_policy_climbs_the_mean_or_the_smallest():
    batch = make_rows()
    for kind, value in (("mean", 2.0), ("min", 1.0)):
        algorithm = make_rlpd(actor_q=kind)
        algorithm._critic = always(1.0, 2.0, 3.0)
        out = algorithm.loss("policy", batch)
        torch.testing.assert_close(out.stats["value"], torch.tensor(value))
        entropy = out.stats["entropy"] * H * A
        torch.testing.assert_close(mean_of(out), -0.01 * entropy - value)


def test_golden_target_of_a_chunk():
    """Rewards 0, 1, 2, discount .9 and a value of 5 behind them: 6.165."""
    algorithm = make_rlpd(make_policy(horizon=3), backup_entropy=False)
    algorithm._target.module = always(5.0, 6.0, 7.0)
    algorithm._subset = lambda: torch.tensor([2, 0])
    obs = {STATE: torch.zeros(1, 6), INSTRUCTION: torch.zeros(1, 3)}
    fields = {"rewards_BH": torch.tensor([[0.0, 1.0, 2.0]]), "obs_at": {3: obs}, "inside_at": {3: torch.tensor([True])}}
    target, _ = algorithm._target_value(make_batch(obs, torch.zeros(1, 3, A), **fields))
    assert target.item() == pytest.approx(6.165, rel=1e-6)


def test_value_and_entropy_behind_a_chunk_count_by_how_it_ends():
    """Whole: gamma^H of both. Terminal: of neither. Cut by a time limit: of the last observation before it, not nothing."""
    batch = make_rows()
    algorithm = make_rlpd(temperature=0.5)
    algorithm._target.module = always(5.0, 5.0, 5.0)
    without = make_rlpd(temperature=0.5, backup_entropy=False)
    without._target.module = algorithm._target.module
    target, weight = algorithm._target_value(batch)
    plain, _ = without._target_value(batch)
    entropy = -algorithm._log_density(algorithm._policy.act(batch.obs_at[H], algorithm._noise(algorithm._policy, batch, 0)))
    for b in range(B):
        kind, k = b % 3, b % H
        num, known = {0: (H, H), 1: (k + 1, None), 2: (k, k)}[kind]
        assert weight[b] == (num > 0)
        reward = sum(GAMMA**i * batch.rewards_BH[b, i] for i in range(num))
        factor = 0.0 if known is None or not num else GAMMA**known
        torch.testing.assert_close(plain[b], reward + factor * 5.0 + torch.zeros(()))
        torch.testing.assert_close(target[b] - plain[b], factor * 0.5 * entropy[b], rtol=1e-3, atol=1e-4)
    out, known = algorithm.loss("critic", batch), weight > 0
    values = algorithm._critic(batch.obs, fill_with_last_action(batch).actions_BHA)
    torch.testing.assert_close(mean_of(out), ((values - target) ** 2)[:, known].mean())  # the others say nothing
    assert 0 < out.weight == known.sum() < B


def test_time_limits_are_the_end_where_the_configuration_says_so():
    batch, algorithm = make_rows(), make_rlpd(timeouts="end", backup_entropy=False)
    algorithm._target.module = always(5.0, 5.0, 5.0)
    target, weight = algorithm._target_value(batch)
    cut = torch.arange(B) % 3 == 2
    discount = GAMMA ** torch.arange(H)
    torch.testing.assert_close(target[cut], (batch.rewards_BH * discount).sum(1)[cut])
    assert (weight == 1).all()


def test_the_best_gaussian_of_a_parabola_has_the_variance_of_temperature_by_curvature():
    """Q = -c/2 (a - m)^2: the policy that maximises E Q + alpha entropy is N(m, alpha / c). Without tanh: family mlp."""
    policy = make_policy("mlp", horizon=1, action_dim=1, instruction_dim=0)
    algorithm = make_rlpd(policy, temperature=0.2, batch_size=256, ema_decay=0.0)
    algorithm._critic = Says(lambda actions_BHA: -5.0 * (actions_BHA[:, 0, 0] - 0.7)[None] ** 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    obs = {STATE: torch.zeros(256, 6)}
    for step in range(400):
        if step == 300:
            optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.zero_grad()
        mean_of(algorithm.loss("policy", make_batch(obs, torch.zeros(256, 1, 1)))).backward()
        optimizer.step()
        algorithm._step = step + 1
    assert policy.act(obs).actions_BHA[0].item() == pytest.approx(0.7, abs=0.02)
    assert policy.log_std_A.exp().item() ** 2 == pytest.approx(0.2 / 10.0, rel=0.1)


def test_entropy_is_of_actions_on_one_scale_whatever_the_robots_unit():
    """The same policy and data in metres and millimetres: the same losses."""
    found = []
    for unit in (1.0, 1000.0):
        policy, batch = make_policy(bounds=[-0.2 * unit, 0.2 * unit]), make_rows()
        actions = np.concatenate([np.full((100, A), -0.2 * unit), np.full((100, A), 0.2 * unit)])
        known = DataFacts(
            (), {STATE: Statistics.of(np.random.default_rng(0).normal(size=(50, 6))), ACTION: Statistics.of(actions)}
        )
        policy.set_statistics(known.statistics)
        batch.actions_BHA = batch.actions_BHA * 0.2 * unit
        algorithm = make_rlpd(policy, known, temperature=0.5, bc_alpha=0.3)
        found.append([mean_of(algorithm.loss(part, batch)).item() for part in PARTS])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("part", PARTS)
def test_micro_batches_and_ranks_add_up(part):
    algorithm, batch = make_rlpd(bc_alpha=0.3), make_rows()
    whole = algorithm.loss(part, batch)
    each = [algorithm.loss(part, take_rows(batch, rows)) for rows in (range(5), range(5, 6), range(6, B))]
    torch.testing.assert_close(sum(out.sum for out in each), whole.sum)
    torch.testing.assert_close(sum(out.weight for out in each), whole.weight)
    torch.testing.assert_close(torch.cat([out.per_sample_B for out in each]), whole.per_sample_B)


@pytest.mark.parametrize("part", PARTS)
def test_masked_steps_are_not_seen(part):
    algorithm, batch = make_rlpd(bc_alpha=0.3), make_rows()
    garbage = copy.deepcopy(batch)
    garbage.actions_BHA[~garbage.mask_BH] = float("nan")
    garbage.rewards_BH[~garbage.mask_BH] = 1e9
    garbage.source_BH = torch.where(garbage.mask_BH, garbage.source_BH, int(Source.SCRIPT))
    gradients = []
    for one in (batch, garbage):
        module = algorithm.parts[part].module
        module.zero_grad()
        mean_of(algorithm.loss(part, one)).backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty)


def test_imitation_is_of_people_up_to_a_takeover():
    batch = make_rows(mask_BH=torch.ones(B, H, dtype=torch.bool))
    batch.source_BH = batch.source_B[:, None].repeat(1, H)
    batch.source_BH[0, 2:] = int(Source.POLICY)  # a demonstration's row, handed back at 2
    batch.source_BH[1, 1], batch.source_BH[6, 1] = int(Source.POLICY), int(Source.POLICY)
    batch.source_BH[3, 2:] = int(Source.OPERATOR)  # the policy's row, taken over
    algorithm, without = make_rlpd(bc_alpha=1.0), make_rlpd()
    policy = algorithm._policy
    difference = algorithm.loss("policy", batch).per_sample_B - without.loss("policy", batch).per_sample_B
    error = (policy.act(batch.obs).actions_BHA - batch.actions_BHA).abs().mean(-1)
    for b in range(B):
        steps = {0: 2, 1: 1, 6: 1}.get(b, H)
        expected = 0.0 if batch.source_B[b] == Source.POLICY else error[b, :steps].mean().item()
        assert difference[b].item() == pytest.approx(expected, abs=1e-5)


def test_a_chunk_is_imitated_by_the_policys_own_loss():
    """At the bounds of the action too, where a likelihood would not be bounded."""
    policy = make_policy(bounds=[-1.0, 1.0])
    batch = make_rows(source_B=torch.full((B,), int(Source.DEMO)), mask_BH=torch.ones(B, H, dtype=torch.bool))
    batch.actions_BHA = batch.actions_BHA.sign()
    algorithm = make_rlpd(policy, bc_alpha=1.0)
    loss = policy.imitation_loss(batch.obs, Chunk(batch.actions_BHA), torch.ones(B, H)).mean()
    torch.testing.assert_close(algorithm.loss("policy", batch).stats["imitation"][0] / B, loss)
    assert loss < 2
