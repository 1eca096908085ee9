import copy

import numpy as np
import pytest
import torch

from algorithms.base import DataFacts
from algorithms.bc import Bc, BcConfig
from algorithms.ema import Ema
from algorithms.hg_dagger import HgDagger, HgDaggerConfig
from algorithms.policies.base import INSTRUCTION, Chunk
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.batch import Adaptive, Filter, Outcome, Within
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import STATE
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.ranks import RankPlace, Ranks
from tests.batches import make_batch, take_rows

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


OWN = {"autonomous": "successful"}


@pytest.mark.parametrize(
    "config",
    [
        {"operator_share": 1.0},
        {"operator_share": 0.8, **OWN},
        {"ema_decay": 1.0},
        {"batch_size": 0},
        {"max_staleness": -1},
        {"mixture": "even"},
        {"adaptive_alpha": 0.0},
        {"autonomous": "all"},
        {"autonomous_share": 0.0},
        {"pre_intervention_steps": -1},
        {"weighting": "other"},
        {"weighting": "iwr"},  # of the policy's own steps, which it does not get
        {"weighting": "sirius", "mixture": "adaptive", **OWN},
        {"weighting": "sirius", "operator_share": 0.3, "autonomous_share": 0.2, **OWN},
    ],
)
def test_refusals(config):
    with pytest.raises(ConfigError, match=str(next(iter(config.values())))):
        HgDagger(_policy(), HgDaggerConfig(**config))


@pytest.mark.parametrize(
    "config",
    [
        {"sources": []},
        {"sources": ["demo", "demo"]},
        {"sources": ["demonstrations"]},
        {"sources": ["demo", "operator"], "shares": [1.0]},
        {"sources": ["demo", "operator"], "shares": [0.5, 0.6]},
        {"sources": ["demo", "operator"], "shares": [0.0, 1.0]},
    ],
)
def test_bc_refuses_sources_that_it_cannot_draw(config):
    with pytest.raises(ConfigError, match="sources"):
        Bc(_policy(), BcConfig(**config))


def test_bc_clones_whom_it_is_told_to():
    def shares(**config):
        return Bc(_policy(), BcConfig(**config)).needs.shares

    everybody = ["demo", "operator", "policy"]
    assert shares(sources=["operator"]) == {(Source.OPERATOR,): 1.0}
    assert shares(sources=everybody) == {(Source.DEMO, Source.OPERATOR, Source.POLICY): 1.0}
    assert shares(sources=["policy", "demo"], shares=[0.75, 0.25]) == {(Source.POLICY,): 0.75, (Source.DEMO,): 0.25}


def test_what_hg_dagger_asks_for():
    def needs(**config):
        return HgDagger(_policy(), HgDaggerConfig(**config)).needs

    plain, own = needs(), needs(**OWN, operator_share=0.4, pre_intervention_steps=6)
    assert plain.filter == Filter() and plain.takeover_within == 0 and plain.within is own.within is Within.SOURCE
    assert own.shares == {(Source.DEMO,): pytest.approx(0.35), (Source.OPERATOR,): 0.4, (Source.POLICY,): 0.25}
    assert own.filter == Filter(outcomes=(Outcome.SUCCESS,), outcomes_of=(Source.POLICY,), before_takeover=6)
    assert own.takeover_within == 6 + H - 1, "up to the last label of a window"
    weighted = needs(**OWN, weighting="sirius", max_staleness=3).filter
    assert weighted.before_takeover == 0 and weighted.max_version_age == 3
    assert needs(mixture="adaptive", adaptive_alpha=2.0).adaptive == Adaptive((Source.OPERATOR,), (Source.DEMO,), 2.0)
    assert needs(mixture="adaptive", **OWN).adaptive.online == (Source.OPERATOR, Source.POLICY)


