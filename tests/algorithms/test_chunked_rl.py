"""Every method of chunked_rl keeps these."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from algorithms.base import DataFacts
from algorithms.chunked_rl import METHODS, ChunkedRl, ChunkedRlConfig
from algorithms.policies.base import INSTRUCTION
from algorithms.policies.registry import build, describe, load_published, published, rebuild
from fleet.batch import Outcome, Within
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import STATE
from tests.algorithms.line import TASKS, Episodes
from tests.algorithms.reach_toy import Trainer
from tests.batches import take_rows

B, H, A = 12, 3, 1
ALL = pytest.mark.parametrize("method", METHODS)
SIZES = {"reads": {STATE: [1]}, "action_dim": A, "horizon": H, "instruction_dim": 4, "width": 16, "num_layers": 1}
FLOW = {**SIZES, "num_heads": 2, "num_steps": 2}
SMALL = {"width": 16, "num_layers": 1}


def episodes(seed=0):
    """Demonstrations, and episodes of the policy in some of which an operator takes over; some are open."""
    rng, made = np.random.default_rng(seed), Episodes()
    for i in range(16):
        n = int(rng.integers(2, 9))
        source = Source.DEMO if i % 2 else np.where(np.arange(n) < 3, Source.POLICY, Source.OPERATOR)
        outcome = (Outcome.SUCCESS, Outcome.SUCCESS, Outcome.FAILURE, Outcome.OPEN)[i % 4]
        made.add(rng.uniform(-1, 1, n), rng.uniform(-1, 1, n), outcome, source, task=i % TASKS)
    return made


DATA = episodes()


def make(method, family="flow", batch_size=B, **config):
    torch.manual_seed(0)
    policy = build(family, FLOW if family == "flow" else SIZES)
    policy.set_statistics(DATA.statistics())
    config = {
        "target_samples": 3,
        "num_samples": 3,
        "critic_steps": 0,
        **({"value": SMALL} if method == "iql" else {}),
        **config,
    }
    config = ChunkedRlConfig(method, batch_size, critic=SMALL, **config)
    return ChunkedRl(policy, config, DataFacts(("a", "b"), DATA.statistics()))


def batch_of(algorithm, step=0):
    return DATA.draw(algorithm.needs, step)


def gradients(algorithm, part, batch):
    module = algorithm.parts[part].module
    module.zero_grad()
    out = algorithm.loss(part, algorithm.prepare(batch))
    (out.sum / out.weight).backward()
    return out, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def state_of(value, path=""):
    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone()}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in state_of(inner, f"{path}/{key}").items()}
    return {path: value}


@ALL
def test_windows_look_ahead_to_where_values_are_needed(method):
    needs = make(method).needs
    assert needs.within is Within.EPISODE and needs.discount == 0.99
    assert needs.offsets == ((0, 1, 2, 3) if method == "cal_ql" else (0, 3))
    assert needs.shares == {(Source.DEMO,): 0.5, (Source.POLICY, Source.OPERATOR): 0.5}
    assert make("cal_ql", prefix_stride=2).needs.offsets == (0, 2, 3)


@ALL
def test_garbage_in_steps_that_were_not_made_changes_nothing(method):
    algorithm = make(method)
    batch = batch_of(algorithm)
    assert not batch.mask_BH.all() and (batch.source_BH != batch.source_B[:, None]).any()
    dirty = copy.deepcopy(batch)
    dirty.actions_BHA[~batch.mask_BH] = torch.nan
    dirty.rewards_BH[~batch.mask_BH] = torch.nan
    dirty.terminated_BH[~batch.mask_BH] = True
    for part in algorithm.parts:
        out, clean = gradients(algorithm, part, batch)
        assert clean and all(torch.isfinite(g).all() for g in clean.values()) and out.per_sample_B.shape == (B,)
        other, changed = gradients(algorithm, part, dirty)
        assert torch.equal(out.sum, other.sum)
        assert all(torch.equal(clean[name], changed[name]) for name in clean)


@ALL
def test_parts_of_a_batch_and_ranks_add_up(method):
    algorithm = make(method)
    trainer = Trainer(algorithm)
    for step in range(2):  # also what runs beside the batch
        trainer(batch_of(algorithm, step))
    batch = batch_of(algorithm, 2)
    for part in algorithm.parts:
        whole, expected = gradients(algorithm, part, batch)
        outs, sums = [], {name: 0.0 for name in expected}
        for rows in (range(0, 5), range(5, B)):
            out, part_of = gradients(algorithm, part, take_rows(batch, rows))
            outs.append(out)
            for name, gradient in part_of.items():
                sums[name] = sums[name] + gradient * out.weight
        torch.testing.assert_close(sum(o.sum for o in outs), whole.sum, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sum(o.weight for o in outs), whole.weight)
        for name, gradient in expected.items():
            torch.testing.assert_close(sums[name] / whole.weight, gradient, rtol=1e-3, atol=1e-5)


@ALL
def test_micro_batches_train_as_the_whole_batch_does(method):
    states = []
    for micro_batch in (0, 5):
        algorithm = make(method)
        trainer = Trainer(algorithm, micro_batch=micro_batch)
        stats = [trainer(batch_of(algorithm, step)) for step in range(3)][-1]
        states.append((stats, state_of(trainer.engine.weights())))
    assert states[0][0] == pytest.approx(states[1][0], rel=2e-3, abs=2e-3)
    for name, value in states[0][1].items():
        torch.testing.assert_close(value, states[1][1][name], rtol=1e-2, atol=1e-3)


@ALL
def test_a_resumed_run_goes_on_to_the_bit(method):
    whole = Trainer(make(method))
    for step in range(5):
        whole(batch_of(whole.algorithm, step))
    first = Trainer(make(method))
    for step in range(3):
        first(batch_of(first.algorithm, step))
    kept = copy.deepcopy((first.engine.weights(), first.engine.state(), first.algorithm.state_dict()))
    second = Trainer(make(method))
    second.engine.load_weights(kept[0])
    second.engine.load_state(kept[1])
    second.algorithm.load_state_dict(kept[2])
    second.step = 3
    for step in range(3, 5):
        second(batch_of(second.algorithm, step))
    expected, found = (
        state_of({"parts": one.engine.weights(), "algorithm": one.algorithm.state_dict()}) for one in (whole, second)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name], name


@ALL
def test_only_the_part_that_is_updated_changes(method):
    """An actor's loss runs through the critic: the critic must neither move nor keep a gradient of it."""
    algorithm = make(method)
    trainer = Trainer(algorithm)
    trainer(batch_of(algorithm))
    batch = algorithm.prepare(batch_of(algorithm, 1))
    for part in algorithm.parts:
        before = {name: state_of(module) for name, module in trainer.engine.weights().items()}
        averages = state_of(algorithm.state_dict())
        trainer.engine.update(part, algorithm.loss, batch)
        for name, module in trainer.engine.weights().items():
            same = all(torch.equal(value, before[name][key]) for key, value in state_of(module).items())
            assert same == (name != part), (part, name)
        assert all(p.grad is None for other in algorithm.parts.values() for p in other.module.parameters())
        for key, value in state_of(algorithm.state_dict()).items():
            assert torch.equal(value, averages[key]) if isinstance(value, torch.Tensor) else value == averages[key]
    assert not any(p.requires_grad for module in algorithm.frozen.values() for p in module.parameters())


