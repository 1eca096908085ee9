import numpy as np
import pytest
import torch

from algorithms.policies.base import INSTRUCTION, PolicySpec
from algorithms.policies.statistics import Statistics
from algorithms.values import build_value, cross_entropy, expectation, two_hot, value_like
from fleet.errors import PolicyError
from fleet.spec import STATE

CAMERA = "observation.images.top"
SMALL = {"width": 32, "num_layers": 2, "vision_width": 16, "image_dims": 8}


def make_value(**settings):
    torch.manual_seed(0)
    return build_value({"reads": {STATE: [3]}, "instruction_dim": 4, **SMALL, **settings})


def observations(batch=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {STATE: torch.randn(batch, 3, generator=g), INSTRUCTION: torch.randn(batch, 4, generator=g)}


def test_two_hot_golden():
    hot_BV = two_hot(torch.tensor([-0.3337], dtype=torch.float64), -1.0, 0.0, 201)
    assert torch.nonzero(hot_BV[0])[:, 0].tolist() == [133, 134]
    torch.testing.assert_close(hot_BV[0, 133:135], torch.tensor([0.74, 0.26], dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_two_hot_keeps_the_value_and_ends_at_the_range():
    value_B = torch.tensor([-7.0, -1.0, -0.99999, -0.25, -1e-6, 0.0, 3.0], dtype=torch.float64)
    for num_bins in (2, 5, 201):
        hot_BV = two_hot(value_B, -1.0, 0.0, num_bins)
        assert (hot_BV >= 0).all() and ((hot_BV > 0).sum(1) <= 2).all()
        torch.testing.assert_close(hot_BV.sum(1), torch.ones(7, dtype=torch.float64))
        mean_B = hot_BV @ torch.linspace(-1, 0, num_bins, dtype=torch.float64)
        torch.testing.assert_close(mean_B, value_B.clamp(-1, 0), rtol=0, atol=1e-9)


def test_the_gradient_of_the_cross_entropy_is_the_difference_of_the_distributions():
    logits_BV = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target_BV = two_hot(torch.tensor([-0.9, -0.31, 0.0, -0.5], dtype=torch.float64), -1.0, 0.0, 11)
    cross_entropy(logits_BV, target_BV).sum().backward()
    torch.testing.assert_close(logits_BV.grad, logits_BV.softmax(-1).detach() - target_BV)
    # least where both are equal: the entropy of the target
    best_B = cross_entropy(target_BV.clamp(min=1e-30).log(), target_BV)
    torch.testing.assert_close(best_B, -torch.special.xlogy(target_BV, target_BV).sum(1))


def test_expectation_of_a_sure_distribution_is_its_bin():
    logits_BV = torch.full((3, 5), -1e4)
    logits_BV[range(3), [0, 2, 4]] = 0.0
    assert expectation(logits_BV, torch.linspace(-1, 0, 5)).tolist() == [-1.0, -0.5, 0.0]


def test_losses_are_float32_where_the_rest_is_trained_in_another_precision():
    value, obs, target_B = make_value(), observations(), torch.linspace(-1, 0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss_B, value_B = value.loss(obs, target_B), value(obs)
        by_hand_B = cross_entropy(value.logits(obs), two_hot(target_B, -1, 0, 201))
    assert loss_B.dtype == value_B.dtype == torch.float32 and torch.equal(loss_B, by_hand_B)


def test_both_kinds_learn_values_and_a_distribution_learns_chances():
    """Of two states one always ends at 0, the other at 0 or -1, as often: values 0 and -0.5."""
    state = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [-1.0, 0, 0]])
    obs, target_B = {STATE: state, INSTRUCTION: torch.ones(3, 4)}, torch.tensor([0.0, 0.0, -1.0])
    for num_bins in (1, 51):
        value = make_value(num_bins=num_bins)
        optimizer = torch.optim.Adam(value.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            value.loss(obs, target_B).mean().backward()
            optimizer.step()
        torch.testing.assert_close(value(obs).detach(), torch.tensor([0.0, -0.5, -0.5]), rtol=0, atol=0.03)
    probability_BV = value.logits(obs).softmax(-1)
    assert probability_BV[1, 0] > 0.4 and probability_BV[1, -1] > 0.4


def test_a_number_is_trained_by_half_the_squared_error():
    value, obs, target_B = make_value(num_bins=1), observations(), torch.linspace(-3, 5, 5)
    torch.testing.assert_close(value.loss(obs, target_B), 0.5 * (value(obs) - target_B) ** 2)


def test_values_read_vectors_cameras_and_the_instruction_by_the_statistics():
    spec = PolicySpec({STATE: (3,), CAMERA: (32, 32, 3)}, {INSTRUCTION: (4,)}, 2, 8)
    torch.manual_seed(0)
    value = value_like(spec, SMALL).eval()
    obs = {**observations(), CAMERA: torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8)}
    before_B = value(obs)
    for name in obs:
        changed = {**obs, name: (obs[name].float().flip(0) * 0.5).to(obs[name].dtype)}
        assert not torch.allclose(value(changed), before_B), name
    value.set_statistics({STATE: Statistics.of(np.random.default_rng(0).normal(5, 3, (50, 3)))})
    assert not torch.allclose(value(obs), before_B)
    torch.testing.assert_close(value({name: part[2:4] for name, part in obs.items()}), value(obs)[2:4])  # rows are independent
    assert "bins_V" not in value.state_dict() and any("mean_S" in name for name in value.state_dict())
    one_task = value_like(PolicySpec({STATE: (3,)}, {}, 2, 8), SMALL)
    assert one_task({STATE: obs[STATE]}).shape == (5,)


@pytest.mark.parametrize(
    "settings", [{"num_bins": 0}, {"low": 0.0}, {"width": 0}, {"instruction_dim": -1}, {"reads": {}}, {"bins": 3}]
)
def test_refusals(settings):
    with pytest.raises(PolicyError, match=next(iter(settings))):
        make_value(**settings)


def test_a_missing_feature_is_named():
    with pytest.raises(PolicyError, match=STATE):
        make_value()({INSTRUCTION: torch.ones(2, 4)})
