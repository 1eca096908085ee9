import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.base import DataFacts
from algorithms.bc import Bc, BcConfig
from algorithms.policies.base import INSTRUCTION, Chunk
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from algorithms.rlpd import Rlpd, RlpdConfig
from algorithms.windows import fill_with_last_action
from buffer.draw import draw_part
from fleet.batch import Outcome
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import ACTION, STATE
from tests.algorithms import reach_toy
from tests.algorithms.policies import cases
from tests.algorithms.reach_toy import Memory, Trainer
from tests.batches import make_batch, take_rows

B, H, A, GAMMA = 12, 4, 2, 0.9
SMALL = {"batch_size": B, "utd": 1, "num_critics": 3, "critic": {"width": 16, "num_layers": 2}, "reward": "environment"}
PARTS = ("critic", "policy", "temperature")


def _policy(family="squashed", **changes):
    torch.manual_seed(0)
    config = {"reads": {STATE: [6]}, "action_dim": A, "horizon": H, "instruction_dim": 3, "width": 16, "num_layers": 1}
    policy = build(family, {**config, **changes})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def _rlpd(policy=None, data=None, **changes):
    policy = policy or _policy()
    torch.manual_seed(1)
    algorithm = Rlpd(policy, RlpdConfig(**{**SMALL, "discount": GAMMA, **changes}), *([data] if data else []))
    with torch.no_grad():  # targets that differ from the critics
        for parameter in algorithm._target.module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return algorithm


