import pytest
import torch

from algorithms.policies.base import INSTRUCTION
from algorithms.policies.registry import build
from fleet.errors import PolicyError
from fleet.spec import STATE
from tests.algorithms.policies.cases import CAMERA, noise, observe, targets

CONFIG = {"reads": {STATE: [39], CAMERA: [84, 84, 3]}, "action_dim": 4, "select": {STATE: [0, 1, 2, 3]}}


def test_it_has_5_to_25_million_parameters_all_trained():
    policy = build("small_vla", CONFIG)
    assert 5e6 < sum(p.numel() for p in policy.parameters() if p.requires_grad) < 9e6
    assert policy.spec.horizon == 8 and policy.encoder.place_NF.shape[0] == 2 + 36  # state, instruction, 6 x 6 of the image
    assert not getattr(policy, "frozen", ())
    assert policy.cameras is True  # a run file that does not list what it reads means all cameras


def test_it_sees_the_images_the_instruction_and_of_the_state_what_it_may():
    torch.manual_seed(0)
    policy = build("small_vla", {**CONFIG, "width": 64, "num_layers": 1})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    obs, (chunk, mask_BH) = observe(policy.spec), targets(policy.spec)
    seen = {name: value.clone().float().requires_grad_() for name, value in obs.items() if name in (STATE, INSTRUCTION)}
    policy.imitation_loss({**obs, **seen}, chunk, mask_BH, noise(policy)).sum().backward()
    by_element = seen[STATE].grad.abs().sum(0)
    assert (by_element[:4] > 0).all() and (by_element[4:] == 0).all()
    assert seen[INSTRUCTION].grad.abs().sum() > 0
    hidden = {**obs, STATE: obs[STATE] + 100 * (torch.arange(39) >= 4)}
    assert torch.equal(policy.act(hidden).actions_BHA, policy.act(obs).actions_BHA)
    assert not torch.equal(policy.act({**obs, CAMERA: obs[CAMERA].flip(1)}).actions_BHA, policy.act(obs).actions_BHA)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reads": {STATE: [39]}}, "use the family 'flow'"),
        ({"select": {STATE: [39]}}, "different elements of 39"),
        ({"select": {"observation.velocity": [0]}}, "observation.velocity"),
        ({"reads": {STATE: [39], CAMERA: [8, 8, 3]}}, CAMERA),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(PolicyError) as caught:
        build("small_vla", {**CONFIG, **changes})
    assert said in str(caught.value)
