import copy

import numpy as np
import pytest
import torch

from algorithms.bc import Bc, BcConfig
from algorithms.ema import Ema
from algorithms.hg_dagger import HgDagger, HgDaggerConfig
from algorithms.policies.base import INSTRUCTION, Chunk
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import STATE
from tests.batches import make_batch

B, H, A = 16, 4, 2


def _policy():
    torch.manual_seed(0)
    return build("mlp", {"reads": {STATE: [6]}, "action_dim": A, "horizon": H, "instruction_dim": 3, "width": 16})


def _batch(seed=0, batch=B):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, H, generator=g) < 0.7
    mask[:, 0] = True
    source = torch.where(torch.arange(batch) % 2 == 0, int(Source.DEMO), int(Source.OPERATOR))
    obs = {STATE: torch.randn(batch, 6, generator=g), INSTRUCTION: torch.randn(batch, 3, generator=g)}
    return make_batch(obs, torch.randn(batch, H, A, generator=g), mask_BH=mask, source_B=source)


def _gradient(algorithm, policy, batch):
    policy.zero_grad()
    out = algorithm.loss("policy", algorithm.prepare(batch))
    (out.sum / out.weight).backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def _train(algorithm, num_steps):
    optimizer = algorithm.parts["policy"].make_optimizer(algorithm.parts["policy"].module.parameters())
    rates = []
    for step in range(num_steps):
        optimizer.zero_grad()
        out = algorithm.loss("policy", _batch(step))
        (out.sum / out.weight).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        algorithm.after_step(step, {})
    return rates


@pytest.mark.parametrize(
    "make", [lambda p: Bc(p, BcConfig(fill_ends=False)), lambda p: HgDagger(p, HgDaggerConfig(fill_ends=False))]
)
def test_loss_is_the_mean_over_valid_actions_and_gradients_do_not_see_the_others(make):
    policy, batch = _policy(), _batch()
    algorithm = make(policy)
    out = algorithm.loss("policy", batch)
    error = (policy.act(batch.obs).actions_BHA - batch.actions_BHA).abs().mean(-1)
    torch.testing.assert_close(out.sum / out.weight, error[batch.mask_BH].mean())
    assert out.weight == batch.mask_BH.sum() and out.per_sample_B.shape == (B,)
    garbage = copy.deepcopy(batch)
    garbage.actions_BHA[~garbage.mask_BH] = float("nan")
    for clean, dirty in zip(_gradient(algorithm, policy, batch), _gradient(algorithm, policy, garbage), strict=True):
        torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("make", [lambda p: Bc(p, BcConfig()), lambda p: HgDagger(p, HgDaggerConfig())])
def test_windows_that_are_cut_are_filled_with_their_last_valid_action(make):
    policy, batch = _policy(), _batch()
    batch.mask_BH = torch.arange(H) < torch.arange(B)[:, None] % (H + 1)  # 0 to H valid actions
    batch.actions_BHA[~batch.mask_BH] = float("nan")
    filled = make(policy).prepare(batch)
    for b in range(B):
        num_valid = b % (H + 1)
        assert torch.equal(filled.actions_BHA[b, :num_valid], batch.actions_BHA[b, :num_valid])
        assert filled.mask_BH[b].all() == (num_valid > 0) == filled.mask_BH[b].any()
        if num_valid:
            assert torch.equal(filled.actions_BHA[b, num_valid:], batch.actions_BHA[b, num_valid - 1].expand(H - num_valid, A))
    assert batch.actions_BHA.isnan().any()  # the batch itself is left alone
    assert all(g.isfinite().all() for g in _gradient(make(policy), policy, batch))


def test_micro_batches_add_up_to_the_whole():
    policy = _policy()
    algorithm, batch = HgDagger(policy, HgDaggerConfig()), _batch()
    whole = algorithm.loss("policy", batch)
    parts = []
    for half in (slice(0, 5), slice(5, B)):
        obs = {name: value[half] for name, value in batch.obs.items()}
        micro = make_batch(obs, batch.actions_BHA[half], mask_BH=batch.mask_BH[half], source_B=batch.source_B[half])
        parts.append(algorithm.loss("policy", micro))
    torch.testing.assert_close(sum(p.sum for p in parts), whole.sum)
    torch.testing.assert_close(sum(p.weight for p in parts), whole.weight)


