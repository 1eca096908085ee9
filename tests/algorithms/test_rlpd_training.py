"""RLPD in the loop: what is updated when and by which rows, what it says, and that it learns."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from algorithms.base import DataFacts
from algorithms.bc import Bc, BcConfig
from algorithms.policies.base import INSTRUCTION
from algorithms.rlpd import Rlpd, RlpdConfig
from buffer.draw import draw_part
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import STATE
from tests.algorithms import reach_toy
from tests.algorithms.policies import cases
from tests.algorithms.reach_toy import Memory, Trainer
from tests.algorithms.rlpd_toys import GAMMA, SMALL, A, B, H, always, make_policy, make_rlpd, make_rows
from tests.batches import make_batch


@pytest.mark.parametrize("ending", ["whole", "cut"])
def test_one_state_for_ever_is_worth_the_reward_by_one_minus_the_discount(ending):
    algorithm = make_rlpd(backup_entropy=False, tau=0.2, critic_learning_rate=1e-2)
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


@pytest.mark.parametrize(("target", "rises"), [(0.6, True), (-6.0, False)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target(target, rises):
    algorithm = make_rlpd(target_entropy=target)
    Trainer(algorithm)(make_rows())
    assert (algorithm._temperature.alpha().item() > 0.01) == rises


def test_a_temperature_that_is_not_learnt_stays():
    algorithm = make_rlpd(temperature_learning_rate=0.0, temperature=0.5)
    Trainer(algorithm)(make_rows())
    assert algorithm._temperature.alpha().item() == pytest.approx(0.5)


def test_subsets_of_critics_are_drawn_anew_for_each_update_and_again_alike():
    algorithm = make_rlpd(num_critics=6, num_targets=2, utd=3, batch_size=4)
    drawn = {}

    def subset():
        chosen = Rlpd._subset(algorithm)
        drawn.setdefault((algorithm._step, algorithm._update), []).append(tuple(chosen.tolist()))
        return chosen

    algorithm._subset = subset
    trainer = Trainer(algorithm, micro_batch=2)
    for _ in range(8):
        trainer(make_rows())
    assert set(drawn) == {(step, update) for step in range(8) for update in range(3)}
    assert all(len(each) == 2 and len(set(each)) == 1 for each in drawn.values())  # all micro-batches: the same
    chosen = {each[0] for each in drawn.values()}
    assert all(len(set(pair)) == 2 for pair in chosen) and len(chosen) > 8
    assert {number for pair in chosen for number in pair} == set(range(6))
    again = make_rlpd(num_critics=6, num_targets=2, utd=3, batch_size=4)
    again._step, again._update = 5, 2
    assert tuple(again._subset().tolist()) == drawn[5, 2][0]
    algorithm._target.module = always(5.0, 4.0, 3.0, 2.0, 1.0, 0.0)
    algorithm._subset = lambda: torch.tensor([3, 1])
    stub = make_rows()
    algorithm.config.backup_entropy = False
    whole = torch.arange(B) % 3 == 0
    reward = (stub.rewards_BH * GAMMA ** torch.arange(H)).sum(1)
    torch.testing.assert_close(algorithm._target_value(stub)[0][whole], (reward + GAMMA**H * 2.0)[whole])


def test_a_part_trains_alone_and_the_targets_follow():
    algorithm = make_rlpd(utd=2, batch_size=B // 2, tau=0.1)
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
    trainer(make_rows())
    assert [part for part, _, _ in seen] == ["critic", "critic", "policy", "temperature"]
    assert all(rows == B // 2 for _, _, rows in seen) and seen[2][1] == seen[3][1] != seen[1][1]
    for name, part in algorithm.parts.items():
        assert any(not torch.equal(value, before[name][key]) for key, value in part.module.state_dict().items())
    assert all(p.grad is None for p in (*critic.parameters(), *target.parameters(), *policy.parameters()))
    for old, new, source in zip(followed, target.parameters(), critic.parameters(), strict=True):
        assert not torch.equal(old, new) and ((new - old) * (source - old) >= -1e-7).all()


def test_the_last_part_of_the_batch_trains_the_policy():
    algorithm, batch = make_rlpd(utd=3, batch_size=B // 3), make_rows()
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
            trainer(make_rows(step))
        return algorithm

    settings = {"utd": 2, "batch_size": B // 2, "bc_alpha": 0.2, "num_critics": 4}
    straight = make_rlpd(**settings)
    run(straight, Trainer(straight), range(5))
    first = make_rlpd(**settings)
    trainer = Trainer(first)
    run(first, trainer, range(3))
    state = copy.deepcopy((first.state_dict(), trainer.engine.weights(), trainer.engine.state()))
    second = make_rlpd(make_policy(), **{**settings})
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
    algorithm = make_rlpd(critic_steps=2)
    trainer, weights, critics = Trainer(algorithm), [], []
    trainer.step = 1000  # of another algorithm
    for step in range(3):
        weights.append(copy.deepcopy([*algorithm._policy.state_dict().values(), algorithm._temperature.log_alpha.detach()]))
        critics.append(copy.deepcopy([*algorithm._critic.state_dict().values()]))
        trainer(make_rows(step))
        state = copy.deepcopy(algorithm.state_dict())
        algorithm.load_state_dict(state)
    weights.append([*algorithm._policy.state_dict().values(), algorithm._temperature.log_alpha.detach()])
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(weights)]
    assert same == [True, True, False]
    assert not all(torch.equal(a, b) for a, b in zip(*critics[:2], strict=True))


def test_half_of_a_batch_is_what_people_did_and_corrections_are_in_both_halves():
    needs, rng = make_rlpd(batch_size=1000).needs, np.random.default_rng(0)
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
    assert needs.offsets == (0, H) and needs.batch_size == 1000 and make_rlpd(utd=4).needs.batch_size == 4 * B


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
    algorithm = make_rlpd()
    trainer, before = Trainer(algorithm), copy.deepcopy(algorithm._policy.state_dict())
    trainer(make_rows(source_B=torch.tensor([int(sources[b % len(sources)]) for b in range(B)])))
    assert said in algorithm.advice and bool(said) == bool(algorithm.advice)
    assert any(not torch.equal(value, before[name]) for name, value in algorithm._policy.state_dict().items())


def test_rewards_that_are_all_zero_are_said():
    algorithm = make_rlpd()
    trainer = Trainer(algorithm)
    for step in range(25):
        batch = make_rows(step)
        batch.rewards_BH[:], batch.return_B[:] = 0.0, 0.0
        stats = trainer(batch)
    assert "all rewards of the robots are 0" in algorithm.advice
    assert all(math.isfinite(value) for value in stats.values())


def test_it_reads_cameras_and_the_critics_see_them_moved():
    policy = cases.make("squashed, images")
    spec, known = policy.spec, cases.statistics_of(policy.spec)
    algorithm = make_rlpd(
        policy, DataFacts((), known), critic={"width": 16, "num_layers": 1, "vision_width": 16, "image_dims": 8}
    )
    obs, after = cases.observe(spec, B), cases.observe(spec, B, seed=9)
    batch = make_batch(
        obs, torch.randn(B, cases.H, cases.A), obs_at={cases.H: after}, inside_at={cases.H: torch.ones(B, dtype=torch.bool)}
    )
    stats = Trainer(algorithm)(batch)
    assert all(math.isfinite(value) for value in stats.values()) and stats["critic.grad_norm"] > 0
    moved, still = (_values(algorithm, batch, shift) for shift in (4, 0))
    assert all((one != other).all() for one, other in zip(moved, still, strict=True))


def _values(algorithm, batch, shift):
    """Of the data and of what follows it, with images moved by so many pixels."""
    algorithm._critic.reader.cameras._shift = shift
    return algorithm.loss("critic", batch).stats["value"][0], algorithm._target_value(batch)[0]


def test_what_acts_is_the_average_of_the_policy():
    algorithm = make_rlpd(ema_decay=0.9)
    trainer = Trainer(algorithm)
    for step in range(3):
        trainer(make_rows(step))
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
        Rlpd(make_policy(), RlpdConfig(**{**SMALL, **config}))
