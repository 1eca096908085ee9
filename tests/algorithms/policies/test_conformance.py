"""What the Policy contract (algorithms/policies/base.py) promises, held by every case of cases.py."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from algorithms.base import noise_of
from algorithms.ema import Ema
from algorithms.policies.base import ADVANTAGE, DELAY, PREFIX, Chunk
from algorithms.policies.registry import build, describe, load_published, published
from fleet.errors import PolicyError
from fleet.spec import ACTION
from tests.algorithms.policies import cases
from tests.algorithms.policies.cases import CASES, B, make, noise, observe, prefixed, rows, statistics_of, targets

pytestmark = pytest.mark.parametrize("name", CASES)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same sums in another order


def sampled(policy, batch=B, seed=5):
    obs = observe(policy.spec, batch)
    with torch.no_grad():
        return obs, policy.act(obs, noise(policy, batch, seed))


def loss_of(policy, obs, chunk, mask_BH, loss_noise):
    """The loss by row, and all gradients of its sum."""
    policy.zero_grad()
    loss_B = policy.imitation_loss(obs, chunk, mask_BH, loss_noise)
    loss_B.sum().backward()
    return loss_B.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_same(one: Chunk, other: Chunk, **tolerance):
    """To the bit where no tolerance is given."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one.actions_BHA, other.actions_BHA, **tolerance)
    assert (one.log_prob_BT is None) == (other.log_prob_BT is None) and one.replay.keys() == other.replay.keys()
    if one.log_prob_BT is not None:
        torch.testing.assert_close(one.log_prob_BT, other.log_prob_BT, **tolerance)
    for column, value in one.replay.items():
        torch.testing.assert_close(value, other.replay[column], **tolerance)


def test_shapes_and_dtypes(name):
    policy = make(name)
    spec, (obs, chunk) = policy.spec, sampled(policy)
    for made in (chunk, policy.act(obs)):
        assert made.actions_BHA.shape == (B, spec.horizon, spec.action_dim) and made.actions_BHA.dtype == torch.float32
        assert torch.isfinite(made.actions_BHA).all()
    assert set(chunk.replay) == set(spec.replay) and all(column.startswith("replay.") for column in spec.replay)
    for column, shape in spec.replay.items():
        assert chunk.replay[column].shape == (B, *shape)
        assert chunk.replay[column].dtype in (torch.float32, torch.int32, torch.int64)
    assert (chunk.log_prob_BT is not None) == spec.density
    if spec.density:
        assert chunk.log_prob_BT.dtype == torch.float32 and chunk.log_prob_BT.dim() == 2
        assert torch.isfinite(chunk.log_prob_BT).all()
    features = policy.embed(obs)
    assert features.dim() == 2 and len(features) == B and torch.isfinite(features).all()
    assert (features - features[:1]).abs()[1:].sum(1).min() > 1e-4  # each row is seen


def test_a_chunk_is_a_function_of_observation_and_noise(name):
    policy = make(name)
    obs, chunk = sampled(policy)
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    torch.manual_seed(10)
    state, one = torch.get_rng_state(), policy.act(obs)
    assert_same(one, policy.act(obs))
    assert_same(chunk, sampled(policy)[1])
    assert (chunk.actions_BHA - sampled(policy, seed=6)[1].actions_BHA).abs().max() > 1e-4
    assert_same(one, policy.train().act(obs))  # no dropout, no batch statistics
    loss_noise, (chunk, mask_BH) = noise(policy), targets(policy.spec)
    loss_B = policy.imitation_loss(obs, chunk, mask_BH, loss_noise)
    assert torch.equal(loss_B, policy.eval().imitation_loss(obs, chunk, mask_BH, loss_noise))
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn but by noise()
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())


def test_rows_do_not_depend_on_each_other(name):
    policy = make(name)
    (obs, chunk), drawn, (target, mask_BH) = sampled(policy), noise(policy), targets(policy.spec)
    loss_B = policy.imitation_loss(obs, target, mask_BH, drawn)
    for index in (torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2])):
        part = rows(obs, index)
        with torch.no_grad():
            assert_same(policy.act(part, rows(drawn, index)), rows(chunk, index), **CLOSE)
            assert_same(policy.act(part), rows(policy.act(obs), index), **CLOSE)
            torch.testing.assert_close(policy.embed(part), policy.embed(obs)[index], **CLOSE)
        loss = policy.imitation_loss(part, rows(target, index), mask_BH[index], rows(drawn, index))
        torch.testing.assert_close(loss, loss_B[index], **CLOSE)