def test_hg_dagger_on_operator_steps_alone_is_plain_cloning():
    policy, batch = _policy(), _batch()
    batch.source_B[:] = int(Source.OPERATOR)
    cloned = _gradient(Bc(policy, BcConfig()), policy, batch)
    for a, b in zip(_gradient(HgDagger(policy, HgDaggerConfig()), policy, batch), cloned, strict=True):
        assert torch.equal(a, b)


def test_needs_and_stats_by_source():
    policy = _policy()
    algorithm = HgDagger(policy, HgDaggerConfig(operator_share=0.25))
    assert algorithm.needs.shares == {(Source.DEMO,): 0.75, (Source.OPERATOR,): 0.25}
    assert algorithm.needs.horizon == H and algorithm.needs.observations == (STATE,)
    assert Bc(policy, BcConfig(batch_size=8)).needs.shares == {(Source.DEMO,): 1.0}
    batch = _batch()
    stats = {name: top / weight for name, (top, weight) in algorithm.loss("policy", batch).stats.items()}
    demo = batch.source_B == Source.DEMO
    loss_B = policy.imitation_loss(batch.obs, Chunk(batch.actions_BHA), batch.mask_BH.float())
    valid = batch.mask_BH.sum(-1)
    torch.testing.assert_close(stats["loss_demo"], ((loss_B * valid)[demo].sum() / valid[demo].sum()))
    assert stats["loss_operator"] != stats["loss_demo"]


def test_learning_rate_falls_after_the_start_and_on_resume():
    policy = _policy()
    config = HgDaggerConfig(start_steps=3, start_learning_rate=1e-2, learning_rate=1e-4)
    algorithm = HgDagger(policy, config)
    assert _train(algorithm, 5) == [1e-2] * 3 + [1e-4] * 2
    resumed = HgDagger(copy.deepcopy(policy), config)
    optimizer = resumed.parts["policy"].make_optimizer(resumed.parts["policy"].module.parameters())
    resumed.load_state_dict(algorithm.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-4
    for a, b in zip(resumed.acting().parameters(), algorithm.acting().parameters(), strict=True):
        assert torch.equal(a, b)


def test_acting_is_the_moving_average_with_the_newest_statistics():
    policy = _policy()
    algorithm = HgDagger(policy, HgDaggerConfig(start_learning_rate=1e-2))
    policy.set_statistics({STATE: Statistics.of(np.full((2, 6), 2.0))})
    _train(algorithm, 30)
    acting = algorithm.acting()
    assert not any(p.requires_grad for p in acting.parameters())
    assert (acting.head.weight - policy.head.weight).abs().max() > 1e-4
    assert torch.equal(acting.normaliser.mean_S, torch.full((6,), 2.0))
    assert acting.state_dict().keys() == policy.state_dict().keys()
    newest = Bc(policy, BcConfig(ema_decay=0.0))
    _train(newest, 2)
    assert torch.equal(newest.acting().head.weight, policy.head.weight)


def test_moving_average_by_hand():
    source = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(source.weight, 0.0)
    ema = Ema(source, decay=0.5)
    torch.nn.init.constant_(source.weight, 1.0)
    ema.update(0)
    assert ema.module.weight.item() == pytest.approx(10 / 11)  # decay lowered to 1/11 at first
    ema.update(100)
    assert ema.module.weight.item() == pytest.approx(0.5 * 10 / 11 + 0.5)


@pytest.mark.parametrize("config", [{"operator_share": 1.0}, {"ema_decay": 1.0}, {"batch_size": 0}])
def test_refusals(config):
    with pytest.raises(ConfigError, match=str(next(iter(config.values())))):
        HgDagger(_policy(), HgDaggerConfig(**config))