@ALL
def test_targets_follow_by_their_share(method):
    algorithm = make(method, tau=0.25, critic_learning_rate=0.1)
    trainer = Trainer(algorithm)
    target, source = algorithm.frozen["target"], algorithm.critic
    before = [p.clone() for p in target.parameters()]
    trainer(batch_of(algorithm))
    for old, now, new in zip(before, target.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)
    assert sum((now - old).abs().sum() for now, old in zip(target.parameters(), before, strict=True)) > 1


@ALL
def test_what_acts_can_be_released(method):
    algorithm = make(method)
    before = state_of(published(algorithm.acting()))
    Trainer(algorithm)(batch_of(algorithm))
    acting = algorithm.acting()
    assert any(not torch.equal(value, before[name]) for name, value in state_of(published(acting)).items())
    robot = rebuild(json.loads(json.dumps(describe(acting))))
    load_published(robot, published(acting))
    obs = {STATE: torch.linspace(-1, 1, 5)[:, None], INSTRUCTION: torch.ones(5, 4)}
    assert torch.equal(robot.act(obs).actions_BHA, acting.act(obs).actions_BHA)
    assert describe(acting)["family"] == ("best_of" if method == "q_chunking" else "flow")


@ALL
def test_rows_of_which_nothing_is_known_do_not_count(method):
    """They stand at the last recorded step of an episode that nothing says the end of."""
    algorithm = make(method)
    batch = batch_of(algorithm)
    batch.mask_BH[0] = torch.arange(H) < 1
    batch.outcome_B[0], batch.steps_to_go_B[0] = int(Outcome.OPEN), -1
    for inside in batch.inside_at.values():
        inside[0] = False
    assert not algorithm._targets(algorithm.prepare(batch))[0].requires_grad
    for part in {"critic", "value"} & set(algorithm.parts):
        out, expected = gradients(algorithm, part, batch)
        other, found = gradients(algorithm, part, take_rows(batch, range(1, B)))
        torch.testing.assert_close(out.sum, other.sum)
        assert out.weight == other.weight
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@ALL
@pytest.mark.parametrize("reward", ["environment", "steps"])
def test_other_rewards(method, reward):
    algorithm = make(method, reward=reward, failure_cost=3.0 if reward == "steps" else 0.0, step_cost=0.0)
    stats = Trainer(algorithm)(batch_of(algorithm))
    assert all(np.isfinite(value) for value in stats.values())
    assert (stats["critic.reward_mean"] < -0.1) == (reward == "steps")