def test_log_prob_is_that_of_act_to_the_bit(name):
    policy = make(name)
    obs, chunk = sampled(policy)
    if not policy.spec.density:
        with pytest.raises(PolicyError, match="density"):
            policy.log_prob(obs, chunk)
        return
    with torch.inference_mode():
        assert_same(policy.act(obs, noise(policy)), chunk)
    log_prob_BT = policy.log_prob(obs, chunk)
    assert torch.equal(log_prob_BT, chunk.log_prob_BT)  # ratio exactly 1 before the first update
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy.log_prob(obs, chunk), chunk.log_prob_BT)
        assert_same(policy.act(obs, noise(policy)), chunk)
    log_prob_BT.sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients) and sum(g.abs().sum() for g in gradients) > 0
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert (policy.log_prob(obs, chunk) - chunk.log_prob_BT).abs().min() > 0
    for column in policy.spec.replay:
        lacking = {key: value for key, value in chunk.replay.items() if key != column}
        with pytest.raises(PolicyError, match=column):
            policy.log_prob(obs, dataclasses.replace(chunk, replay=lacking))


def test_decision_mask(name):
    policy = make(name)
    if not policy.spec.density:
        return
    _, chunk = sampled(policy)
    for mask_BH in (torch.ones(B, policy.spec.horizon), torch.zeros(B, policy.spec.horizon), targets(policy.spec)[1]):
        mask_BT = policy.decision_mask(chunk, mask_BH)
        assert mask_BT.shape == chunk.log_prob_BT.shape
        assert ((mask_BT == 0) | (mask_BT == 1)).all()
        assert torch.equal(mask_BT.sum(1) > 0, mask_BH.sum(1) > 0)


def test_imitation_loss_is_of_valid_actions_only(name):
    policy = make(name)
    obs, drawn, (chunk, mask_BH) = observe(policy.spec), noise(policy), targets(policy.spec)
    empty = mask_BH.sum(1) == 0
    assert empty.sum() == 1
    loss_B, gradients = loss_of(policy, obs, chunk, mask_BH, drawn)
    assert loss_B.shape == (B,) and torch.isfinite(loss_B).all()
    assert (loss_B[empty] == 0).all() and (loss_B[~empty] != 0).all()
    assert gradients and all(torch.isfinite(g).all() for g in gradients.values())
    for garbage in (float("nan"), float("inf"), 1e9):
        padded = torch.where(mask_BH[..., None] > 0, chunk.actions_BHA, torch.full_like(chunk.actions_BHA, garbage))
        padded_B, padded_gradients = loss_of(policy, obs, Chunk(padded), mask_BH, drawn)
        assert torch.equal(padded_B, loss_B)
        assert all(torch.equal(gradient, gradients[key]) for key, gradient in padded_gradients.items())
    nothing_B, nothing = loss_of(policy, obs, chunk, torch.zeros_like(mask_BH), drawn)
    assert (nothing_B == 0).all() and all((gradient == 0).all() for gradient in nothing.values())


def test_every_trained_weight_has_a_gradient(name):
    policy = make(name)
    obs, chunk = sampled(policy)
    loss = policy.imitation_loss(obs, *targets(policy.spec), noise(policy)).sum()
    if policy.spec.density:
        loss = loss + policy.log_prob(obs, chunk).sum()
    loss.backward()
    frozen = tuple(f"{module}." for module in getattr(policy, "frozen", ()))
    for key, parameter in policy.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached != key.startswith(frozen), key


def test_parts_of_a_batch_sum_to_the_whole(name):
    policy = make(name)
    obs, (chunk, mask_BH) = observe(policy.spec), targets(policy.spec)

    def draw(index):
        return noise_of(policy, SimpleNamespace(index_B=index), B, seed=7, step=3)

    everything = torch.arange(B)
    loss_B, gradients = loss_of(policy, obs, chunk, mask_BH, draw(everything))
    policy.zero_grad()
    parts = []
    for index in (everything[:2], everything[2:]):
        parts.append(policy.imitation_loss(rows(obs, index), rows(chunk, index), mask_BH[index], draw(index)))
        parts[-1].sum().backward()
    torch.testing.assert_close(torch.cat(parts), loss_B, **CLOSE)
    for key, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5)


