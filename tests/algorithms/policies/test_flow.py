"""What the flow family promises beyond the contract."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from algorithms.policies.base import ADVANTAGE, DELAY, PREFIX, Chunk
from algorithms.policies.flow import transition_kl
from algorithms.policies.flow_config import CHAIN, INDEX, PREFIXED
from algorithms.policies.flow_sde import sigmas, times
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError
from fleet.spec import ACTION, STATE
from tests.algorithms.policies.cases import B, make, noise, observe, prefixed, rows, targets

SDE, ONE, LEARNED = "flow, sde", "flow, sde of one step", "flow, learned noise"
K = 4  # steps of these cases
TINY = {
    "reads": {STATE: [2]},
    "action_dim": 2,
    "horizon": 2,
    "instruction_dim": 0,
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    policy = build("flow", {**TINY, "num_steps": 3, **changes})
    nudge(policy, 0.1, seed)
    return policy


def nudge(policy, by, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=g))


def asked(policy, obs, time):
    given = None if policy.advantage is None else policy.advantage(torch.tensor([2, 0, 1])[obs[ADVANTAGE].long() + 1])
    return policy.head.ask(time, given)


def velocities(policy, obs, x_BHA, time):
    """The head's, without whatever the policy does around it."""
    return policy.head(x_BHA, asked(policy, obs, time), policy.head.memory(policy.encoder(obs)))[0]


def spied(policy):
    """The times that its head is asked about from now on."""
    ask, seen = policy.head.ask, []
    policy.head.ask = lambda time, given=None: seen.append(time) or ask(time, given)
    return seen


def test_the_density_is_that_of_each_transition():
    policy = make(SDE)
    obs = observe(policy.spec)
    chunk = policy.act(obs, noise(policy))
    chain = chunk.replay[CHAIN]
    assert torch.equal(policy.scale.restore(chain[:, -1]), chunk.actions_BHA)  # what is executed is the last state
    assert torch.equal(chain[:, 0], noise(policy)["start"])
    expected = []
    for k, (t, sigma) in enumerate(zip(times(K).float(), sigmas(K, 0.7).float(), strict=True)):
        x, v = chain[:, k], velocities(policy, obs, chain[:, k], t.expand(B, policy.spec.horizon))
        mean = x - v / K - sigma**2 / (2 * t) * (x + (1 - t) * v) / K
        expected.append(torch.distributions.Normal(mean, sigma / math.sqrt(K)).log_prob(chain[:, k + 1]).sum(-1))
    torch.testing.assert_close(chunk.log_prob_BT, torch.cat(expected, 1), rtol=1e-5, atol=1e-4)
    assert policy.decision_mask(chunk, torch.eye(B, policy.spec.horizon)).unflatten(1, (K, -1)).sum(1).eq(K).sum() == 4


def test_one_drawn_step_among_those_of_the_ode():
    policy = make(ONE)
    obs, drawn = observe(policy.spec), noise(policy)
    drawn["index"] = torch.tensor([0, 1, 2, 3, 3])
    chunk = policy.act(obs, drawn)
    assert chunk.log_prob_BT.shape == (B, policy.spec.horizon) and torch.equal(chunk.replay[INDEX][:, 0], drawn["index"])
    x, free = drawn["start"], torch.zeros(B, policy.spec.horizon)
    for k, (t, sigma) in enumerate(zip(times(K).float(), sigmas(K, 0.5).float(), strict=True)):
        here = drawn["index"] == k
        assert torch.equal(chunk.replay[CHAIN][here, 0], x[here])
        v = velocities(policy, obs, x, t.expand_as(free))
        mean = x - v / K - sigma**2 / (2 * t) * (x + (1 - t) * v) / K
        x = torch.where(here[:, None, None], mean + sigma / math.sqrt(K) * drawn["steps"][:, 0], x - v / K)
        torch.testing.assert_close(chunk.replay[CHAIN][here, 1], x[here])
        law = torch.distributions.Normal(mean, sigma / math.sqrt(K))
        torch.testing.assert_close(chunk.log_prob_BT[here], law.log_prob(x).sum(-1)[here], rtol=1e-5, atol=1e-4)
        x = torch.where(here[:, None, None], chunk.replay[CHAIN][:, 1], x)
    torch.testing.assert_close(chunk.actions_BHA, policy.scale.restore(x))


@pytest.mark.parametrize("name", [SDE, ONE, LEARNED])
def test_columns_of_a_learner_are_flat(name):
    policy = make(name)
    obs = observe(policy.spec)
    chunk = policy.act(obs, noise(policy))
    flat = {column: value.flatten(1).float() for column, value in chunk.replay.items()}
    assert torch.equal(policy.log_prob(obs, Chunk(chunk.actions_BHA, None, flat)), chunk.log_prob_BT)


