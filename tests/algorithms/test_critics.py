import numpy as np
import pytest
import torch

from algorithms.base import noise_of
from algorithms.critics import build_critic, critic_like
from algorithms.ema import Target, polyak
from algorithms.policies.base import INSTRUCTION
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from fleet.spec import ACTION, STATE
from tests.batches import make_batch

B, N, H, A, CAMERA = 6, 3, 4, 2, "observation.images.front"
SMALL = {"reads": {STATE: [5]}, "action_dim": A, "horizon": H, "instruction_dim": 3, "width": 16, "num_layers": 2}


def critic_of(family, seed=0, **settings):
    torch.manual_seed(seed)
    critic = build_critic(family, {**SMALL, **settings})
    with torch.no_grad():
        for p in critic.parameters():  # nothing is zero that could hide something
            p.add_(0.1 * torch.randn_like(p))
    return critic


def draw(rows=B, seed=1):
    g = torch.Generator().manual_seed(seed)
    obs = {STATE: torch.randn(B, 5, generator=g), INSTRUCTION: torch.randn(B, 3, generator=g)}
    return obs, torch.randn(rows, H, A, generator=g)


def test_the_value_of_a_beginning_does_not_see_later_actions():
    critic, (obs, actions) = critic_of("causal"), draw()
    values = critic.prefixes(obs, actions)
    assert values.shape == (2, B, H) and values.dtype == torch.float32
    for k in range(1, H + 1):
        for later in (torch.randn(B, H - k, A), torch.full((B, H - k, A), torch.nan)):
            changed = torch.cat([actions[:, :k], later], 1)
            assert torch.equal(critic.prefixes(obs, changed)[..., :k], values[..., :k])  # to the bit
        changed = actions.clone()
        changed[:, k - 1] += 0.5
        assert (critic.prefixes(obs, changed)[..., k - 1 :] != values[..., k - 1 :]).all()  # but each sees its own
    grown = torch.autograd.grad(critic.prefixes(obs, actions.requires_grad_())[..., 1].sum(), actions)[0]
    assert (grown[:, :2] != 0).all() and (grown[:, 2:] == 0).all()


def test_the_value_of_all_actions_is_that_of_the_chunk():
    critic, (obs, actions) = critic_of("causal"), draw(B * N)
    torch.testing.assert_close(critic.prefixes(obs, actions)[..., -1], critic(obs, actions))
    each = {name: value.repeat_interleave(N, 0) for name, value in obs.items()}
    torch.testing.assert_close(critic.prefixes(obs, actions), critic.prefixes(each, actions))


def test_how_long_a_beginning_is_is_known():
    """Actions at the scale's centre add nothing, so these beginnings differ in nothing else."""
    critic, (obs, _) = critic_of("causal"), draw()
    values = critic.prefixes(obs, torch.zeros(B, H, A))
    assert all((values[..., i] != values[..., j]).all() for i in range(H) for j in range(i))


@pytest.mark.parametrize("family", ["mlp", "causal"])
def test_critics_learn_in_the_units_of_the_data(family):
    critic, (obs, actions) = critic_of(family), draw()
    before = critic(obs, actions)
    statistics = {
        name: Statistics.of(7 + 3 * np.random.default_rng(0).normal(size=(500, n))) for name, n in ((STATE, 5), (ACTION, A))
    }
    critic.set_statistics(statistics)
    scaled = critic.scale.restore(actions)
    moved = {**obs, STATE: obs[STATE] * critic.reader.normaliser.std_S + critic.reader.normaliser.mean_S}
    torch.testing.assert_close(critic(moved, scaled), before, rtol=1e-4, atol=1e-4)


def test_each_critic_of_an_ensemble_learns_alone():
    critic, (obs, actions) = critic_of("causal", num_critics=3), draw()
    critic.prefixes(obs, actions)[1].sum().backward()
    for p in critic.parameters():
        assert len(p) == 3 and (p.grad[[0, 2]] == 0).all() and (p.grad[1] != 0).any()


def test_images_move_while_training_alike_in_every_micro_batch():
    critic = critic_of("mlp", reads={CAMERA: [32, 32, 3]}, instruction_dim=0, image_dims=8)
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (B, 32, 32, 3), generator=g, dtype=torch.uint8)
    actions = torch.randn(B, H, A, generator=g)

    def judged(rows):
        batch = make_batch({CAMERA: image[rows]}, actions[rows], index_B=torch.arange(B)[rows])
        return critic(batch.obs, batch.actions_BHA, noise_of(critic, batch, B, seed=3, step=5))

    whole = judged(slice(None))
    torch.testing.assert_close(torch.cat([judged(slice(0, 2)), judged(slice(2, B))], 1), whole)
    assert (whole != critic({CAMERA: image}, actions)).any()


def test_a_critic_reads_what_its_policy_reads():
    policy = build("mlp", {"reads": {STATE: [5]}, "action_dim": A, "horizon": H, "instruction_dim": 3})
    critic = critic_like(policy.spec, "causal", {"num_critics": 4, "width": 8})
    obs, actions = draw()
    assert critic(obs, actions).shape == (4, B) and critic.spec.reads == policy.spec.reads
    assert build_critic(critic.family, critic.config).state_dict().keys() == critic.state_dict().keys()


def test_a_target_follows_by_its_share():
    source, other = critic_of("mlp"), critic_of("mlp", seed=1)
    target = Target(source, 0.25)
    before = [p.clone() for p in target.module.parameters()]
    assert not any(p.requires_grad for p in target.module.parameters())
    source.load_state_dict(other.state_dict())
    source.scale.center_A += 1.0
    target.follow()
    for old, now, new in zip(before, target.module.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)
    assert torch.equal(target.module.scale.center_A, source.scale.center_A)  # buffers are copied
    polyak(target.module, source, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.module.parameters(), source.parameters(), strict=True))
