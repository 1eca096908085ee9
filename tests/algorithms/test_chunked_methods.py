"""What each method of chunked_rl computes, and that it learns more from mixed data than cloning does."""

import copy

import pytest
import torch

from algorithms.base import DataFacts
from algorithms.bc import Bc, BcConfig
from algorithms.chunked_distilled import one_step
from algorithms.chunked_rl import ChunkedRl, ChunkedRlConfig
from algorithms.policies.base import Chunk
from algorithms.policies.registry import build
from algorithms.sampling import has_gradient, within_reach
from algorithms.windows import fill_with_last_action
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import STATE
from tests.algorithms import line
from tests.algorithms.reach_toy import Trainer
from tests.algorithms.test_chunked_rl import DATA, SIZES, B, batch_of, gradients, make

GAMMA = 0.99


def moved(algorithm):
    """Targets and averages that differ from what they follow, so that one taken for the other shows."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in algorithm.frozen.values():
            for p in module.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return algorithm


@pytest.mark.parametrize("method", ["cal_ql", "iql"])
def test_the_first_beginning_learns_by_one_step_targets(method):
    algorithm = moved(make(method, critic_family="causal", target_noise=0.0))
    batch = algorithm.prepare(batch_of(algorithm))
    target_BL, weight_BL = algorithm._targets(batch)
    reward_BH, terminal_BH = algorithm.rewards.rewards_BH(batch), algorithm.rewards.terminal_BH(batch)
    with torch.no_grad():
        value_B = algorithm.next_value({k: v.repeat_interleave(3, 0) for k, v in batch.obs_at[1].items()}, batch)[::3]
    if method == "iql":
        expected_B = reward_BH[:, 0] + GAMMA * value_B * ~terminal_BH[:, 0]
        known_B = batch.inside_at[1] | terminal_BH[:, 0]
        assert known_B.any() and torch.equal(weight_BL[:, 0] > 0, known_B)
        torch.testing.assert_close(target_BL[known_B, 0], expected_B[known_B])
    else:  # of samples, of which each beginning has its own
        rows_B = batch.inside_at[1] & ~terminal_BH[:, 0]
        torch.testing.assert_close(target_BL[rows_B, 0], (reward_BH[:, 0] + GAMMA * value_B)[rows_B])


def test_chunks_of_one_action_are_ordinary_td():
    torch.manual_seed(0)
    policy = build("mlp", {**SIZES, "horizon": 1})
    algorithm = moved(ChunkedRl(policy, ChunkedRlConfig("iql"), DataFacts(("a", "b"), DATA.statistics())))
    batch = algorithm.prepare(batch_of(algorithm))
    with torch.no_grad():
        (target_B1, weight_B1), value_B = algorithm._targets(batch), algorithm.value(batch.obs_at[1])
    ends_B = algorithm.rewards.terminal_BH(batch)[:, 0]
    expected_B = algorithm.rewards.rewards_BH(batch)[:, 0] + GAMMA * torch.where(ends_B, 0.0, value_B)
    torch.testing.assert_close(target_B1[:, 0] * weight_B1[:, 0], expected_B * (batch.inside_at[1] | ends_B))


def test_targets_of_co_rft_are_of_target_networks_and_their_smallest_critic():
    algorithm = moved(make("cal_ql", "mlp", target_noise=0.0))
    batch = algorithm.prepare(batch_of(algorithm))
    with torch.no_grad():
        actions = algorithm.frozen["policy_target"].act(batch.obs).actions_BHA
        found = algorithm.next_value({k: v.repeat_interleave(3, 0) for k, v in batch.obs.items()}, batch)[::3]
        torch.testing.assert_close(found, algorithm.frozen["target"](batch.obs, actions).amin(0))
        noisy = moved(make("cal_ql", "mlp", target_noise=1e6, target_noise_clip=0.25))
        seen = []
        noisy.frozen["target"].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        noisy.next_value({k: v.repeat_interleave(3, 0) for k, v in batch.obs.items()}, batch)
    normal = noisy.critic.scale.normalise(actions)
    offset = (noisy.critic.scale.normalise(seen[0][::3]) - normal).abs()[normal.abs() < 1.25]  # the others are clipped there
    torch.testing.assert_close(offset, torch.full_like(offset, 0.25))
    assert len(offset) > 20


def test_a_known_return_bounds_the_gap_and_an_unknown_one_does_not():
    batch = batch_of(make("cal_ql"))
    penalties = {}
    for kind in ("cal_ql", "cql", "none"):
        algorithm = make("cal_ql", conservative=kind, conservative_weight=1.0, reward_scale=1e3)
        prepared = algorithm.prepare(batch)
        data_KB = torch.zeros(2, B)
        penalties[kind] = algorithm._penalty(prepared, data_KB, {})
        return_B = algorithm.rewards.return_B(prepared)
    known, high = ~return_B.isnan(), return_B > 1
    assert penalties["none"] is None and (known & high).any() and (~known).any()
    torch.testing.assert_close(penalties["cal_ql"][high], return_B[high])
    torch.testing.assert_close(penalties["cal_ql"][~known], penalties["cql"][~known])
    several = make("cal_ql", conservative_samples=4)
    assert several._penalty(several.prepare(batch), torch.zeros(2, B), {}).shape == (B,)


def test_the_policy_climbs_the_critic_in_units_of_its_size_and_waits_for_it():
    algorithm = make("cal_ql", "mlp", critic_steps=1)
    batch = algorithm.prepare(batch_of(algorithm))
    imitation_B, num_valid_B = algorithm._imitation(batch)
    assert (num_valid_B == 0).any() and (imitation_B[num_valid_B == 0] == 0).all()
    out = algorithm.loss("policy", batch)
    torch.testing.assert_close(out.sum / out.weight, imitation_B.mean())  # by rows
    algorithm._step, algorithm._scale = 1, 0.2
    q_B = algorithm.critic(batch.obs, algorithm._policy.act(batch.obs).actions_BHA).mean(0)
    torch.testing.assert_close(algorithm.loss("policy", batch).per_sample_B, (imitation_B - 2.5 / 0.2 * q_B).detach())
    algorithm._scale = 1e-9  # nothing was rewarded yet: noise is not magnified
    torch.testing.assert_close(algorithm.loss("policy", batch).per_sample_B, (imitation_B - 2.5 / 0.01 * q_B).detach())


def test_the_policy_of_co_rft_waits_every_other_step():
    algorithm = make("cal_ql")
    trainer = Trainer(algorithm)
    changed = []
    for step in range(4):
        before = [p.clone() for p in algorithm._policy.parameters()]
        trainer(batch_of(algorithm, step))
        changed.append(any(not torch.equal(p, q) for p, q in zip(algorithm._policy.parameters(), before, strict=True)))
    assert changed == [True, False, True, False]


def test_a_policy_without_a_gradient_is_refused_by_co_rft():
    token = {**SIZES, "width": 16, "num_heads": 2, "encoder_layers": 1, "num_bins": 5, "soft_decode": False}
    torch.manual_seed(0)
    policy = build("token", token)
    policy.set_statistics(DATA.statistics())
    with pytest.raises(ConfigError, match="family 'token'"):
        ChunkedRl(policy, ChunkedRlConfig("cal_ql", B), DataFacts(("a", "b"), DATA.statistics()))
    camera = {"reads": {STATE: [1], "observation.images.front": [24, 24, 3]}}
    flow = {**SIZES, "num_heads": 2, "num_steps": 2}
    assert all(has_gradient(build(f, {**c, **camera})) for f, c in (("cnn", SIZES), ("flow", flow), ("small_vla", flow)))


def test_targets_of_q_chunking_are_of_the_chunk_that_the_critic_prefers():
    algorithm = moved(make("q_chunking", target_samples=5))
    batch = algorithm.prepare(batch_of(algorithm))
    with torch.no_grad():
        found_B = algorithm.next_value(batch.obs, batch)
        noise = algorithm._noise(algorithm._policy, batch, 2, 5)
        for b in range(B):
            obs = {name: value[b : b + 1].expand(5, -1) for name, value in batch.obs.items()}
            actions = algorithm._policy.act(obs, {k: v[5 * b : 5 * b + 5] for k, v in noise.items()}).actions_BHA
            actions = within_reach(actions, algorithm.critic.scale)
            best = algorithm.critic(obs, actions).mean(0).argmax()
            expected = algorithm.frozen["target"](obs, actions)[:, best].mean()
            torch.testing.assert_close(found_B[b], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("imitate", "sources"), [("all", tuple(Source)), ("experts", (Source.DEMO, Source.OPERATOR))])
def test_what_is_imitated_ends_where_somebody_else_takes_over(imitate, sources):
    algorithm = make("q_chunking", "mlp", imitate=imitate, fill_ends=False)
    batch = algorithm.prepare(batch_of(algorithm))
    loss_B, num_valid_B = algorithm._imitation(batch)
    error_BH = (algorithm._policy.act(batch.obs).actions_BHA - batch.actions_BHA).abs().mean(-1)
    for b in range(B):
        own = [bool(batch.mask_BH[b, i]) and batch.source_BH[b, i] == batch.source_B[b] for i in range(3)]
        count = 0 if int(batch.source_B[b]) not in sources else own.index(False) if False in own else 3
        assert num_valid_B[b] == count
        torch.testing.assert_close(loss_B[b], error_BH[b, :count].sum() / max(count, 1))


def test_an_actor_of_one_step_is_one_step_of_its_flow():
    torch.manual_seed(0)
    flow = build("flow", {**SIZES, "num_heads": 2, "num_steps": 1})
    longer = build("flow", {**flow.config, "num_steps": 4})
    longer.load_state_dict(flow.state_dict())
    actor, (obs, noise) = one_step(longer), (batch_of(make("iql")).obs, flow.noise(B, torch.Generator().manual_seed(0)))
    assert torch.equal(actor.act(obs, noise).actions_BHA, flow.act(obs, noise).actions_BHA)
    assert actor.config["num_steps"] == 1 and (actor.act(obs, noise).actions_BHA != longer.act(obs, noise).actions_BHA).any()
    for other in (build("mlp", SIZES), build("flow", {**flow.config, "noise_level": 0.5})):
        with pytest.raises(ConfigError, match="whose steps are not drawn"):
            one_step(other)


def test_the_distilled_actor_is_held_to_what_the_flow_makes_of_the_same_noise():
    algorithm = make("q_chunking_distilled", critic_steps=1, distill_weight=2.0)
    batch = algorithm.prepare(batch_of(algorithm))
    noise, scale = algorithm._noise(algorithm._policy, batch, 5), algorithm.critic.scale
    own, flow = (module.act(batch.obs, noise).actions_BHA for module in (algorithm.actor, algorithm._policy))
    distance_B = ((own - flow) / scale.half_A).square().mean((1, 2))
    torch.testing.assert_close(algorithm.loss("actor", batch).per_sample_B, 2 * distance_B.detach(), rtol=1e-4, atol=1e-6)
    _, found = gradients(algorithm, "actor", batch)
    assert found and all(p.grad is None for p in algorithm._policy.parameters())


def test_iql_without_beta_is_cloning():
    clone = make("iql", "mlp", beta=0.0)
    batch = batch_of(clone)
    bc = Bc(clone._policy, BcConfig(batch_size=B))
    own = copy.deepcopy(batch)
    own.source_BH[:] = own.source_B[:, None]
    out, expected = clone.loss("policy", clone.prepare(own)), bc.loss("policy", bc.prepare(own))
    torch.testing.assert_close(out.sum / out.weight, expected.sum / expected.weight)


def test_iql_imitates_by_advantage():
    for normalise, unit in ((True, 0.5), (False, 1.0)):
        algorithm = moved(make("iql", "mlp", beta=2.0, normalise_advantages=normalise))
        algorithm._scale = 0.25
        batch = algorithm.prepare(batch_of(algorithm))
        with torch.no_grad():
            q_B = algorithm.frozen["target"](batch.obs, batch.actions_BHA).amin(0)
            advantage_B = q_B - algorithm.value(batch.obs)
        loss_B, _ = algorithm._imitation(batch)
        expected_B = torch.exp(2 * advantage_B / unit).clamp(max=100) * loss_B
        torch.testing.assert_close(algorithm.loss("policy", batch).per_sample_B, expected_B.detach())
        gap_B = q_B - algorithm.value(batch.obs)
        known_B = algorithm._targets(batch)[1][:, -1]
        expected_B = torch.where(gap_B > 0, 0.7, 0.3) * gap_B**2 * known_B
        torch.testing.assert_close(algorithm.loss("value", batch).per_sample_B, expected_B.detach())


def _success_after(method, num_steps, **config):
    """Of the policy that was cloned on the way, and of what acts, after learning from a walk that is right half of the time."""
    data = line.mixed(60)
    torch.manual_seed(0)
    sizes = {"reads": {STATE: [1]}, "action_dim": 1, "horizon": 4, "instruction_dim": 0, "num_heads": 2}
    policy = build("flow", {**sizes, "width": 16, "num_layers": 1, "num_steps": 4})
    policy.set_statistics(data.statistics())
    quick = {"learning_rate": 3e-3, "critic_learning_rate": 2e-3, "tau": 0.05, "discount": 0.95, "critic_steps": 50}
    config = ChunkedRlConfig(method, 64, critic={"width": 64, "num_layers": 2}, imitate="all", **quick, **config)
    config.value = {"width": 32, "num_layers": 2} if method == "iql" else {}
    algorithm = ChunkedRl(policy, config, DataFacts(("line",), data.statistics()))
    trainer = Trainer(algorithm)
    for step in range(num_steps):
        trainer(data.draw(algorithm.needs, step))
    return line.success(policy, num=64), line.success(algorithm.acting(), num=64)


def test_the_best_of_several_chunks_goes_where_the_cloned_policy_does_not():
    cloned, acting = _success_after("q_chunking", 60, target_samples=4, num_samples=8)
    assert cloned < 0.5 and acting > 0.7


def test_imitation_by_advantage_goes_where_the_data_mostly_does_not():
    assert _success_after("iql", 150)[1] > 0.8


def test_the_distilled_actor_goes_where_its_flow_does_not():
    cloned, acting = _success_after("q_chunking_distilled", 120, distill_weight=0.3)
    assert cloned < 0.5 and acting > 0.7


def test_co_rft_climbs_to_where_the_data_mostly_does_not():
    assert _success_after("cal_ql", 100, policy_every=1, critic_family="mlp")[1] > 0.8


def test_garbage_of_a_window_is_the_last_action_also_in_what_is_imitated():
    algorithm = make("q_chunking", "mlp")
    batch = algorithm.prepare(batch_of(algorithm))
    one = batch.source_BH == batch.source_B[:, None]
    loss_B, num_valid_B = algorithm._imitation(batch)
    filled = fill_with_last_action(batch)
    expected_B = algorithm._policy.imitation_loss(batch.obs, Chunk(filled.actions_BHA), one.cumprod(1).float())
    torch.testing.assert_close(loss_B, expected_B)
    assert torch.equal(num_valid_B, one.cumprod(1).sum(1).float())
