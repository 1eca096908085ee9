"""ZeRO 0 to 3 with two real processes against plain torch with one, on the same global batches."""

import copy
import dataclasses
import os

import pytest
import torch
from torch import nn

from algorithms.base import Part
from algorithms.ema import Ema
from fleet.errors import ConfigError, LearnerError
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.zero import part as zero_part
from tests import rank_processes
from tests.batches import take_rows
from tests.learner.engine_toys import ALONE, CPU, toy_batch
from tests.learner.zero_toys import (
    SometimesUsed,
    TwoParts,
    difference,
    every_other,
    rows_of,
    train,
    train_frozen,
    with_its_task,
)

SETTINGS = {
    "plain": {"size": 6},
    "cut": {"steps": 5, "micro_batch": 1, "max_grad_norm": 0.05, "activation_checkpointing": True},  # 7 rows for 2 ranks
}
TOLERANCE = 2e-6  # float32: of losses, norms, weights and averages after 15 updates of each part; measured 5e-7
STAGES = range(4)
pytestmark = pytest.mark.timeout(450)  # beyond what on_ranks waits: its message names the rank


def everything(ranks, folder, half):
    """All that is asked of one set of processes: they take seconds to start."""
    with open(f"{folder}/{ranks.rank}", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    found = {("used_on_one_rank", stage): used_on_one_rank(ranks, stage) for stage in STAGES}
    found["impossible"] = impossible(ranks)
    zero_part.WHOLE_BELOW = 0  # everything here is small: shard it nevertheless
    for stage in STAGES:
        for name, more in SETTINGS.items():
            found[name, stage] = train(ranks, name="deepspeed", zero_stage=stage, **more)
        found["loaded", stage] = loaded(ranks, stage, half)
        found["frozen", stage] = train_frozen(ranks, name="deepspeed", zero_stage=stage)
        for check in (refused, held, used_now_and_then, only_the_first_counts, counted, given_back):
            found[check.__name__, stage] = check(ranks, stage)
        if stage:
            found["offload", stage] = train(ranks, 4, name="deepspeed", zero_stage=stage, offload_optimizer=True, micro_batch=2)
            found["bfloat16", stage] = in_bfloat16(ranks, stage)
    return found


@pytest.fixture(scope="module")
def half():
    """What plain torch found in the first steps."""
    return train(steps=5)


@pytest.fixture(scope="module")
def zero(tmp_path_factory, half):
    """What each rank found, and what it said."""
    folder = tmp_path_factory.mktemp("said")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_processes, "TIMEOUT_S", 400.0)  # many small exchanges: each waits for a busy machine
        found = rank_processes.on_ranks(2, everything, str(folder), half)
    return [*found, [path.read_text() for path in sorted(folder.iterdir())]]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_that_share_make_the_updates_of_plain_torch(zero, name, stage):
    alone = train(**SETTINGS[name])
    assert difference(alone, zero[0][name, stage]) <= TOLERANCE
    assert difference(zero[0][name, stage], zero[1][name, stage]) == 0  # among themselves they agree to the bit
    if name == "cut":
        assert min(numbers["grad_norm"] for numbers in alone.numbers) > 0.05  # all are clipped, and reported as they were


def test_nothing_is_said(zero):
    assert zero[2] == ["", ""]


def make(ranks, stage, algorithm=None, **config):
    algorithm = algorithm or TwoParts()
    return algorithm, make_engine(EngineConfig(name="deepspeed", zero_stage=stage, **config), algorithm, CPU, ranks)


def snapshot(engine):
    return copy.deepcopy((engine.weights(), engine.state()))