@pytest.mark.parametrize(
    "changes", [{"noise_level": 0.7}, {"noise_level": 0.7, "stochastic": "one"}, {"noise_kind": "learned"}]
)
def test_ratios_have_mean_one_under_the_behaviour(changes, scale):
    policy, other, num = tiny(**changes), tiny(**changes), 4_000 * scale
    nudge(other, 0.01, 5)
    obs = {STATE: torch.tensor([[0.3, -0.2]]).expand(num, -1)}
    with torch.no_grad():
        chunk = policy.act(obs, noise(policy, num))
        ratio_B = (other.log_prob(obs, chunk) - chunk.log_prob_BT).sum(1).exp()
    error = ratio_B.std() / math.sqrt(num)
    assert ratio_B.std() > 0.05 and error < 0.03 and abs(ratio_B.mean() - 1) < 4 * error


@pytest.mark.parametrize("changes", [{"noise_level": 0.7}, {"noise_kind": "learned"}])
def test_kl_is_the_mean_log_ratio(changes, scale):
    policy, other, num = tiny(**changes), tiny(**changes), 4_000 * scale
    nudge(other, 0.02, 5)
    obs = {STATE: torch.tensor([[0.3, -0.2]]).expand(num, -1)}
    with torch.no_grad():
        chunk = policy.act(obs, noise(policy, num))
        log_ratio_BT = chunk.log_prob_BT - other.log_prob(obs, chunk)
        kl_BT = transition_kl(policy, other, obs, chunk)
        assert (transition_kl(policy, policy, obs, chunk) == 0).all()
    assert kl_BT.shape == log_ratio_BT.shape and (kl_BT >= 0).all()
    difference_B = (log_ratio_BT - kl_BT).sum(1)
    assert kl_BT.sum(1).mean() > 0.005 and abs(difference_B.mean()) < 4 * difference_B.std() / math.sqrt(num)
    transition_kl(policy, other, obs, chunk).mean().backward()
    assert policy.head.out.weight.grad.abs().sum() > 0 and other.head.out.weight.grad is None


@pytest.mark.parametrize("name", [SDE, ONE, LEARNED])
def test_gradients_of_log_prob_are_those_of_finite_differences(name):
    policy = make(name)
    obs = prefixed(policy.spec, observe(policy.spec)) if policy.spec.max_delay else observe(policy.spec)
    with torch.no_grad():
        chunk = policy.act(obs, noise(policy))
    policy.log_prob(obs, chunk).sum().backward()
    g, step = torch.Generator().manual_seed(3), 2e-3
    for part in (
        policy.head.out,
        policy.head.blocks[0].cross,
        policy.encoder,
        policy.head.time,
        policy.head.spread or policy.head.into,
    ):
        directions = [torch.randn(p.shape, generator=g) for p in part.parameters()]
        slope = sum((p.grad * d).sum() for p, d in zip(part.parameters(), directions, strict=True))
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                for p, d in zip(part.parameters(), directions, strict=True):
                    p.add_(sign * step * d)
                ends.append(policy.log_prob(obs, chunk).sum())
        with torch.no_grad():
            for p, d in zip(part.parameters(), directions, strict=True):
                p.add_(step * d)
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("name", [SDE, ONE, LEARNED])
def test_steps_by_number_are_those_by_time(name):
    policy = make(name)
    obs, x = observe(policy.spec), noise(policy)["start"]
    fixed = None
    if policy.spec.max_delay:
        fixed = torch.arange(policy.spec.horizon) < torch.arange(B)[:, None] % (policy.spec.max_delay + 1)
    index = torch.arange(B) % K
    for guidance in (1.0, 0.0, 2.0):
        by_time, by_number = (policy.flow(obs, fixed, guidance, by_step=by_step) for by_step in (False, True))
        for one, other in zip(by_time(x, times(K).float()[index]), by_number(x, index), strict=True):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_condition_that_it_does_not_take_is_not_looked_at():
    policy = make(ONE)
    obs = observe(policy.spec)
    said = {**obs, ADVANTAGE: torch.ones(B)}
    assert torch.equal(policy.act(said).actions_BHA, policy.act(obs).actions_BHA)


def test_guidance_is_linear_in_the_velocity():
    policy = tiny(advantage=True, num_steps=1, noise_level=0.5)
    obs = {**observe(policy.spec), ADVANTAGE: torch.tensor([1.0, -1, 1, -1, 0])}
    with torch.no_grad():
        none, one, more = (policy.act(obs, guidance=g).actions_BHA for g in (0.0, 1.0, 2.5))
        assert (one - none)[:4].abs().amax((1, 2)).min() > 1e-4 and torch.equal(none[4], one[4])
        torch.testing.assert_close(more, none + 2.5 * (one - none))
        guided, plain = (policy.act(obs, noise(policy), guidance=g) for g in (2.5, 1.0))
    assert guided.log_prob_BT is None and plain.log_prob_BT is not None and guided.replay.keys() == plain.replay.keys()