def _batch(seed=0, batch=B, horizon=H, action_dim=A, **fields):
    """Rows of all kinds: whole, terminal at 0 to H - 1, cut at 0 to H - 1."""
    g = torch.Generator().manual_seed(seed)
    kind, k = torch.arange(batch) % 3, torch.arange(batch) % horizon
    position = torch.arange(horizon)
    mask = (position <= k[:, None]) | (kind == 0)[:, None]

    def observe():
        return {STATE: torch.randn(batch, 6, generator=g), INSTRUCTION: torch.randn(batch, 3, generator=g)}

    given = {
        "rewards_BH": torch.randn(batch, horizon, generator=g) * mask,
        "mask_BH": mask,
        "terminated_BH": (position == k[:, None]) & (kind == 1)[:, None],
        "truncated_BH": (position == k[:, None]) & (kind == 2)[:, None],
        "terminated_B": kind == 1,
        "inside_at": {horizon: kind == 0},
        "steps_to_go_B": torch.where(kind == 0, 2 * horizon, k + 1),
        "outcome_B": torch.where(kind == 1, int(Outcome.SUCCESS), int(Outcome.FAILURE)),
        "source_B": torch.tensor([int(Source.DEMO), int(Source.POLICY), int(Source.OPERATOR)])[torch.arange(batch) // 3 % 3],
    }
    obs, after, actions = observe(), observe(), torch.rand(batch, horizon, action_dim, generator=g) * 2 - 1
    return make_batch(obs, actions, obs_at={horizon: after}, **{**given, **fields})


def _mean(out):
    return out.sum / out.weight


class Says(nn.Module):
    """A critic that says ``value(actions_BHA)`` (K, B), whatever it sees."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, obs, actions_BHA, noise=None):
        return self.value(actions_BHA)


def _always(*values):
    return Says(lambda actions_BHA: torch.tensor(values)[:, None].expand(-1, len(actions_BHA)))


def test_with_one_action_a_chunk_and_two_critics_it_is_sac():
    policy = _policy(horizon=1)
    algorithm = _rlpd(policy, num_critics=2, num_targets=2, actor_q="min", temperature=0.3)
    batch = _batch(horizon=1)
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
    loss = _mean(algorithm.loss("critic", batch))
    values = algorithm._critic(batch.obs, batch.actions_BHA)
    torch.testing.assert_close(loss, sum(nn.functional.mse_loss(q, y) for q in values) / 2, rtol=1e-4, atol=1e-4)
    chunk = policy.act(batch.obs, algorithm._noise(policy, batch, 1))
    expected = (0.3 * chunk.log_prob_BT.sum(1) - algorithm._critic(batch.obs, chunk.actions_BHA).amin(0)).mean()
    torch.testing.assert_close(_mean(algorithm.loss("policy", batch)), expected)
    entropy = -policy.act(batch.obs, algorithm._noise(policy, batch, 2)).log_prob_BT.sum(1).mean()
    out = algorithm.loss("temperature", batch)
    _mean(out).backward()
    torch.testing.assert_close(_mean(out), 0.3 * (entropy + 0.5 * A))
    torch.testing.assert_close(algorithm._temperature.log_alpha.grad, 0.3 * (entropy + 0.5 * A))


def test_the_policy_climbs_the_mean_or_the_smallest():
    batch = _batch()
    for kind, value in (("mean", 2.0), ("min", 1.0)):
        algorithm = _rlpd(actor_q=kind)
        algorithm._critic = _always(1.0, 2.0, 3.0)
        out = algorithm.loss("policy", batch)
        torch.testing.assert_close(out.stats["value"], torch.tensor(value))
        entropy = out.stats["entropy"] * H * A
        torch.testing.assert_close(_mean(out), -0.01 * entropy - value)


def test_golden_target_of_a_chunk():
    """Rewards 0, 1, 2, discount .9 and a value of 5 behind them: 6.165."""
    algorithm = _rlpd(_policy(horizon=3), backup_entropy=False)
    algorithm._target.module = _always(5.0, 6.0, 7.0)
    algorithm._subset = lambda: torch.tensor([2, 0])
    obs = {STATE: torch.zeros(1, 6), INSTRUCTION: torch.zeros(1, 3)}
    fields = {"rewards_BH": torch.tensor([[0.0, 1.0, 2.0]]), "obs_at": {3: obs}, "inside_at": {3: torch.tensor([True])}}
    target, _ = algorithm._target_value(make_batch(obs, torch.zeros(1, 3, A), **fields))
    assert target.item() == pytest.approx(6.165, rel=1e-6)


def test_value_and_entropy_behind_a_chunk_count_by_how_it_ends():
    """Whole: gamma^H of both. Terminal: of neither. Cut by a time limit: of the last observation before it, not nothing."""
    batch = _batch()
    algorithm = _rlpd(temperature=0.5)
    algorithm._target.module = _always(5.0, 5.0, 5.0)
    without = _rlpd(temperature=0.5, backup_entropy=False)
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
    torch.testing.assert_close(_mean(out), ((values - target) ** 2)[:, known].mean())  # the others say nothing
    assert 0 < out.weight == known.sum() < B


def test_time_limits_are_the_end_where_the_configuration_says_so():
    batch, algorithm = _batch(), _rlpd(timeouts="end", backup_entropy=False)
    algorithm._target.module = _always(5.0, 5.0, 5.0)
    target, weight = algorithm._target_value(batch)
    cut = torch.arange(B) % 3 == 2
    discount = GAMMA ** torch.arange(H)
    torch.testing.assert_close(target[cut], (batch.rewards_BH * discount).sum(1)[cut])
    assert (weight == 1).all()


@pytest.mark.parametrize("ending", ["whole", "cut"])
def test_one_state_for_ever_is_worth_the_reward_by_one_minus_the_discount(ending):
    algorithm = _rlpd(backup_entropy=False, tau=0.2, critic_learning_rate=1e-2)
    engine = Trainer(algorithm).engine
    obs = {STATE: torch.zeros(B, 6), INSTRUCTION: torch.zeros(B, 3)}
    cut = torch.arange(B) % 2 == 0 if ending == "cut" else torch.zeros(B, dtype=torch.bool)
    mask = (torch.arange(H) < 2) | ~cut[:, None]
    for step in range(150):
        g = torch.Generator().manual_seed(step)
        batch = make_batch(
            obs,
            torch.rand(B, H, A, generator=g) * 2 - 1,
            mask_BH=mask,
            rewards_BH=mask.float() * 0.3,
            truncated_BH=cut[:, None] & (torch.arange(H) == 1),
            steps_to_go_B=torch.where(cut, 2, 9),
            obs_at={H: obs},
            inside_at={H: ~cut},
        )
        engine.update("critic", algorithm.loss, batch)
        algorithm.parts["critic"].after_update()
    values = algorithm._critic({name: value[:1] for name, value in obs.items()}, torch.zeros(1, H, A))
    torch.testing.assert_close(values, torch.full_like(values, 3.0), rtol=0.05, atol=0)


def test_the_best_gaussian_of_a_parabola_has_the_variance_of_temperature_by_curvature():
    """Q = -c/2 (a - m)^2: the policy that maximises E Q + alpha entropy is N(m, alpha / c). Without tanh: family mlp."""
    policy = _policy("mlp", horizon=1, action_dim=1, instruction_dim=0)
    algorithm = _rlpd(policy, temperature=0.2, batch_size=256, ema_decay=0.0)
    algorithm._critic = Says(lambda actions_BHA: -5.0 * (actions_BHA[:, 0, 0] - 0.7)[None] ** 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    obs = {STATE: torch.zeros(256, 6)}
    for step in range(400):
        if step == 300:
            optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.zero_grad()
        _mean(algorithm.loss("policy", make_batch(obs, torch.zeros(256, 1, 1)))).backward()
        optimizer.step()
        algorithm._step = step + 1
    assert policy.act(obs).actions_BHA[0].item() == pytest.approx(0.7, abs=0.02)
    assert policy.log_std_A.exp().item() ** 2 == pytest.approx(0.2 / 10.0, rel=0.1)


@pytest.mark.parametrize(("target", "rises"), [(0.6, True), (-6.0, False)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target(target, rises):
    algorithm = _rlpd(target_entropy=target)
    Trainer(algorithm)(_batch())
    assert (algorithm._temperature.alpha().item() > 0.01) == rises


def test_a_temperature_that_is_not_learnt_stays():
    algorithm = _rlpd(temperature_learning_rate=0.0, temperature=0.5)
    Trainer(algorithm)(_batch())
    assert algorithm._temperature.alpha().item() == pytest.approx(0.5)


def test_entropy_is_of_actions_on_one_scale_whatever_the_robots_unit():
    """The same policy and data in metres and millimetres: the same losses."""
    found = []
    for unit in (1.0, 1000.0):
        policy, batch = _policy(bounds=[-0.2 * unit, 0.2 * unit]), _batch()
        actions = np.concatenate([np.full((100, A), -0.2 * unit), np.full((100, A), 0.2 * unit)])
        known = DataFacts(
            (), {STATE: Statistics.of(np.random.default_rng(0).normal(size=(50, 6))), ACTION: Statistics.of(actions)}
        )
        policy.set_statistics(known.statistics)
        batch.actions_BHA = batch.actions_BHA * 0.2 * unit
        algorithm = _rlpd(policy, known, temperature=0.5, bc_alpha=0.3)
        found.append([_mean(algorithm.loss(part, batch)).item() for part in PARTS])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_subsets_of_critics_are_drawn_anew_for_each_update_and_again_alike():
    algorithm = _rlpd(num_critics=6, num_targets=2, utd=3, batch_size=4)
    drawn = {}

    def subset():
        chosen = Rlpd._subset(algorithm)
        drawn.setdefault((algorithm._step, algorithm._update), []).append(tuple(chosen.tolist()))
        return chosen

    algorithm._subset = subset
    trainer = Trainer(algorithm, micro_batch=2)
    for _ in range(8):
        trainer(_batch())
    assert set(drawn) == {(step, update) for step in range(8) for update in range(3)}
    assert all(len(each) == 2 and len(set(each)) == 1 for each in drawn.values())  # all micro-batches: the same
    chosen = {each[0] for each in drawn.values()}
    assert all(len(set(pair)) == 2 for pair in chosen) and len(chosen) > 8
    assert {number for pair in chosen for number in pair} == set(range(6))
    again = _rlpd(num_critics=6, num_targets=2, utd=3, batch_size=4)
    again._step, again._update = 5, 2
    assert tuple(again._subset().tolist()) == drawn[5, 2][0]
    algorithm._target.module = _always(5.0, 4.0, 3.0, 2.0, 1.0, 0.0)
    algorithm._subset = lambda: torch.tensor([3, 1])
    stub = _batch()
    algorithm.config.backup_entropy = False
    whole = torch.arange(B) % 3 == 0
    reward = (stub.rewards_BH * GAMMA ** torch.arange(H)).sum(1)
    torch.testing.assert_close(algorithm._target_value(stub)[0][whole], (reward + GAMMA**H * 2.0)[whole])


@pytest.mark.parametrize("part", PARTS)
def test_micro_batches_and_ranks_add_up(part):
    algorithm, batch = _rlpd(bc_alpha=0.3), _batch()
    whole = algorithm.loss(part, batch)
    each = [algorithm.loss(part, take_rows(batch, rows)) for rows in (range(5), range(5, 6), range(6, B))]
    torch.testing.assert_close(sum(out.sum for out in each), whole.sum)
    torch.testing.assert_close(sum(out.weight for out in each), whole.weight)
    torch.testing.assert_close(torch.cat([out.per_sample_B for out in each]), whole.per_sample_B)


@pytest.mark.parametrize("part", PARTS)
def test_masked_steps_are_not_seen(part):
    algorithm, batch = _rlpd(bc_alpha=0.3), _batch()
    garbage = copy.deepcopy(batch)
    garbage.actions_BHA[~garbage.mask_BH] = float("nan")
    garbage.rewards_BH[~garbage.mask_BH] = 1e9
    garbage.source_BH = torch.where(garbage.mask_BH, garbage.source_BH, int(Source.SCRIPT))
    gradients = []
    for one in (batch, garbage):
        module = algorithm.parts[part].module
        module.zero_grad()
        _mean(algorithm.loss(part, one)).backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty)


def test_imitation_is_of_people_up_to_a_takeover():
    batch = _batch(mask_BH=torch.ones(B, H, dtype=torch.bool))
    batch.source_BH = batch.source_B[:, None].repeat(1, H)
    batch.source_BH[0, 2:] = int(Source.POLICY)  # a demonstration's row, handed back at 2
    batch.source_BH[1, 1], batch.source_BH[6, 1] = int(Source.POLICY), int(Source.POLICY)
    batch.source_BH[3, 2:] = int(Source.OPERATOR)  # the policy's row, taken over
    algorithm, without = _rlpd(bc_alpha=1.0), _rlpd()
    policy = algorithm._policy
    difference = algorithm.loss("policy", batch).per_sample_B - without.loss("policy", batch).per_sample_B
    error = (policy.act(batch.obs).actions_BHA - batch.actions_BHA).abs().mean(-1)
    for b in range(B):
        steps = {0: 2, 1: 1, 6: 1}.get(b, H)
        expected = 0.0 if batch.source_B[b] == Source.POLICY else error[b, :steps].mean().item()
        assert difference[b].item() == pytest.approx(expected, abs=1e-5)


def test_a_part_trains_alone_and_the_targets_follow():
    algorithm = _rlpd(utd=2, batch_size=B // 2, tau=0.1)
    trainer = Trainer(algorithm)
    before = copy.deepcopy({name: part.module.state_dict() for name, part in algorithm.parts.items()})
    critic, target, policy = algorithm._critic, algorithm._target.module, algorithm._policy
    followed = [p.clone() for p in target.parameters()]
    seen = []
    original = algorithm.loss

    def loss(part, micro):
        seen.append((part, [round(float(p.detach().sum()), 6) for p in (*critic.parameters(),)], len(micro.actions_BHA)))
        out = original(part, micro)
        trained = {"critic": critic, "policy": policy, "temperature": algorithm._temperature}
        for name, module in trained.items():
            assert all(p.requires_grad == (name == part) for p in module.parameters())
        return out

    algorithm.loss = loss
    trainer(_batch())
    assert [part for part, _, _ in seen] == ["critic", "critic", "policy", "temperature"]
    assert all(rows == B // 2 for _, _, rows in seen) and seen[2][1] == seen[3][1] != seen[1][1]
    for name, part in algorithm.parts.items():
        assert any(not torch.equal(value, before[name][key]) for key, value in part.module.state_dict().items())
    assert all(p.grad is None for p in (*critic.parameters(), *target.parameters(), *policy.parameters()))
    for old, new, source in zip(followed, target.parameters(), critic.parameters(), strict=True):
        assert not torch.equal(old, new) and ((new - old) * (source - old) >= -1e-7).all()


def test_the_last_part_of_the_batch_trains_the_policy():
    algorithm, batch = _rlpd(utd=3, batch_size=B // 3), _batch()
    rows = []
    original = algorithm.loss
    algorithm.loss = lambda part, micro: (rows.append((part, micro.index_B.tolist())), original(part, micro))[1]
    Trainer(algorithm)(batch)
    critic = [index for part, index in rows if part == "critic"]
    assert sorted(itertools.chain(*critic)) == list(range(B)) and len(critic) == 3
    assert [index for part, index in rows if part != "critic"] == [critic[-1]] * 2


def test_a_resumed_run_goes_on_to_the_bit():
    def run(algorithm, trainer, steps):
        for step in steps:
            trainer(_batch(step))
        return algorithm

    settings = {"utd": 2, "batch_size": B // 2, "bc_alpha": 0.2, "num_critics": 4}
    straight = _rlpd(**settings)
    run(straight, Trainer(straight), range(5))
    first = _rlpd(**settings)
    trainer = Trainer(first)
    run(first, trainer, range(3))
    state = copy.deepcopy((first.state_dict(), trainer.engine.weights(), trainer.engine.state()))
    second = _rlpd(_policy(), **{**settings})
    with torch.no_grad():
        for parameter in second._critic.parameters():
            parameter.add_(1.0)
    resumed = Trainer(second)
    resumed.step = 3
    resumed.engine.load_weights(state[1])
    second.load_state_dict(state[0])
    resumed.engine.load_state(state[2])
    run(second, resumed, range(3, 5))
    for one, other in ((straight.acting(), second.acting()), (straight._target.module, second._target.module)):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    for name, part in straight.parts.items():
        assert all(torch.equal(v, second.parts[name].module.state_dict()[k]) for k, v in part.module.state_dict().items())


def test_the_policy_waits_for_the_critics():
    algorithm = _rlpd(critic_steps=2)
    trainer, weights, critics = Trainer(algorithm), [], []
    for step in range(3):
        weights.append(copy.deepcopy([*algorithm._policy.state_dict().values(), algorithm._temperature.log_alpha.detach()]))
        critics.append(copy.deepcopy([*algorithm._critic.state_dict().values()]))
        trainer(_batch(step))
    weights.append([*algorithm._policy.state_dict().values(), algorithm._temperature.log_alpha.detach()])
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(weights)]
    assert same == [True, True, False]
    assert not all(torch.equal(a, b) for a, b in zip(*critics[:2], strict=True))


def test_half_of_a_batch_is_what_people_did_and_corrections_are_in_both_halves():
    needs, rng = _rlpd(batch_size=1000).needs, np.random.default_rng(0)
    number = {Source.POLICY: 300, Source.OPERATOR: 100, Source.DEMO: 100}
    starts = dict(zip(number, (0, 1000, 2000), strict=True))

    def share(*present):
        pools = {(int(one), 0): starts[one] + np.arange(number[one]) for one in present}
        steps, _ = draw_part(pools, needs, None, None, rng, None, 1000, None)
        return {one: ((steps >= starts[one]) & (steps < starts[one] + 1000)).mean() for one in number}

    found = share(*number)  # of 1/2, a half of 200 steps and a quarter of 400
    assert found[Source.OPERATOR] == pytest.approx(0.5 * 0.5 + 0.5 * 0.25, abs=0.06)
    assert found[Source.DEMO] == pytest.approx(0.25, abs=0.06) and found[Source.POLICY] == pytest.approx(0.375, abs=0.06)
    assert share(Source.POLICY, Source.DEMO) == {Source.POLICY: 0.5, Source.OPERATOR: 0.0, Source.DEMO: 0.5}
    assert share(Source.DEMO)[Source.DEMO] == 1.0  # before there is anything online
    assert share(Source.POLICY)[Source.POLICY] == 1.0
    assert needs.offsets == (0, H) and needs.batch_size == 1000 and _rlpd(utd=4).needs.batch_size == 4 * B


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ((Source.DEMO,), "from demonstrations alone"),
        ((Source.POLICY,), "no demonstration or correction"),
        ((Source.DEMO, Source.POLICY), ""),
        ((Source.OPERATOR,), ""),
    ],
)
def test_it_says_what_data_it_lacks_and_trains_meanwhile(sources, said):
    algorithm = _rlpd()
    trainer, before = Trainer(algorithm), copy.deepcopy(algorithm._policy.state_dict())
    trainer(_batch(source_B=torch.tensor([int(sources[b % len(sources)]) for b in range(B)])))
    assert said in algorithm.advice and bool(said) == bool(algorithm.advice)
    assert any(not torch.equal(value, before[name]) for name, value in algorithm._policy.state_dict().items())


def test_rewards_that_are_all_zero_are_said():
    algorithm = _rlpd()
    trainer = Trainer(algorithm)
    for step in range(25):
        batch = _batch(step)
        batch.rewards_BH[:], batch.return_B[:] = 0.0, 0.0
        stats = trainer(batch)
    assert "all rewards of the robots are 0" in algorithm.advice
    assert all(math.isfinite(value) for value in stats.values())


def test_it_reads_cameras_and_the_critics_see_them_moved():
    policy = cases.make("squashed, images")
    spec, known = policy.spec, cases.statistics_of(policy.spec)
    algorithm = _rlpd(policy, DataFacts((), known), critic={"width": 16, "num_layers": 1, "vision_width": 16, "image_dims": 8})
    obs, after = cases.observe(spec, B), cases.observe(spec, B, seed=9)
    batch = make_batch(
        obs, torch.randn(B, cases.H, cases.A), obs_at={cases.H: after}, inside_at={cases.H: torch.ones(B, dtype=torch.bool)}
    )
    stats = Trainer(algorithm)(batch)
    assert all(math.isfinite(value) for value in stats.values()) and stats["critic.grad_norm"] > 0
    algorithm._critic.reader.cameras._shift = 0
    still = algorithm.loss("critic", batch).sum
    algorithm._critic.reader.cameras._shift = 4
    assert algorithm.loss("critic", batch).sum != still


def test_what_acts_is_the_average_of_the_policy():
    algorithm = _rlpd(ema_decay=0.9)
    trainer = Trainer(algorithm)
    for step in range(3):
        trainer(_batch(step))
    assert algorithm.acting().family == "squashed" and not any(p.requires_grad for p in algorithm.acting().parameters())
    assert not torch.equal(algorithm.acting().head.weight, algorithm._policy.head.weight)


def test_from_few_slow_demonstrations_it_learns_online_what_they_do_not_show():
    """A point that is to come near a goal before the time is up; demonstrations are a third as fast as could be."""
    rng = np.random.default_rng(0)
    memory = Memory(reach_toy.play(reach_toy.demonstrate, rng, 4, Source.DEMO))
    torch.manual_seed(0)
    facts = memory.facts()
    policy = reach_toy.make_policy("squashed", facts, bounds=[-1.0, 1.0], log_std=-1.0)
    start = Trainer(Bc(policy, BcConfig(batch_size=64)))
    for step in range(60):
        start(memory.batch(start.algorithm.needs, step))
    cloned, slow = reach_toy.score(start.algorithm.acting())
    assert 0.2 < cloned < 0.7
    start.engine.close()
    config = {"batch_size": 64, "utd": 3, "num_critics": 3, "critic": {"width": 64, "num_layers": 2}, "discount": 0.9}
    rates = {"learning_rate": 3e-3, "critic_learning_rate": 3e-3, "tau": 0.05, "ema_decay": 0.95}
    trainer = Trainer(Rlpd(policy, RlpdConfig(**config, **rates), facts))
    for step in range(160):
        if step % 10 == 0:
            memory.add(reach_toy.play(reach_toy.acting(trainer.algorithm.acting(), sample=True), rng, 4, Source.POLICY))
        trainer(memory.batch(trainer.algorithm.needs, step))
    learnt, fast = reach_toy.score(trainer.algorithm.acting())
    assert learnt > 0.9 and fast < 0.8 * slow


@pytest.mark.parametrize("name", ["flow", "flow, sde", "token, parallel"])
def test_policies_without_a_density_of_their_own_actions_are_refused(name):
    with pytest.raises(ConfigError, match=r"policy\.family=squashed"):
        Rlpd(cases.make(name), RlpdConfig(**SMALL))


@pytest.mark.parametrize(
    "config",
    [
        {"utd": 0},
        {"utd": 65},
        {"demo_share": 1.5},
        {"num_targets": 4},
        {"tau": 0.0},
        {"actor_q": "max"},
        {"temperature": 0.0},
        {"target_entropy": 0.7},
        {"bc_alpha": -1.0},
        {"critic_steps": -1},
        {"learning_rate": 0.0},
        {"temperature_learning_rate": -1.0},
        {"ema_decay": 1.0},
        {"batch_size": 0},
        {"discount": 0.0},
        {"reward": "dense"},
    ],
)
def test_refusals(config):
    ((name, value),) = config.items()
    with pytest.raises(ConfigError, match=f"{name} = {value!r}"):
        Rlpd(_policy(), RlpdConfig(**{**SMALL, **config}))


def test_a_chunk_is_imitated_by_the_policys_own_loss():
    """At the bounds of the action too, where a likelihood would not be bounded."""
    policy = _policy(bounds=[-1.0, 1.0])
    batch = _batch(source_B=torch.full((B,), int(Source.DEMO)), mask_BH=torch.ones(B, H, dtype=torch.bool))
    batch.actions_BHA = batch.actions_BHA.sign()
    algorithm = _rlpd(policy, bc_alpha=1.0)
    loss = policy.imitation_loss(batch.obs, Chunk(batch.actions_BHA), torch.ones(B, H)).mean()
    torch.testing.assert_close(algorithm.loss("policy", batch).stats["imitation"][0] / B, loss)
    assert loss < 2