@ALL
def test_open_episodes_alone_are_learnt_from_and_it_is_said_what_is_missing(method):
    algorithm = make(method)
    trainer, batch = Trainer(algorithm), batch_of(algorithm)
    batch.outcome_B[:], batch.steps_to_go_B[:] = int(Outcome.OPEN), -1
    for _ in range(25):
        stats = trainer(copy.deepcopy(batch))
        assert all(np.isfinite(value) for value in stats.values())
    assert "no return is known yet" in algorithm.advice


@pytest.mark.parametrize("method", ["cal_ql", "iql"])
@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (lambda shape: torch.zeros(shape), "all rewards of the robots are 0"),
        (lambda shape: torch.ones(shape), "longer episodes are always better"),
        (lambda shape: 1e5 * torch.rand(shape, generator=torch.Generator().manual_seed(0)), "returns are of the size of 1e5"),
    ],
)
def test_rewards_that_teach_nothing_are_noticed(method, rewards, said):
    algorithm = make(method, reward="environment", timeouts="end")
    trainer, batch = Trainer(algorithm), batch_of(algorithm)
    known = batch.steps_to_go_B >= 1
    batch.rewards_BH = rewards(batch.mask_BH.shape) * batch.mask_BH
    batch.return_B = torch.where(known, batch.rewards_BH.sum(1), torch.nan)
    for _ in range(25):
        stats = trainer(copy.deepcopy(batch))
        assert all(np.isfinite(value) for value in stats.values())
    assert said in algorithm.advice


@ALL
def test_a_batch_without_anything_to_imitate_or_to_bootstrap_from_leaves_the_weights_alone(method):
    algorithm = make(method, imitate="experts")
    trainer, batch = Trainer(algorithm), batch_of(algorithm)
    batch.source_B[:], batch.source_BH[:] = int(Source.POLICY), int(Source.POLICY)
    batch.mask_BH[:] = torch.arange(H) < 1  # each window stands at the last step of an episode that was cut
    batch.outcome_B[:], batch.steps_to_go_B[:] = int(Outcome.OPEN), -1
    batch.inside_at = {offset: torch.zeros_like(inside) for offset, inside in batch.inside_at.items()}
    before = state_of(trainer.engine.weights())
    stats = trainer(batch)
    assert stats["critic.weight"] == 0
    same = {name: torch.equal(value, before[name]) for name, value in state_of(trainer.engine.weights()).items()}
    assert all(unmoved for name, unmoved in same.items() if name.startswith(("/critic", "/value")))
    if method != "cal_ql":  # whose policy climbs what the critic knows already
        assert all(unmoved for name, unmoved in same.items() if name.startswith("/policy"))


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("cal_lq", {}, "did you mean 'cal_ql'"),
        ("iql", {"expectile": 1.0}, "expectile = 1.0"),
        ("iql", {"imitate": "nobody"}, "imitate = 'nobody'"),
        ("cal_ql", {"conservative": "cq"}, "one of cal_ql, cql, none"),
        ("cal_ql", {"prefix_stride": H + 1}, f"1 to {H}"),
        ("q_chunking", {"reward": "succes"}, "one of environment, success, steps"),
        ("q_chunking", {"aggregate": "max"}, "auto, mean or min"),
        ("q_chunking", {"demo_share": 1.5}, "0 to 1"),
    ],
)
def test_settings_out_of_their_range_are_named(method, config, said):
    with pytest.raises(ConfigError) as caught:
        make(method, **config)
    assert said in str(caught.value)


def test_critics_of_several_tasks_read_the_instruction():
    policy = build("mlp", {**SIZES, "instruction_dim": 0})
    with pytest.raises(ConfigError, match="2 tasks"):
        ChunkedRl(policy, ChunkedRlConfig(), DataFacts(("a", "b")))
    assert ChunkedRl(policy, ChunkedRlConfig(critic={"instruction_dim": 4}), DataFacts(("a", "b"))).critic.spec.conditions
    assert not ChunkedRl(policy, ChunkedRlConfig(), DataFacts(("a",))).critic.spec.conditions


def test_every_setting_has_a_range_or_is_checked_elsewhere():
    elsewhere = {"method", "reward", "discount", "reward_scale", "step_cost", "failure_cost", "timeouts", "seed"}
    free = {"critic", "value", "weight_decay", "fill_ends", "normalise_advantages"}
    algorithm = make("iql")
    for field in dataclasses.fields(ChunkedRlConfig):
        if field.name in elsewhere | free:
            continue
        bad = "?" if isinstance(field.default, str) else -1
        with pytest.raises(ConfigError, match=field.name):
            ChunkedRl(algorithm._policy, dataclasses.replace(algorithm.config, **{field.name: bad}))
