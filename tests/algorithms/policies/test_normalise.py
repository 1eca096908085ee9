import numpy as np
import pytest
import torch

from algorithms.policies.normalise import MAX_NORMALISED, MIN_STD, ActionScale, Normaliser
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError
from fleet.spec import ACTION, STATE, Feature, RobotSpec

SHAPES = {"observation.effort": (2, 2), STATE: (3,)}


def statistics(**changes):
    rng = np.random.default_rng(0)
    return {name: Statistics.of(5 + 3 * rng.normal(size=(500, *shape))) for name, shape in SHAPES.items()} | changes


def test_features_have_mean_0_and_deviation_1_in_the_order_of_their_names_and_are_clipped():
    normaliser, known = Normaliser(SHAPES), statistics()
    normaliser.set_statistics(known)
    obs = {name: torch.from_numpy(known[name].mean + 2 * known[name].std)[None] for name in SHAPES}  # float64
    torch.testing.assert_close(normaliser(obs), torch.full((1, 7), 2.0))
    obs[STATE] = obs[STATE].clone()
    obs[STATE][0, 0] = 1e9
    out = normaliser(obs)
    assert out.dtype == torch.float32 and out[0, 4] == MAX_NORMALISED and out[0, 3] != MAX_NORMALISED


def test_what_hardly_varies_is_not_blown_up():
    normaliser = Normaliser({STATE: (1,)})
    normaliser.set_statistics({STATE: Statistics.of(np.full((9, 1), 2.0))})
    assert normaliser({STATE: torch.tensor([[2.0 + MIN_STD]])}).item() == pytest.approx(1, abs=1e-4)


def test_a_part_of_a_feature_is_read_and_the_rest_cannot_be_seen():
    known, select = statistics(), {STATE: [2, 0], "observation.effort": []}
    normaliser = Normaliser(SHAPES, select)
    normaliser.set_statistics(known)
    assert normaliser.size == 2 and normaliser.mean_S.tolist() == pytest.approx(known[STATE].mean[[2, 0]].tolist())
    values = torch.tensor([[1.0, float("nan"), 3.0]])
    out = normaliser({STATE: values, "observation.effort": torch.full((1, 2, 2), float("nan"))})
    expected = (np.array([3.0, 1.0]) - known[STATE].mean[[2, 0]]) / known[STATE].std[[2, 0]]
    torch.testing.assert_close(out, torch.from_numpy(expected[None]).float())
    effort = Normaliser(SHAPES, {"observation.effort": [3]})
    effort.set_statistics(known)
    assert effort.size == 4 and effort.mean_S[0].item() == pytest.approx(known["observation.effort"].mean[1, 1])
    assert set(normaliser.state_dict()) == {"mean_S", "std_S"}  # which elements are read is said by the settings


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"observation.stat": [0]}, "observation.stat'"),
        ({STATE: [3]}, "of 3"),
        ({STATE: [-1]}, "-1"),
        ({STATE: [1, 1]}, "1, 1"),
    ],
)
def test_refused_selections(select, said):
    with pytest.raises(PolicyError) as caught:
        Normaliser(SHAPES, select)
    assert said in str(caught.value)


def test_refused_observations():
    obs = {name: torch.zeros(2, *shape) for name, shape in SHAPES.items()}
    with pytest.raises(PolicyError, match=f"{STATE}.* is missing"):
        Normaliser(SHAPES)({"observation.effort": obs["observation.effort"]})
    with pytest.raises(PolicyError, match=rf"{STATE}.*\(4,\)"):
        Normaliser(SHAPES)({**obs, STATE: torch.zeros(2, 4)})
    assert Normaliser({})(obs).shape == (2, 0)


def test_actions_are_scaled_by_their_quantiles_there_and_back():
    rng = np.random.default_rng(0)
    actions = np.stack([rng.uniform(-2, 6, 5000), np.full(5000, 0.7)], 1)
    actions[0, 0] = 1e6  # one glitch does not set the scale
    scale = ActionScale(2)
    scale.set_statistics({ACTION: Statistics.of(actions)})
    normal = scale.normalise(torch.tensor([[[-1.9, 0.7], [2.0, 1.7], [5.9, 0.7]]]))
    torch.testing.assert_close(normal, torch.tensor([[[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]), rtol=0, atol=0.02)
    torch.testing.assert_close(scale.restore(normal), torch.tensor([[[-1.9, 0.7], [2.0, 1.7], [5.9, 0.7]]]))
    with pytest.raises(PolicyError, match=ACTION):
        scale.set_statistics({})


def test_a_policy_of_other_units_does_not_drive_a_robot():
    def robot(low, high):
        return RobotSpec("arm", 20.0, {STATE: Feature("float32", (3,)), ACTION: Feature("float32", (2,), "rad", low, high)})

    scale = ActionScale(2)
    scale.set_statistics({ACTION: Statistics.of(np.random.default_rng(0).uniform(-90, 90, (500, 2)))})  # degrees
    scale.check_robot(robot(None, None))
    scale.check_robot(robot(-180.0, 180.0))
    with pytest.raises(PolicyError, match="'rad'"):
        scale.check_robot(robot(-3.2, 3.2))