def same(first, second):
    """Whether two structures hold the same, bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def loaded(ranks, stage, half):
    _, engine = make(ranks, stage)
    engine.load_weights(half.weights)
    engine.load_state(half.state)
    return {
        "same": same(engine.weights(), half.weights) and same(engine.state(), half.state),
        "goes_on": train(ranks, 5, start=half, name="deepspeed", zero_stage=stage),
        "half": train(ranks, 5, name="deepspeed", zero_stage=stage),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_goes_from_torch_to_ranks_that_share_and_back(zero, stage):
    found, whole = zero[0]["loaded", stage], train(steps=10)
    assert found["same"]
    for late in (found["goes_on"], train(steps=5, start=found["half"])):
        late.numbers = [*whole.numbers[:10], *late.numbers]
        assert difference(whole, late) <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_modules_are_neither_trained_nor_kept(zero, stage):
    alone = train_frozen()
    assert not [name for name in (*alone["kept"], *alone["acting"], *alone["names"]) if name.startswith("first.")]
    for rank in zero[:2]:
        found = rank["frozen", stage]
        assert found["unchanged"] and found["shared"] and sorted(found["names"]) == sorted(alone["names"])
        for what in ("kept", "acting"):
            assert list(found[what]) == list(alone[what])
            for name, value in alone[what].items():
                torch.testing.assert_close(found[what][name], value, rtol=0, atol=TOLERANCE)


def refused(ranks, stage):
    """Updates that must change nothing, and one that must change what it would have changed without them."""
    algorithm, engine = make(ranks, stage, micro_batch=2)
    _, other = make(ranks, stage, micro_batch=2)
    for one in (engine, other):
        one.update("policy", algorithm.loss if one is engine else _.loss, rows_of(ranks, 0))
    found, before, counters = {}, snapshot(engine), counters_of(engine)
    broken = rows_of(ranks, 1)
    if ranks.rank == 1:
        broken.obs["observation.state"][1] = float("nan")

    def endless(part, micro):
        out = algorithm.loss(part, micro)
        return dataclasses.replace(out, sum=out.sum + float("inf") if ranks.rank == 1 else out.sum)

    def weightless(part, micro):
        out = algorithm.loss(part, micro)
        return dataclasses.replace(out, sum=out.sum * 0, weight=out.weight * 0)

    for name, loss, batch in (("nan", algorithm.loss, broken), ("inf", endless, rows_of(ranks, 1))):
        with pytest.raises(LearnerError, match="part 'policy' has loss") as error:
            engine.update("policy", loss, batch)
        found[name] = str(error.value), same(snapshot(engine), before) and counters_of(engine) == counters
    numbers = engine.update("policy", weightless, rows_of(ranks, 1))
    found["weightless"] = numbers["weight"], same(snapshot(engine), before) and counters_of(engine) == counters
    after = [one.update("policy", a.loss, rows_of(ranks, 2)) for one, a in ((engine, algorithm), (other, _))]
    return found, after[0] == after[1] and same(engine.weights(), other.weights())


def counters_of(engine):
    zero = engine._parts["policy"].engine
    return zero.global_steps, zero.global_samples, zero.micro_steps, zero.skipped_steps


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(zero, stage):
    for rank in zero[:2]:
        found, goes_on = rank["refused", stage]
        assert found["nan"][1] and found["inf"][1] and found["weightless"] == (0.0, True) and goes_on
        assert "nan" in found["nan"][0] and "inf" in found["inf"][0]


def held(ranks, stage):
    """Whether the trained modules may be called inside of ``gathered`` and their parameters are whole there."""
    algorithm, engine = make(ranks, stage)
    alone = TwoParts()
    state_BS = rows_of(ranks, 0).obs["observation.state"]
    with engine.gathered(), torch.no_grad():
        first = algorithm.policy.mean(state_BS), algorithm.critic(algorithm.policy.mean(state_BS))
        whole = [p.detach().clone() for p in (*algorithm.policy.parameters(), *algorithm.critic.parameters())]
    with torch.no_grad():
        wanted = alone.policy.mean(state_BS), alone.critic(alone.policy.mean(state_BS))
    sharded = sum(p.numel() for p in algorithm.critic.parameters())
    return same(first, wanted) and same(
        whole, [p.detach() for p in (*alone.policy.parameters(), *alone.critic.parameters())]
    ), sharded


@pytest.mark.parametrize("stage", STAGES)
def test_gathered_parameters_are_whole_and_modules_can_be_called(zero, stage):
    found, numel = zero[0]["held", stage]
    assert found and (numel == 0) == (stage == 3)


def used_now_and_then(ranks, stage):
    more = [{"offload_optimizer": True, "micro_batch": 2}] if stage else []
    return [SometimesUsed(every_other).train(ranks, name="deepspeed", zero_stage=stage, **m) for m in ({}, *more)]


def used_on_one_rank(ranks, stage):
    try:
        return SometimesUsed(with_its_task).train(ranks, name="deepspeed", zero_stage=stage)
    except LearnerError as error:
        return str(error)


@pytest.mark.parametrize("stage", STAGES)
def test_a_layer_that_a_loss_does_not_use_keeps_its_weights(zero, stage):
    alone = SometimesUsed(every_other).train()
    for found in zero[0]["used_now_and_then", stage]:
        assert difference(alone, found) <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_a_layer_that_one_rank_uses_is_trained_or_refused(zero, stage):
    found = [rank["used_on_one_rank", stage] for rank in zero[:2]]
    if stage < 2:
        assert difference(SometimesUsed(with_its_task).train(), found[0]) <= TOLERANCE
    else:
        assert all("sometimes.weight, sometimes.bias" in said and "engine.zero_stage=1" in said for said in found)


def only_the_first_counts(ranks, stage):
    """Rank 1's rows are borrowed: they count nothing."""
    algorithm, engine = make(ranks, stage)
    batch = dataclasses.replace(rows_of(ranks, 0), shard_weight=2.0 if ranks.first else 0.0)
    return engine.update("policy", algorithm.loss, batch), engine.weights()