def test_the_loss_is_flow_matching_of_scaled_actions():
    policy = make("flow")
    obs, drawn, (chunk, mask_BH) = observe(policy.spec), noise(policy), targets(policy.spec)
    data, t = policy.scale.normalise(chunk.actions_BHA), drawn["time"]
    x = (1 - t)[0] * data[:1] + t[0] * drawn["start"][:1]
    row = rows(obs, torch.tensor([0]))
    error = (velocities(policy, row, x, t[:1]) - (drawn["start"] - data)[:1]) ** 2
    loss_B = policy.imitation_loss(obs, chunk, mask_BH, drawn)
    torch.testing.assert_close(loss_B[:1], error.mean((1, 2)))
    start = torch.where(mask_BH[..., None] > 0, drawn["start"], 7.0)
    assert torch.equal(policy.imitation_loss(obs, chunk, mask_BH, {**drawn, "start": start}), loss_B)  # padding is not seen
    with pytest.raises(PolicyError, match="noise"):
        policy.imitation_loss(obs, chunk, mask_BH)


def test_times_of_the_loss(scale):
    num, seen = 20_000 * scale, []
    for sampling in ("uniform", "beta"):
        policy = tiny(time_sampling=sampling)
        times_B = spied(policy)
        policy.imitation_loss(
            {STATE: torch.zeros(num, 2)}, Chunk(torch.zeros(num, 2, 2)), torch.ones(num, 2), noise(policy, num)
        )
        seen += times_B
    uniform, beta = (time.numpy() for time in seen)
    quantiles = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(np.quantile(uniform, quantiles), quantiles, atol=0.02)
    np.testing.assert_allclose(np.quantile(beta, quantiles), quantiles ** (1 / 1.5), atol=0.02)  # P(t < x) = x^1.5
    assert beta.min() >= 0.001 and beta.max() <= 1


def test_a_prefix_stays_clean_at_every_step():
    policy = make(SDE)
    obs, seen = prefixed(policy.spec, observe(policy.spec)), []
    policy.head.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    fixed = torch.arange(policy.spec.horizon) < obs[DELAY][:, None]
    clean = policy.scale.normalise(torch.nn.functional.pad(obs[PREFIX], (0, 0, 0, policy.spec.horizon - policy.spec.max_delay)))
    for drawn in (None, noise(policy)):
        seen.clear()
        chunk = policy.act(obs, drawn)
        assert len(seen) == K
        for (x, wanted), t in zip(seen, times(K), strict=True):
            assert torch.equal(x[fixed], clean[fixed])
            torch.testing.assert_close(wanted, asked(policy, obs, torch.where(fixed, 0.0, t.float())))
    assert torch.equal(chunk.replay[PREFIXED][:, 0], obs[DELAY])
    mask_BKH = policy.decision_mask(chunk, torch.ones_like(fixed).float()).unflatten(1, (K, -1))
    log_prob_BKH = chunk.log_prob_BT.unflatten(1, (K, -1))
    for k in range(K):  # what is decided already is no decision
        assert torch.equal(mask_BKH[:, k] == 0, fixed) and torch.equal(log_prob_BKH[:, k] == 0, fixed)
    bare = {name: value for name, value in obs.items() if name not in (PREFIX, DELAY)}
    assert torch.equal(policy.log_prob(bare, chunk), chunk.log_prob_BT)  # a learner has the chunk alone
    garbage = torch.where(fixed[:, : policy.spec.max_delay, None], obs[PREFIX], float("nan"))
    assert torch.equal(policy.act({**obs, PREFIX: garbage}).actions_BHA, policy.act(obs).actions_BHA)


