import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.base import noise_of
from fleet.errors import LearnerError
from learner.engine import split_micro
from learner.engine_torch import TorchEngine
from learner.main import EngineConfig
from learner.ranks import RankPlace, Ranks
from tests.batches import make_batch, take_rows
from tests.learner.engine_toys import ActorCritic, toy_batch, train_toy_engine
from tests.learner_toys import ACTION_DIM, STATE_DIM, LinearPolicy, Pair, PairConfig

CPU = torch.device("cpu")


def pair_batch(size=10, seed=0):
    rng = np.random.default_rng(seed)
    obs = {"observation.state": torch.as_tensor(rng.normal(size=(size, STATE_DIM)), dtype=torch.float32)}
    return make_batch(obs, torch.as_tensor(rng.normal(size=(size, 4, ACTION_DIM)), dtype=torch.float32))


def make_pair(seed=0, **config):
    torch.manual_seed(seed)
    policy = LinearPolicy(LinearPolicy.Config()).eval()  # no dropout: results are compared
    return Pair(policy, PairConfig(**config))


def copies(algorithm):
    return {name: copy.deepcopy(part.module.state_dict()) for name, part in algorithm.parts.items()}


def engine_of(algorithm, **config):
    return TorchEngine(algorithm, EngineConfig(**config), CPU, Ranks(RankPlace()))


def equal(first, second):
    return all(torch.equal(first[n], second[n]) for n in first)


def test_one_part_changes_at_a_time():
    algorithm = make_pair()
    engine = engine_of(algorithm)
    before = copies(algorithm)
    engine.update("policy", algorithm.loss, pair_batch())
    after = copies(algorithm)
    assert equal(before["critic"], after["critic"]) and not equal(before["policy"], after["policy"])
    # The policy's loss goes through the critic: nothing of it may be left there when the critic's turn comes.
    assert all(p.grad is None for p in algorithm.critic.parameters())
    engine.update("critic", algorithm.loss, pair_batch())
    assert equal(after["policy"], copies(algorithm)["policy"]) and not equal(after["critic"], copies(algorithm)["critic"])
    assert all(p.requires_grad for p in algorithm.critic.parameters())
    assert not any(p.requires_grad for p in algorithm.frozen["reference"].parameters())


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_micro_batches_give_the_update_of_the_whole(size):
    whole, cut = make_pair(), make_pair()
    engines = engine_of(whole), engine_of(cut, micro_batch=size)
    for part in ("policy", "critic"):
        numbers = engines[0].update(part, whole.loss, pair_batch()), engines[1].update(part, cut.loss, pair_batch())
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
    for name, module in whole.parts.items():
        for first, second in zip(module.module.parameters(), cut.parts[name].module.parameters(), strict=True):
            torch.testing.assert_close(first, second)


def test_micro_batches_cover_every_sample_once():
    batch = pair_batch(10)
    parts = list(split_micro(batch, 4))
    assert [rows for _, rows in parts] == [2, 3, 2, 3]
    assert torch.equal(torch.cat([micro.obs["observation.state"] for micro, _ in parts]), batch.obs["observation.state"])
    # A rank with fewer rows than others makes as many passes, some of them of no row; never the last one.
    few = list(split_micro(pair_batch(2), 3))
    assert [rows for _, rows in few] == [0, 1, 1] and all(len(micro.actions_BHA) == 1 for micro, _ in few)


def test_noise_of_a_row_is_the_same_however_a_batch_is_split():
    class Noisy:
        def noise(self, batch_size, generator):
            return {"chain": [torch.randn(batch_size, 2, generator=generator)], "steps": 4}

    batch = pair_batch(7)
    whole = noise_of(Noisy(), batch, 7, seed=1, step=3)
    for rows in ([0, 1, 2], [6, 4]):  # of two ranks; the second one in an order of its own
        for micro, _ in split_micro(take_rows(batch, rows), 2):
            cut = noise_of(Noisy(), micro, 7, seed=1, step=3)
            assert torch.equal(cut["chain"][0], whole["chain"][0][micro.index_B]) and cut["steps"] == 4
    assert not torch.equal(noise_of(Noisy(), batch, 7, seed=1, step=4)["chain"][0], whole["chain"][0])