def test_it_learns_one_batch_by_heart(name):
    policy = make(name).train()
    obs, drawn, (chunk, mask_BH) = observe(policy.spec), noise(policy), targets(policy.spec)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(15):
        loss = policy.imitation_loss(obs, chunk, mask_BH, drawn).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < 0.6 * losses[0]


def test_a_release_holds_all_that_acting_needs(name):
    policy, other = make(name), make(name, seed=8)
    obs, chunk = sampled(policy)
    described = json.loads(json.dumps(describe(policy)))
    fresh = build(described["family"], described["config"]).eval()
    assert fresh.spec == policy.spec
    weights = {key: tensor.clone() for key, tensor in published(policy).items()}
    frozen = tuple(f"{module}." for module in getattr(policy, "frozen", ()))
    assert all(not key.startswith(frozen) for key in weights)
    fresh.load_state_dict({**fresh.state_dict(), **{k: v for k, v in policy.state_dict().items() if k not in weights}})
    load_published(fresh, weights)
    with torch.no_grad():
        assert_same(fresh.act(obs, noise(policy)), chunk)
        assert_same(fresh.act(obs), policy.act(obs))
        assert (other.act(obs).actions_BHA - policy.act(obs).actions_BHA).abs().max() > 1e-5
    some = next(iter(weights))
    with pytest.raises(PolicyError, match="missing"):
        load_published(fresh, {key: tensor for key, tensor in weights.items() if key != some})


def test_statistics_are_checked_and_travel(name):
    policy, spec = make(name), make(name).spec
    obs, drawn, (chunk, mask_BH) = observe(spec), noise(policy), targets(spec)
    before = published(policy).keys()
    moved = copy.deepcopy(policy)
    moved.set_statistics(statistics_of(spec, seed=9))
    assert published(moved).keys() == before
    load_published(copy.deepcopy(policy), published(moved))
    if spec.vectors:
        assert not torch.equal(moved.act(obs).actions_BHA, policy.act(obs).actions_BHA)
    known = statistics_of(spec)
    for feature in spec.vectors:
        with pytest.raises(PolicyError, match=feature):
            policy.set_statistics({key: value for key, value in known.items() if key != feature})
        odd = dataclasses.replace(known[feature], mean=np.full(spec.reads[feature], np.nan))
        with pytest.raises(PolicyError, match="finite"):
            policy.set_statistics({**known, feature: odd})
        with pytest.raises(PolicyError, match=feature):
            policy.set_statistics({**known, feature: known[ACTION] if spec.reads[feature] != (spec.action_dim,) else odd})
    torch.testing.assert_close(
        policy.imitation_loss(obs, chunk, mask_BH, drawn), make(name).imitation_loss(obs, chunk, mask_BH, drawn)
    )