def _fleet_batch(seed=0, takeover_in_B=None):
    """Rows of demonstrations, operators, the policy far from a takeover, and shortly before one; two tasks."""
    batch = _batch(seed)
    batch.source_B = torch.tensor([Source.DEMO, Source.OPERATOR, Source.POLICY, Source.POLICY] * (B // 4), dtype=torch.uint8)
    batch.takeover_in_B = torch.tensor([-1, 0, 9, 3] * (B // 4)) if takeover_in_B is None else takeover_in_B
    batch.task_B = torch.arange(B) // 4 % 2
    return batch


def _read(out):
    """Stats as the engine reports them; no row of a kind: 0."""
    return {name: float(top.detach()) / max(float(weight), 1e-9) for name, (top, weight) in out.stats.items()}


def _make(weighting="none", policy=None, **config):
    config = HgDaggerConfig(batch_size=B, pre_intervention_steps=7, weighting=weighting, **OWN, **config)
    return HgDagger(policy or _policy(), config, DataFacts(tasks=("reach", "push")))


def test_policy_windows_end_before_a_takeover_and_are_not_filled_there():
    batch = _fleet_batch()
    batch.mask_BH = torch.ones(B, H, dtype=torch.bool)
    batch.mask_BH[1::4, 2:] = False  # the operator hands back
    batch.mask_BH[2::8, 1:] = False  # an episode's end, and no takeover
    batch.takeover_in_B[2::8] = -1
    ready = _make().prepare(batch)
    assert ready.mask_BH[0:2].all() and torch.equal(ready.actions_BHA[1, 3], batch.actions_BHA[1, 1])
    assert ready.mask_BH[2].all() and torch.equal(ready.actions_BHA[2, 3], batch.actions_BHA[2, 0])
    assert ready.mask_BH[6].tolist() == [True, True, False, False], "from 7 steps before the takeover on"
    assert ready.mask_BH[3].tolist() == [True, True, True, False], "up to the takeover"
    assert ready.weight_B.tolist() == [1.0, 1.0, 1.0, 0.0] * (B // 4)


def test_steps_before_a_takeover_have_no_gradient_without_weighting():
    policy, batch = _policy(), _fleet_batch()
    algorithm = _make(policy=policy)
    clean, other = copy.deepcopy(batch), copy.deepcopy(batch)
    other.actions_BHA[3::4] += 5.0
    for a, b in zip(_gradient(algorithm, policy, clean), _gradient(algorithm, policy, other), strict=True):
        assert torch.equal(a, b)
    other.actions_BHA[2::4, 0] += 5.0
    changed = zip(_gradient(algorithm, policy, clean), _gradient(algorithm, policy, other), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)


@pytest.mark.parametrize("weighting", ["sirius", "iwr"])
def test_the_weighted_loss_by_hand_and_what_counts(weighting):
    algorithm, batch = _make(weighting), _fleet_batch()
    stats = _read(algorithm.loss("policy", algorithm.prepare(batch)))
    num_valid = algorithm.prepare(batch).mask_BH.sum(1).float()
    for kind, name in enumerate(("demo", "operator", "policy", "before_takeover")):  # by row in each four
        assert stats[f"drawn_{name}"] == pytest.approx(float(num_valid[kind::4].sum() / num_valid.sum()))
    algorithm.after_step(0, stats)
    ready = algorithm.prepare(batch)
    out = algorithm.loss("policy", ready)
    loss_B = algorithm._policy.imitation_loss(ready.obs, Chunk(ready.actions_BHA), ready.mask_BH.float())
    total = torch.zeros(())
    for task in (0, 1):
        rows = ready.task_B == task
        n, kind = num_valid * rows, torch.arange(B) % 4
        part = [float(n[kind == k].sum() / n.sum()) for k in range(4)]
        wanted = {
            "sirius": [part[0], 0.5, 0.498 - part[0], 0.002],
            "iwr": [0.5 * part[k] / (1 - part[1]) if k != 1 else 0.5 for k in range(4)],
        }[weighting]
        for k in range(4):
            mine = n * (kind == k)
            total = total + n.sum() * wanted[k] * (loss_B.detach() * mine).sum() / mine.sum()
    torch.testing.assert_close(out.sum.detach(), total)
    torch.testing.assert_close(out.weight, num_valid.sum())
    counts = _read(out)
    assert counts["counts_operator"] == pytest.approx(0.5, abs=1e-5)
    if weighting == "sirius":
        assert counts["counts_before_takeover"] == pytest.approx(0.002)
        assert counts["counts_demo"] == pytest.approx(counts["drawn_demo"])


@pytest.mark.parametrize("weighting", ["none", "sirius", "iwr"])
def test_rows_of_several_ranks_add_up(weighting):
    algorithm, batch = _make(weighting), _fleet_batch()
    whole = algorithm.loss("policy", algorithm.prepare(batch))
    algorithm.after_step(0, _read(whole))
    whole = algorithm.loss("policy", algorithm.prepare(batch))
    rows = [take_rows(batch, range(3)), take_rows(batch, range(3, B))]
    parts = [algorithm.loss("policy", algorithm.prepare(one)) for one in rows]
    torch.testing.assert_close(sum(p.sum for p in parts), whole.sum)
    torch.testing.assert_close(sum(p.weight for p in parts), whole.weight)
    assert all(p.stats.keys() == whole.stats.keys() for p in parts)
    for name, (top, weight) in whole.stats.items():
        torch.testing.assert_close(sum(p.stats[name][0] for p in parts), top, msg=name)
        torch.testing.assert_close(sum(p.stats[name][1] for p in parts), weight, msg=name)


@pytest.mark.parametrize("weighting", ["none", "sirius", "iwr"])
def test_a_resumed_run_goes_on_to_the_bit(weighting):
    def run(algorithm, engine, steps):
        for step in steps:
            batch = algorithm.prepare(_fleet_batch(step, torch.tensor([-1, 0, 9, 3 + step] * (B // 4))))
            algorithm.after_step(step, engine.update("policy", algorithm.loss, batch))

    straight = _make(weighting)
    engine = make_engine(EngineConfig(), straight, torch.device("cpu"), Ranks(RankPlace()))
    run(straight, engine, range(4))
    resumed = _make(weighting, copy.deepcopy(straight.parts["policy"].module))
    second = make_engine(EngineConfig(), resumed, torch.device("cpu"), Ranks(RankPlace()))
    second.load_state(copy.deepcopy(engine.state()))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    run(straight, engine, range(4, 8))
    run(resumed, second, range(4, 8))
    for a, b in zip(straight.acting().parameters(), resumed.acting().parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight.state_dict()["parts"] == resumed.state_dict()["parts"] and straight.advice == resumed.advice


def test_advice_says_what_is_missing_until_it_is_there():
    algorithm = _make("sirius")

    def after(step, source_B):
        batch = _fleet_batch(step)
        batch.source_B[:] = torch.tensor(source_B, dtype=torch.uint8).repeat(B // len(source_B))
        out = algorithm.loss("policy", algorithm.prepare(batch))
        algorithm.after_step(step, _read(out))
        return algorithm.advice

    demo, operator, policy = int(Source.DEMO), int(Source.OPERATOR), int(Source.POLICY)
    assert "no operator step yet" in after(0, [demo] * 4)
    assert "no successful episode" in after(1, [demo, operator] * 2)
    assert "no weights for reach, push" in after(2, [demo, demo, policy, demo] * 2 + [demo, operator, demo, demo] * 2)
    assert algorithm.state_dict()["seen"] == ["demo", "operator", "policy"]
    for step in range(3, 150):
        said = after(step, [demo, operator, policy, operator])
    assert said == ""
    resumed = _make("sirius")
    resumed.load_state_dict(algorithm.state_dict())
    resumed.after_step(150, {**_read(algorithm.loss("policy", _fleet_batch())), "drawn_operator": 0.0, "drawn_policy": 0.0})
    assert resumed.advice == "", "there were such steps"
    nobody = HgDagger(_policy(), HgDaggerConfig())
    nobody.after_step(0, {"drawn_demo": 1.0, "drawn_operator": 0.0})
    assert "no operator step yet" in nobody.advice
    nobody.after_step(1, {"drawn_demo": 0.5, "drawn_operator": 0.5})
    assert nobody.advice == "", "that the policy's own steps are missing is no lack: nobody asked for them"