def test_the_time_of_an_update_has_three_names():
    names = []
    algorithm = make_pair()
    engine = engine_of(algorithm, micro_batch=5)
    engine.update("policy", algorithm.loss, pair_batch(10), lambda name: names.append(name) or nullcontext())
    assert names == ["forward", "backward", "forward", "backward", "optimizer"]


def test_the_update_is_that_of_plain_torch():
    algorithm, plain = make_pair(), make_pair()
    engine = engine_of(algorithm, max_grad_norm=0.05)
    optimizer = torch.optim.SGD(plain.policy.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        numbers = engine.update("policy", algorithm.loss, pair_batch(seed=seed))
        optimizer.zero_grad()
        out = plain.loss("policy", pair_batch(seed=seed))
        (out.sum / out.weight).backward()
        norm = nn.utils.clip_grad_norm_(plain.policy.parameters(), 0.05)
        optimizer.step()
        assert numbers["grad_norm"] == pytest.approx(float(norm)) and float(norm) > 0.05
        assert numbers["loss"] == pytest.approx(float((out.sum / out.weight).detach()))
    for first, second in zip(algorithm.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_an_actor_trained_through_a_critic_is_that_of_plain_torch():
    """Two parts in turns, weights that differ, a parameter without a loss: written out again in torch alone."""
    plain, losses = ActorCritic(), []
    optimizers = {name: part.make_optimizer(part.module.parameters()) for name, part in plain.parts.items()}
    for step in range(20):
        plain.step = step
        for name, optimizer in optimizers.items():
            out = plain.loss(name, toy_batch(step))
            parameters = list(plain.parts[name].module.parameters())
            gradients = torch.autograd.grad(out.sum / out.weight, parameters, allow_unused=True)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            losses.append(float((out.sum / out.weight).detach()))
    trained = train_toy_engine()
    assert [n["loss"] for n in trained.numbers] == pytest.approx(losses, rel=1e-12, abs=1e-12)
    for name, part in plain.parts.items():
        for key, value in part.module.state_dict().items():
            torch.testing.assert_close(trained.weights[name][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    algorithm = make_pair()
    engine = engine_of(algorithm)
    engine.update("policy", algorithm.loss, pair_batch())
    before, optimizer = copies(algorithm), copy.deepcopy(engine.state())
    batch = pair_batch()
    batch.obs["observation.state"][3, 0] = bad
    with pytest.raises(LearnerError, match="policy"):
        engine.update("policy", algorithm.loss, batch)
    assert equal(before["policy"], copies(algorithm)["policy"])
    after = engine.state()["policy"]["state"]
    for name, entries in optimizer["policy"]["state"].items():
        assert all(torch.equal(value, after[name][key]) for key, value in entries.items() if isinstance(value, torch.Tensor))
    engine.update("policy", algorithm.loss, pair_batch())  # and it can go on


def test_a_batch_without_weight_is_passed_over():
    algorithm = make_pair()
    engine = engine_of(algorithm)
    before = copies(algorithm)

    def nothing(part, micro):
        out = algorithm.loss(part, micro)
        out.sum, out.weight = out.sum * 0, torch.zeros(())
        return out

    assert engine.update("policy", nothing, pair_batch())["weight"] == 0
    assert equal(before["policy"], copies(algorithm)["policy"])


def test_optimizer_state_is_kept_by_name():
    first, second = make_pair(), make_pair()
    engines = engine_of(first), engine_of(second)
    engines[0].update("policy", first.loss, pair_batch())
    state = engines[0].state()
    assert set(state["policy"]["state"]) == {"linear.weight", "linear.bias"}
    engines[1].load_state(state)
    for name, part in second.parts.items():
        part.module.load_state_dict(first.parts[name].module.state_dict())
    for seed in (1, 2):
        engines[0].update("policy", first.loss, pair_batch(seed=seed))
        engines[1].update("policy", second.loss, pair_batch(seed=seed))
    assert equal(copies(first)["policy"], copies(second)["policy"])


def test_optimizer_state_of_other_modules_is_refused():
    algorithm = make_pair()
    engine = engine_of(algorithm)
    state = engine.state()
    with pytest.raises(LearnerError, match="optimizers of"):
        engine.load_state({"policy": state["policy"]})
    with pytest.raises(LearnerError, match="other parameters"):
        engine.load_state({"policy": state["critic"], "critic": state["policy"]})