def test_mixed_precision_is_finite_and_near(name):
    policy = make(name)
    obs, drawn, (chunk, mask_BH) = observe(policy.spec), noise(policy), targets(policy.spec)
    loss_B, _ = loss_of(policy, obs, chunk, mask_BH, drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near_B = policy.imitation_loss(obs, chunk, mask_BH, drawn)
    policy.zero_grad()
    near_B.sum().backward()
    assert near_B.dtype == torch.float32
    torch.testing.assert_close(near_B.detach(), loss_B, rtol=0.1, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(name):
    policy = make(name)
    (obs, chunk), (target, mask_BH) = sampled(policy), targets(policy.spec)
    there = copy.deepcopy(policy).cuda()
    on_gpu = {key: value.cuda() for key, value in obs.items()}
    with torch.no_grad():
        made = there.act(on_gpu, noise(policy))
        torch.testing.assert_close(there.act(on_gpu).actions_BHA.cpu(), policy.act(obs).actions_BHA, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(made.actions_BHA.cpu(), chunk.actions_BHA, rtol=1e-3, atol=1e-3)
        if policy.spec.density:
            assert torch.equal(there.log_prob(on_gpu, made), made.log_prob_BT)
            torch.testing.assert_close(made.log_prob_BT.cpu(), chunk.log_prob_BT, rtol=1e-3, atol=1e-2)
        loss_B = there.imitation_loss(on_gpu, Chunk(target.actions_BHA.cuda()), mask_BH.cuda(), noise(policy))
        torch.testing.assert_close(
            loss_B.cpu(), policy.imitation_loss(obs, target, mask_BH, noise(policy)), rtol=1e-3, atol=1e-3
        )


def test_whatever_it_is_given_comes_to_its_device(name, monkeypatch):
    """Without a GPU: tensors of the device "meta" have no numbers, and refuse to be mixed with those of the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # there is none for it
    policy = make(name).to("meta")
    there = {key: value.to("meta") for key, value in observe(policy.spec).items()}
    (target, mask_BH), drawn = targets(policy.spec), noise(policy)
    made = [policy.act(there).actions_BHA, policy.act(there, drawn).actions_BHA, policy.embed(there)]
    made.append(policy.imitation_loss(there, Chunk(target.actions_BHA.to("meta")), mask_BH.to("meta"), drawn))
    if policy.spec.density:
        chunk = policy.act(there, drawn)
        made += [*chunk.replay.values(), policy.decision_mask(chunk, mask_BH.to("meta"))]
        if CASES[name][0] != "token":  # which looks at the numbers of a record
            made.append(policy.log_prob(there, chunk))
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_an_average_can_be_kept_of_it(name):
    policy = make(name)
    obs, ema = observe(policy.spec), Ema(policy, 0.9)
    assert_same(ema.module.act(obs), policy.act(obs))
    assert not any(p.requires_grad for p in ema.module.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert_same(ema.module.act(obs), copy.deepcopy(ema.module).act(obs))
    assert not torch.equal(ema.module.act(obs).actions_BHA, policy.act(obs).actions_BHA)
    ema.update(100)
    assert ema.module.spec == policy.spec and ema.module.family == policy.family


def test_images_are_moved_by_noise_alone(name):
    policy = make(name)
    obs, drawn, (chunk, mask_BH) = observe(policy.spec), noise(policy), targets(policy.spec)
    shifts = [key for key in drawn if key.startswith("shift.")] if isinstance(drawn, dict) else []
    if not shifts:
        return
    assert {f"shift.{camera}" for camera in policy.spec.images} == set(shifts)
    still = {**drawn, **{key: torch.full_like(drawn[key], int(drawn[key].max()) // 2) for key in shifts}}
    assert not torch.equal(policy.imitation_loss(obs, chunk, mask_BH, drawn), policy.imitation_loss(obs, chunk, mask_BH, still))
    assert_same(policy.act(obs, drawn), policy.act(obs, still))  # acting sees the image as it is


def test_advantage(name):
    policy = make(name)
    if ADVANTAGE not in policy.spec.conditions:
        return
    obs = observe(policy.spec)
    positive, absent = {**obs, ADVANTAGE: torch.ones(B)}, {**obs, ADVANTAGE: torch.zeros(B)}
    missing = {key: value for key, value in obs.items() if key != ADVANTAGE}
    with torch.no_grad():
        assert_same(policy.act(missing), policy.act(absent))
        without, given = policy.act(absent).actions_BHA, policy.act(positive).actions_BHA
        assert (given - without).abs().max() > 1e-5
        torch.testing.assert_close(policy.act(positive, guidance=0.0).actions_BHA, without, **CLOSE)
        torch.testing.assert_close(policy.act(positive, guidance=1.0).actions_BHA, given, **CLOSE)
        assert (policy.act(positive, guidance=2.0).actions_BHA - given).abs().max() > 1e-5


def test_prefix(name):
    policy = make(name)
    if not policy.spec.max_delay:
        return
    plain, drawn = observe(policy.spec), noise(policy)
    obs = prefixed(policy.spec, plain)
    with torch.no_grad():
        chunk, free = policy.act(obs, drawn), policy.act(plain, drawn)
        for made in (chunk, policy.act(obs)):
            for row, delay in enumerate(obs[DELAY].tolist()):
                assert torch.equal(made.actions_BHA[row, :delay], obs[PREFIX][row, :delay])
        undecided = obs[DELAY] == 0
        assert_same(rows(chunk, undecided), rows(free, undecided), **CLOSE)
        assert (chunk.actions_BHA - free.actions_BHA)[:, policy.spec.max_delay :].abs().max() > 1e-5
        if policy.spec.density:
            assert torch.equal(policy.log_prob(obs, chunk), chunk.log_prob_BT)
        with pytest.raises(PolicyError, match="delay"):
            policy.act({**obs, DELAY: obs[DELAY] + policy.spec.max_delay}, drawn)


def test_every_family_has_a_case(name):
    from algorithms.policies.registry import FAMILIES

    elsewhere = {"lerobot", "best_of"}  # other packages; another policy inside
    assert set(FAMILIES) - elsewhere <= {family for family, _ in CASES.values()}
    assert cases.CASES[name][0] in FAMILIES