@pytest.mark.parametrize("stage", STAGES)
def test_a_shard_without_data_adds_nothing(zero, stage):
    algorithm = TwoParts()
    engine = make_engine(EngineConfig(), algorithm, CPU, ALONE)
    numbers = engine.update("policy", algorithm.loss, take_rows(toy_batch(0, 7, torch.float32), range(3)))
    found, weights = zero[0]["only_the_first_counts", stage]
    assert found["loss"] == pytest.approx(numbers["loss"]) and found["weight"] == pytest.approx(2 * numbers["weight"])
    for name, value in engine.weights()["policy"].items():
        torch.testing.assert_close(weights["policy"][name], value, rtol=0, atol=TOLERANCE)


def given_back(ranks, stage):
    """Modules trained by one engine, closed, and trained by another one with everything else."""
    algorithm, engine = make(ranks, stage, dtype="bfloat16" if stage == 3 else "float32")
    engine.update("policy", algorithm.loss, rows_of(ranks, 0))
    weights = engine.weights()
    engine.close()
    plain = {n: {k: v.detach().clone() for k, v in p.module.state_dict().items()} for n, p in algorithm.parts.items()}
    kinds = {type(p) for p in algorithm.policy.parameters()} | {type(m._parameters) for m in algorithm.policy.modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in algorithm.policy.modules())
    again = TwoParts()
    again.policy, again.critic, again.target = algorithm.policy, algorithm.critic, Ema(algorithm.critic, 0.9)
    again.parts = {name: Part(getattr(again, name), again._maker(name)) for name in again.parts}
    _, engine = make(ranks, 3 - stage, again)
    numbers = [engine.update(part, again.loss, again.prepare(rows_of(ranks, 1))) for part in again.parts]
    return same(plain, weights), kinds == {nn.Parameter, dict}, hooks, numbers


@pytest.mark.parametrize("stage", STAGES)
def test_closed_engines_leave_plain_modules(zero, stage):
    same_weights, plain, hooks, numbers = zero[0]["given_back", stage]
    assert same_weights and plain and hooks == 0
    torch_numbers = zero[0]["given_back", 0][3]
    if stage != 3:
        assert [n["loss"] for n in numbers] == pytest.approx([n["loss"] for n in torch_numbers], rel=1e-5)


def in_bfloat16(ranks, stage):
    """The curve in bfloat16, and whether float32 weights come back as the algorithm made them and as they were put in."""
    curve = train(ranks, 5, name="deepspeed", zero_stage=stage, dtype="bfloat16", micro_batch=2, activation_checkpointing=True)
    algorithm, engine = make(ranks, stage, dtype="bfloat16")
    kept = same(engine.weights(), {name: dict(part.module.state_dict()) for name, part in TwoParts().parts.items()})
    engine.load_weights(curve.weights)
    engine.load_state(curve.state)
    kept = kept and same(engine.weights(), curve.weights) and same(engine.state(), curve.state)
    dtypes = {p.dtype for p in algorithm.policy.parameters() if p.requires_grad}, {b.dtype for b in algorithm.policy.buffers()}
    return curve, kept, dtypes


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bfloat16_keeps_float32_weights_beside(zero, stage):
    alone = train(steps=5, dtype="bfloat16", micro_batch=2)
    curve, kept, dtypes = zero[0]["bfloat16", stage]
    assert kept and dtypes == ({torch.bfloat16}, {torch.float32})
    assert {v.dtype for v in curve.weights["policy"].values()} == {torch.float32}
    assert difference(alone, curve) <= 0.03 and difference(train(steps=5), curve) <= 0.1


@pytest.mark.parametrize("stage", STAGES[1:])
def test_optimizer_state_on_the_cpu_changes_nothing(zero, stage):
    assert difference(train(steps=4, micro_batch=2), zero[0]["offload", stage]) <= TOLERANCE


def impossible(ranks):
    """What is said to settings that a part cannot be trained with, and the stages of a large and a small part."""
    told = []
    shared, wide = TwoParts(), TwoParts()
    shared.critic[0].weight = nn.Parameter(shared.policy.head.weight.detach().clone())
    shared.policy.head.weight = shared.critic[0].weight
    wide.policy.double()
    for algorithm in (TwoParts("Adagrad"), wide, shared):
        with pytest.raises(ConfigError) as error:
            make(ranks, 2, algorithm)
        told.append(str(error.value))
        make(ranks, 0, algorithm)
    _, engine = make(ranks, 3, shard_above=100)
    return told, {name: part.stage for name, part in engine._parts.items()}


def test_parts_that_cannot_be_sharded_are_refused(zero):
    told, stages = zero[0]["impossible"]
    assert all("engine.zero_stage" in said and "rule:" in said for said in told)
    assert "Adagrad" in told[0] and "float64" in told[1] and "both train" in told[2]
    assert stages == {"policy": 3, "critic": 0}


def counted(ranks, stage):
    algorithm, engine = make(ranks, stage)
    algorithm.counts = True
    for step in range(2):
        engine.update("policy", algorithm.loss, rows_of(ranks, step))
    return float(algorithm.policy.count)


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_that_a_loss_changes_are_those_of_the_first_rank(zero, stage):
    assert [rank["counted", stage] for rank in zero[:2]] == [6.0, 6.0]  # 3 of 7 rows each time; rank 1 has 4
