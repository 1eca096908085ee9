import numpy as np
import pytest
import torch
from torch import nn

from algorithms.critics import build_critic
from algorithms.policies.base import DELAY, INSTRUCTION, PREFIX, Chunk
from algorithms.policies.best_of import BestOf
from algorithms.policies.registry import build, load_published, published
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError
from fleet.spec import ACTION, IMAGE_PREFIX, STATE

CAMERA = f"{IMAGE_PREFIX}front"
B, H, A, E, N = 5, 3, 2, 4, 16
SHARED = {"reads": {STATE: [6]}, "action_dim": A, "horizon": H, "instruction_dim": E, "width": 16}


def _best(num_samples=N, **changes):
    torch.manual_seed(0)
    policy, critic = build("mlp", {**SHARED, "log_std": 0.0}), build_critic("mlp", {**SHARED, "num_layers": 2})
    return BestOf.around(policy, critic, num_samples=num_samples, **changes)


def _obs(batch=B):
    g = torch.Generator().manual_seed(1)
    return {STATE: torch.randn(batch, 6, generator=g), INSTRUCTION: torch.randn(batch, E, generator=g)}


class Near(nn.Module):
    """Two critics: one values actions near ``wanted``, the other such near its opposite, less strongly."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted

    def forward(self, obs, actions_BHA):
        one, other = ((actions_BHA - side * self.wanted) ** 2 for side in (1, -1))
        return torch.stack([-one.sum((1, 2)), -0.5 * other.sum((1, 2))])


def test_it_acts_by_the_sample_that_the_critic_values_most():
    best, obs = _best(), _obs()
    noise = best.noise(B, torch.Generator().manual_seed(2))
    chosen = best.act(obs, noise)
    assert chosen.actions_BHA.shape == (B, H, A) and chosen.log_prob_BT is None and not best.spec.density
    for row in range(B):
        alone = {name: value[row : row + 1].expand(N, *value.shape[1:]) for name, value in obs.items()}
        samples = best.policy.act(alone, {name: value[row] for name, value in noise.items()}).actions_BHA
        values = best.critic(alone, samples).mean(0)
        torch.testing.assert_close(chosen.actions_BHA[row], samples[values.argmax()])
        assert values.argmax() != values.argmin()


def test_more_samples_come_nearer_to_what_the_critic_wants():
    wanted = torch.full((H, A), 0.8)
    distance = {}
    for num_samples in (1, 4, 64):
        best = _best(num_samples)
        best.critic = Near(wanted)
        actions = best.act(_obs(64), best.noise(64, torch.Generator().manual_seed(0))).actions_BHA
        distance[num_samples] = (actions - wanted).square().sum((1, 2)).mean().item()
    assert distance[64] < 0.5 * distance[4] < 0.5 * distance[1]
    one = _best(1)
    noise = one.noise(B, torch.Generator().manual_seed(0))
    assert torch.equal(
        one.act(_obs(), noise).actions_BHA,
        one.policy.act(_obs(), {name: value[:, 0] for name, value in noise.items()}).actions_BHA,
    )


def test_an_ensemble_is_judged_by_its_mean_or_its_least():
    wanted = torch.full((H, A), 1.0)
    chosen = {}
    for aggregate in ("mean", "min"):
        best = _best(256, aggregate=aggregate)
        best.critic = Near(wanted)
        chosen[aggregate] = best.act(_obs(32)).actions_BHA.mean().item()
    assert chosen["mean"] > chosen["min"]  # the least of both keeps away from either side's extreme
    with pytest.raises(PolicyError, match="one of"):
        _best(aggregate="max")


def test_values_that_are_not_finite_do_not_act_unseen():
    best, obs = _best(), _obs()
    with torch.no_grad():
        best.critic.head.bias[0] = torch.nan
    assert best.policy.act(obs).actions_BHA.isfinite().all() and best.act(obs).actions_BHA.isnan().all()


def test_without_noise_it_is_deterministic_and_rows_do_not_touch_each_other():
    best, obs = _best(), _obs()
    whole = best.act(obs).actions_BHA
    assert torch.equal(whole, best.act(obs).actions_BHA)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(best.act({n: v[order] for n, v in obs.items()}).actions_BHA, whole[order])
    torch.testing.assert_close(best.act({n: v[2:3] for n, v in obs.items()}).actions_BHA, whole[2:3])


def test_the_critic_travels_with_the_policy():
    best = _best()
    spread = np.array([-1.0, 1.0])[:, None]
    best.set_statistics({STATE: Statistics.of(3 + 2 * spread.repeat(6, 1)), ACTION: Statistics.of(spread.repeat(A, 1))})
    for part in (best.policy, best.critic.reader):
        torch.testing.assert_close(part.normaliser.mean_S, torch.full((6,), 3.0))
    tensors = published(best)
    assert {"policy.head.weight", "critic.head.weight", "critic.reader.normaliser.mean_S"} <= set(tensors)
    other = build(best.family, best.config)
    assert not torch.equal(other.act(_obs()).actions_BHA, best.act(_obs()).actions_BHA)
    load_published(other, tensors)
    assert torch.equal(other.act(_obs()).actions_BHA, best.act(_obs()).actions_BHA)
    with torch.no_grad():
        best.critic.head.weight.neg_()
        best.critic.head.bias.neg_()
    load_published(other, published(best))
    assert torch.equal(other.act(_obs()).actions_BHA, best.act(_obs()).actions_BHA)
    del tensors["critic.head.weight"]
    with pytest.raises(PolicyError, match=r"critic\.head\.weight is missing"):
        load_published(other, tensors)


def test_losses_and_features_are_those_of_the_policy():
    best, obs = _best(), _obs()
    chunk, mask = Chunk(torch.randn(B, H, A)), torch.ones(B, H)
    noise = best.noise(B, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        best.imitation_loss(obs, chunk, mask, noise),
        best.policy.imitation_loss(obs, chunk, mask, {name: value[:, 0] for name, value in noise.items()}),
    )
    torch.testing.assert_close(best.embed(obs), best.policy.embed(obs))
    for ask in (lambda: best.log_prob(obs, chunk), lambda: best.decision_mask(chunk, mask)):
        with pytest.raises(PolicyError, match="no density"):
            ask()


def test_noise_of_a_policy_whose_loss_needs_it_is_cut_by_rows():
    torch.manual_seed(0)
    reads = {STATE: [6], CAMERA: [16, 16, 3]}
    flow = build("flow", {**SHARED, "reads": reads, "num_heads": 2, "num_layers": 1, "max_delay": 1, "noise_level": 0.5})
    best = BestOf.around(flow, build_critic("mlp", {**SHARED, "num_layers": 1}), num_samples=3)
    assert best.spec.max_delay == 1 and not best.spec.density and not best.spec.replay
    noise = best.noise(B, torch.Generator().manual_seed(0))
    whole = flow.noise(3 * B, torch.Generator().manual_seed(0))
    assert set(noise) == set(whole) == {"start", "time", "delay", "steps", f"shift.{CAMERA}"}
    obs = {**_obs(), CAMERA: torch.randint(0, 256, (B, 16, 16, 3), dtype=torch.uint8)}
    chunk, mask = Chunk(torch.randn(B, H, A)), torch.ones(B, H)
    first = {name: value[::3] for name, value in whole.items()}
    assert torch.equal(best.imitation_loss(obs, chunk, mask, noise), flow.imitation_loss(obs, chunk, mask, first))
    row = {name: value[2:3] for name, value in noise.items()}
    alone = best.imitation_loss({n: v[2:3] for n, v in obs.items()}, Chunk(chunk.actions_BHA[2:3]), mask[2:3], row)
    torch.testing.assert_close(alone, flow.imitation_loss(obs, chunk, mask, first)[2:3])
    obs |= {PREFIX: torch.randn(B, 1, A), DELAY: torch.arange(B) % 2}
    for actions in (best.act(obs, noise).actions_BHA, best.act(obs).actions_BHA):
        assert torch.equal(actions[1::2, 0], obs[PREFIX][1::2, 0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"horizon": H + 1}, "judges chunks of 4 x 2"),
        ({"action_dim": 3}, "judges chunks of 3 x 3"),
        ({"reads": {STATE: [7]}}, r"observation\.state"),
        ({"instruction_dim": E + 1}, "instruction"),
    ],
)
def test_policy_and_critic_must_fit(changes, said):
    policy = build("mlp", SHARED)
    with pytest.raises(PolicyError, match=said):
        BestOf.around(policy, build_critic("mlp", {**SHARED, **changes}))


def test_critics_of_an_ensemble_share_nothing():
    torch.manual_seed(0)
    critic = build_critic("mlp", {**SHARED, "num_critics": 3, "num_layers": 2})
    obs, actions = _obs(), torch.randn(B, H, A)
    before = critic(obs, actions)
    assert before.shape == (3, B) and before.dtype == torch.float32
    critic(obs, actions)[1].sum().backward()
    for p in critic.parameters():
        assert len(p) == 3 and (p.grad[[0, 2]] == 0).all() and (p.grad[1] != 0).any()
    late = actions.clone()
    late[:, -1] += 0.5
    assert (critic(obs, late) != before).all()


def _critic_of_images():
    torch.manual_seed(0)
    config = {**SHARED, "reads": {STATE: [6], CAMERA: [32, 32, 3]}, "image_dims": 16, "num_layers": 1}
    image = torch.zeros(B, 32, 32, 3, dtype=torch.uint8)
    image[:, 2:12, 2:12] = torch.arange(50, 50 + 20 * B, 20, dtype=torch.uint8)[:, None, None, None]
    return build_critic("mlp", config), {**_obs(), CAMERA: image}


def test_a_critic_sees_what_is_in_an_image_and_where():
    critic, obs = _critic_of_images()
    values = critic(obs, torch.zeros(B, H, A))
    for changed in (255 - obs[CAMERA], obs[CAMERA].roll(16, 1), obs[CAMERA].roll(16, 2)):
        assert ((critic({**obs, CAMERA: changed}, torch.zeros(B, H, A)) - values).abs() > 1e-3).all()


def test_a_camera_that_a_critic_cannot_use_is_refused_by_name():
    critic, obs = _critic_of_images()
    for changed, said in (({CAMERA: obs[CAMERA][:, :16]}, r"front' is torch.uint8 \(16, 32, 3\)"), ({}, "front' is missing")):
        rest = {name: value for name, value in obs.items() if name != CAMERA}
        with pytest.raises(PolicyError, match=said):
            critic({**rest, **changed}, torch.zeros(B, H, A))
    with pytest.raises(PolicyError, match=r"'observation\.images\.front': images of shape"):
        build_critic("mlp", {**SHARED, "reads": {CAMERA: [8, 8, 3]}})


def test_several_chunks_of_a_state_are_judged_with_one_look_at_it():
    critic, obs = _critic_of_images()
    actions = torch.randn(B * N, H, A, generator=torch.Generator().manual_seed(0))
    each = {name: value.repeat_interleave(N, 0) for name, value in obs.items()}
    seen = []
    critic.reader.cameras.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    torch.testing.assert_close(critic(obs, actions), critic(each, actions))
    assert seen == [B, B * N]


def test_unknown_settings_are_named():
    for family, config, said in (
        ("mpl", SHARED, "did you mean 'mlp'"),
        ("mlp", {**SHARED, "widht": 3}, "did you mean 'width'"),
        ("mlp", {**SHARED, "num_critics": 0}, "at least 1"),
    ):
        with pytest.raises(PolicyError) as caught:
            build_critic(family, config)
        assert said in str(caught.value)
    for config, said in (({}, "policy of best_of is {}"), ({"family": "mlp"}, "policy of best_of is {'family': 'mlp'}")):
        with pytest.raises(PolicyError, match=said):
            build("best_of", {"policy": config, "critic": {"family": "mlp", "config": SHARED}})
