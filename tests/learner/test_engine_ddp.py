"""Two and three real processes against one, on the same global batches."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.base import LossOutput, Part
from fleet.errors import LearnerError
from learner.engines import make_engine
from learner.main import EngineConfig
from tests.batches import take_rows
from tests.learner.engine_toys import ALONE, CPU, ActorCritic, largest_difference, toy_batch, train_toy_engine
from tests.learner.zero_toys import train_frozen
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.timeout(150)  # beyond what on_ranks waits: its message names the rank
# float64: only the order of sums differs. float32: 1e-7 a number, times what 20 updates make of it.
SETTINGS = {
    "plain": ({"size": 6}, 1e-12),
    "uneven": ({}, 1e-12),
    "micro": ({"micro_batch": 1}, 1e-12),
    "clipped": ({"max_grad_norm": 0.05, "micro_batch": 2}, 1e-12),
    "checkpointed": ({"activation_checkpointing": True, "micro_batch": 3}, 1e-12),
    "float32": ({"tensors": torch.float32}, 2e-5),
}


def everything(ranks, alone):
    """All that is asked of one set of processes: they take seconds to start."""
    found = {name: train_toy_engine(ranks, **settings) for name, (settings, _) in SETTINGS.items()}
    found["from_alone"] = train_toy_engine(ranks, 10, start=alone)
    found["half"] = train_toy_engine(ranks, 10)
    found["counted"] = train_toy_engine(ranks, 3, counts=True)
    found["frozen"] = train_frozen(ranks)
    for check in (
        nan_on_one_rank,
        nothing_has_weight,
        weights_of_shards,
        no_gradient_on_one_rank,
        stats_of_one_rank,
        shared_trunk,
    ):
        found[check.__name__] = check(ranks)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def ddp(request):
    """What each rank found, and what it went on from."""
    alone = train_toy_engine(steps=10)
    return on_ranks(request.param, everything, alone)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_together_make_the_updates_of_one(ddp, name):
    settings, tolerance = SETTINGS[name]
    alone = train_toy_engine(**settings)
    for rank in ddp:
        assert largest_difference(alone, rank[name]) <= tolerance
        assert largest_difference(ddp[0][name], rank[name]) == 0  # among themselves they agree to the bit
    for part, losses in alone.per_sample.items():
        torch.testing.assert_close(torch.cat([rank[name].per_sample[part] for rank in ddp]), losses)
    assert float(alone.weights["policy"]["rare"][0]) != 1 and torch.equal(alone.weights["policy"]["unused"], torch.ones(2))


def test_clipping_is_that_of_the_whole_gradient(ddp):
    norms = [n["grad_norm"] for n in ddp[0]["clipped"].numbers]
    assert min(norms) > 0.05  # all are clipped, and reported as they were before


def test_state_goes_from_one_rank_to_several_and_back(ddp):
    whole = train_toy_engine(steps=20)
    back = train_toy_engine(steps=10, start=ddp[0]["half"])
    for late in (back, ddp[0]["from_alone"]):
        late.numbers = [*whole.numbers[:20], *late.numbers]
        assert largest_difference(whole, late) < 1e-12


def test_buffers_that_a_loss_changes_stay_alike(ddp):
    counts = [float(rank["counted"].weights["policy"]["count"]) for rank in ddp]
    assert len(set(counts)) == 1 and counts[0] > 0


def one_engine(ranks, **config):
    algorithm = ActorCritic()
    return algorithm, make_engine(EngineConfig(**config), algorithm, CPU, ranks)


def copies(algorithm, engine):
    named = {part: {n: v.clone() for n, v in p.module.state_dict().items()} for part, p in algorithm.parts.items()}
    moments = {n: {k: v.clone() for k, v in s.items()} for n, s in engine.state()["policy"]["state"].items()}
    return {**{f"{part}.{n}": v for part, m in named.items() for n, v in m.items()}} | {
        f"{n}.{k}": v for n, s in moments.items() for k, v in s.items()
    }


def test_frozen_modules_are_neither_trained_nor_kept(ddp):
    alone = train_frozen()
    for found in (rank["frozen"] for rank in ddp):
        assert found["unchanged"] and found["shared"] and found["names"] == alone["names"]
        for what in ("kept", "acting"):
            assert list(found[what]) == list(alone[what]) and not any(name.startswith("first.") for name in found[what])
            for name, value in alone[what].items():
                torch.testing.assert_close(found[what][name], value, rtol=0, atol=2e-6)


def own_rows(ranks, step):
    return take_rows(toy_batch(step), ranks.place.split().rows(7))


def nan_on_one_rank(ranks):
    algorithm, engine = one_engine(ranks)
    engine.update("policy", algorithm.loss, own_rows(ranks, 0))
    before, batch = copies(algorithm, engine), own_rows(ranks, 1)
    if ranks.rank == 1:
        batch.obs["observation.state"][0, 0] = np.nan
    with pytest.raises(LearnerError, match="part 'policy' has loss nan") as error:
        engine.update("policy", algorithm.loss, batch)
    after = copies(algorithm, engine)
    engine.update("policy", algorithm.loss, own_rows(ranks, 1))  # and they can go on
    return str(error.value), list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


def test_nan_on_one_rank_is_refused_on_all_and_changes_nothing(ddp):
    assert {rank["nan_on_one_rank"] for rank in ddp} == {(ddp[0]["nan_on_one_rank"][0], True)}


def nothing_has_weight(ranks):
    algorithm, engine = one_engine(ranks)
    before, batch = copies(algorithm, engine), own_rows(ranks, 0)
    batch.weight_B[:] = 0
    numbers, after = engine.update("policy", algorithm.loss, batch), copies(algorithm, engine)
    return numbers["weight"], numbers["loss"], all(torch.equal(before[n], after[n]) for n in before)


def test_a_batch_without_weight_changes_nothing(ddp):
    assert all(rank["nothing_has_weight"] == (0.0, 0.0, True) for rank in ddp)


def weights_of_shards(ranks):
    """The last rank stands for a shard that counts a quarter, the one before for one without data of its own."""
    algorithm, engine = one_engine(ranks)
    batch = own_rows(ranks, 0)
    batch.shard_weight = {ranks.size - 1: 0.25, ranks.size - 2: 0.0 if ranks.size > 2 else 1.5}.get(ranks.rank, 1.0)
    numbers = engine.update("critic", algorithm.loss, batch)
    return numbers, batch.shard_weight, algorithm.critic.weight.detach().clone()


def test_shards_count_as_much_as_they_are_told(ddp):
    algorithm, engine = one_engine(ALONE)
    batch, size = toy_batch(0), len(ddp)
    factor_B = torch.cat(
        [
            torch.full(((r + 1) * 7 // size - r * 7 // size,), rank["weights_of_shards"][1], dtype=torch.float64)
            for r, rank in enumerate(ddp)
        ]
    )
    weight_B = batch.weight_B * factor_B
    loss_B = algorithm.loss("critic", batch).per_sample_B.detach()
    numbers = ddp[0]["weights_of_shards"][0]
    assert numbers["loss"] == pytest.approx(float((loss_B * weight_B).sum() / weight_B.sum()), rel=1e-12)
    assert numbers["weight"] == pytest.approx(float(weight_B.sum()), rel=1e-12)
    batch.weight_B = weight_B
    engine.update("critic", algorithm.loss, batch)
    for rank in ddp:
        torch.testing.assert_close(rank["weights_of_shards"][2], algorithm.critic.weight.detach(), rtol=1e-12, atol=1e-12)


def no_gradient_on_one_rank(ranks):
    """A rank whose rows have no loss still takes part."""
    algorithm, engine = one_engine(ranks)

    def loss(part, micro):
        out = algorithm.loss(part, micro)
        if ranks.rank == 0:
            out.sum, out.weight = torch.zeros((), dtype=torch.float64), torch.zeros(())
        return out

    return engine.update("policy", loss, own_rows(ranks, 0))["grad_norm"]


def test_a_rank_without_a_loss_does_not_stop_the_others(ddp):
    assert ddp[0]["no_gradient_on_one_rank"] > 0
    assert len({rank["no_gradient_on_one_rank"] for rank in ddp}) == 1


def stats_of_one_rank(ranks):
    algorithm, engine = one_engine(ranks)

    def loss(part, micro):
        out = algorithm.loss(part, micro)
        out.stats = {f"rank{ranks.rank}": torch.tensor(float(ranks.rank))}
        return out

    batch = own_rows(ranks, 0)
    first = engine.update("critic", loss, batch)
    with pytest.raises(LearnerError, match="the first update had"):
        engine.update(
            "critic", lambda part, micro: dataclasses.replace(loss(part, micro), stats={"new": torch.ones(())}), batch
        )
    return first


def test_stats_may_come_from_some_ranks_only(ddp):
    numbers = ddp[0]["stats_of_one_rank"]
    assert numbers["rank0"] == 0 and numbers["rank1"] == 1
    assert all(rank["stats_of_one_rank"] == numbers for rank in ddp)


def shared_trunk(ranks):
    """Both parts train the same layer: each with its own optimizer, in its own turn."""
    algorithm = ActorCritic()
    first, head = algorithm.policy.first, nn.Linear(8, 1).double()
    value = nn.Sequential(first, head)
    algorithm.parts = {"policy": algorithm.parts["policy"], "value": Part(value, algorithm.parts["policy"].make_optimizer)}

    def loss(part, micro):
        if part == "policy":
            return algorithm.loss(part, micro)
        loss_B = (value(micro.obs["observation.state"])[:, 0] - micro.rewards_BH[:, 0]) ** 2
        return LossOutput(loss_B.sum(), torch.tensor(float(len(loss_B))), loss_B, {})

    engine = make_engine(EngineConfig(), algorithm, CPU, ranks)
    for step in range(6):
        engine.update(("policy", "value")[step % 2], loss, take_rows(toy_batch(step), ranks.place.split().rows(7)))
    return first.weight.detach().clone()


def test_parts_may_share_a_layer(ddp):
    alone = shared_trunk(ALONE)
    for rank in ddp:
        torch.testing.assert_close(rank["shared_trunk"], alone, rtol=1e-12, atol=1e-12)