def test_the_loss_behind_a_prefix():
    policy = make(ONE)
    obs, drawn, (chunk, _) = observe(policy.spec), noise(policy), targets(policy.spec)
    mask_BH = torch.ones(B, policy.spec.horizon)
    drawn["delay"] = torch.arange(B) % (policy.spec.max_delay + 1)
    kept, seen = [], spied(policy)
    policy.head.register_forward_hook(lambda _, args, out: kept.append((args, out[0])) or out[0].retain_grad())
    loss_B = policy.imitation_loss(obs, chunk, mask_BH, drawn)
    loss_B.sum().backward()
    (x, *_), v = kept[0]
    fixed = torch.arange(policy.spec.horizon) < drawn["delay"][:, None]
    assert (v.grad[fixed] == 0).all() and (v.grad[~fixed] != 0).all()
    assert torch.equal(x[fixed], policy.scale.normalise(chunk.actions_BHA)[fixed])
    assert torch.equal(seen[0], torch.where(fixed, 0.0, drawn["time"][:, None]))
    error_BH = ((v - (drawn["start"] - policy.scale.normalise(chunk.actions_BHA))) ** 2).mean(-1)
    expected = torch.stack([error[~hidden].mean() for error, hidden in zip(error_BH, fixed, strict=True)])
    torch.testing.assert_close(loss_B, expected)
    ordinary = build("flow", {**policy.config, "max_delay": 0})
    ordinary.load_state_dict(policy.state_dict())
    none = {**drawn, "delay": torch.zeros(B, dtype=torch.long)}
    plain_B = ordinary.imitation_loss(obs, chunk, mask_BH, none)
    torch.testing.assert_close(policy.imitation_loss(obs, chunk, mask_BH, none), plain_B)
    one_valid = torch.eye(1, policy.spec.horizon).expand(B, -1)
    assert (policy.imitation_loss(obs, chunk, one_valid, {**drawn, "delay": torch.full((B,), 3)}) > 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({DELAY: torch.tensor([0, 1, 2, 3, 0])}, "'delay' is 3"),
        ({DELAY: torch.tensor([0, -1, 0, 0, 0])}, "'delay' is -1"),
        ({DELAY: torch.ones(B).long(), PREFIX: None}, "'action_prefix' has shape None"),
        ({DELAY: torch.ones(B).long(), PREFIX: torch.zeros(B, 3, 3)}, r"\(5, 3, 3\)"),
    ],
)
def test_prefixes_that_are_refused(changes, said):
    policy = make(SDE)
    obs = {k: v for k, v in {**prefixed(policy.spec, observe(policy.spec)), **changes}.items() if v is not None}
    with pytest.raises(PolicyError, match=said):
        policy.act(obs)
    plain = make("flow")
    with pytest.raises(PolicyError, match="max_delay"):
        plain.act({**observe(plain.spec), DELAY: torch.ones(B).long(), PREFIX: torch.zeros(B, 1, 3)})


def test_learned_noise_stays_in_its_range():
    policy = make(LEARNED)
    nudge(policy, 1.0, 3)
    obs = observe(policy.spec)
    _, std_BJHA = policy.transitions(obs, policy.act(obs, noise(policy)))
    assert std_BJHA.min() >= 0.08 * (1 - 1e-6) and std_BJHA.max() <= 0.16 * (1 + 1e-6) and std_BJHA.std() > 0.005


def test_it_keeps_modes_that_a_regressor_averages(scale):
    """Four right answers in one state: the nearest point to all of them is none of them."""
    modes = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    sizes = {"reads": {STATE: [2]}, "action_dim": 2, "horizon": 1, "instruction_dim": 0, "width": 32}
    g = torch.Generator().manual_seed(0)
    ends = {}
    for family, config in (("flow", {"num_layers": 1, "num_heads": 2, "encoder_layers": 0}), ("mlp", {})):
        torch.manual_seed(0)
        policy = build(family, {**sizes, **config})
        policy.set_statistics({STATE: Statistics.of(np.ones((2, 2))), ACTION: Statistics.of(modes.numpy())})
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
        for _ in range(250):
            actions = modes[torch.randint(0, 4, (64,), generator=g)][:, None]
            loss = policy.imitation_loss({STATE: torch.ones(64, 2)}, Chunk(actions), torch.ones(64, 1), policy.noise(64, g))
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        with torch.no_grad():
            obs = {STATE: torch.ones(400, 2)}
            drawn = policy.noise(400, g) if family == "flow" else None
            ends[family] = policy.act(obs, drawn).actions_BHA[:, 0], policy.act(obs).actions_BHA[0, 0]
    distance, nearest = torch.cdist(ends["flow"][0], modes).min(1)
    assert (distance < 0.3).float().mean() > 0.85 and (nearest.bincount(minlength=4) > 400 * 0.15).all()
    assert (ends["flow"][1] - modes).norm(dim=1).min() < 0.3  # what is deployed is one of them
    assert (ends["mlp"][1] - modes).norm(dim=1).min() > 0.7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 30}, "num_heads divides width"),
        ({"max_delay": 4}, "max_delay < horizon"),
        ({"num_steps": 0}, "at least 1"),
        ({"reads": {}}, "reads is not empty"),
        ({"time_sampling": "bta"}, "uniform or beta"),
        ({"stochastic": "some"}, "all or one"),
        ({"noise_kind": "ode"}, "sde or learned"),
        ({"noise_level": -0.1}, "noise_level"),
        ({"noise_std": [0.2, 0.1]}, "noise_std"),
        ({"nois_level": 1}, "did you mean 'noise_level'"),
    ],
)
def test_refusals(changes, said):
    config = dataclasses.asdict(make("flow")._config)
    with pytest.raises(PolicyError, match=said):
        build("flow", {**config, "num_heads": 4, **changes})
