"""Losses, processors and chunks are LeRobot's own, number for number."""

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

import torch
from lerobot.policies.factory import make_pre_post_processors

from algorithms.base import generator
from algorithms.policies.base import Chunk
from algorithms.policies.kinds_lerobot import KINDS
from algorithms.policies.processors_lerobot import as_numpy
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from algorithms.policies.text import texts_in
from fleet.errors import PolicyError
from tests.algorithms.policies.cases import statistics_of
from tests.lerobot.tiny_policies import CAMERA, READS, VECTORS, WRIST, A, B, H, lerobot_batch, observed, tiny

KIND_NAMES = ("act", "diffusion", "smolvla")


def made(kind, **more):
    policy = build("lerobot", tiny(kind, **more))
    policy.set_statistics(statistics_of(policy.spec))
    return policy


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_actions_are_those_of_lerobots_own_pipeline(kind):
    """Its processors with our statistics as a dataset's, its policy, on a batch as its datasets give it."""
    policy = made(kind)
    obs, drawn = observed(policy.spec), policy.noise(B, generator(1, 0))
    theirs = policy.lerobot
    stats = as_numpy(policy._processors.statistics())
    before, after = make_pre_post_processors(theirs.config, dataset_stats=stats)
    batch = before(lerobot_batch(obs))
    if kind == "diffusion":
        batch["observation.state"] = batch["observation.state"][:, None]  # a history of one
    more = {} if kind == "act" else {"noise": drawn["start"]}
    expected_BHA = after(theirs.predict_action_chunk(batch, **more))
    torch.testing.assert_close(policy.act(obs, drawn).actions_BHA, expected_BHA, rtol=1e-5, atol=1e-5)
    assert expected_BHA.std() > 0.01


@pytest.mark.parametrize("num_valid", [H, 2])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_the_loss_is_lerobots_forward(kind, num_valid, monkeypatch):
    """Where LeRobot draws what we drew, our loss of a row is its loss of a batch of that row."""
    settings = {"act": {"kl_weight": 0.5}, "diffusion": {"do_mask_loss_for_padding": True}}
    policy = made(kind, policy=settings.get(kind, {}))
    theirs, obs = policy.lerobot, {name: value[:1] for name, value in observed(policy.spec).items()}
    drawn, valid_BH = policy.noise(1, generator(2, 0)), torch.arange(H)[None] < num_valid
    actions_BHA = torch.randn(1, H, A, generator=generator(3, 0)) * valid_BH[..., None]
    stats = as_numpy(policy._processors.statistics())
    batch = make_pre_post_processors(theirs.config, dataset_stats=stats)[0]({**lerobot_batch(obs), "action": actions_BHA})
    batch["action_is_pad"] = ~valid_BH
    loss_B = policy.imitation_loss(obs, Chunk(actions_BHA), valid_BH.float(), drawn)
    if kind == "act":
        monkeypatch.setattr(torch, "randn_like", lambda value: drawn["latent"])
        expected = theirs.train()(batch)[0]
    elif kind == "diffusion":
        batch["observation.state"] = batch["observation.state"][:, None]
        monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn["start"])
        monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn["step"])
        expected = theirs(batch)[0]
    else:
        expected = theirs(batch, noise=drawn["start"], time=drawn["time"])[0]
    torch.testing.assert_close(loss_B.mean(), expected, rtol=1e-5, atol=1e-6)


def test_padded_rows_count_as_lerobot_counts_them():
    policy = made("smolvla")
    drawn, obs, actions_BHA = policy.noise(B, generator(2, 0)), observed(policy.spec), torch.randn(B, H, A)
    mask_BH = (torch.arange(H) < torch.tensor([4, 1, 0])[:, None]).float()
    batch = policy._processors.before(obs, actions_BHA * mask_BH[..., None])
    batch["action_is_pad"] = mask_BH == 0
    expected_B = policy.lerobot(batch, noise=drawn["start"], time=drawn["time"], reduction="none")[0]
    torch.testing.assert_close(policy.imitation_loss(obs, Chunk(actions_BHA), mask_BH, drawn), expected_B)
    assert (expected_B > 0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("act", {"dropout": 0.5}), ("diffusion", {"use_group_norm": False, "crop_shape": [30, 38], "crop_is_random": True})],
)
def test_training_draws_nothing_but_its_noise(kind, settings):
    """No dropout, no random crops, no batch statistics, whatever the settings say."""
    policy = made(kind, policy=settings)
    obs, drawn, chunk = observed(policy.spec), policy.noise(B, generator(1, 0)), Chunk(torch.ones(B, H, A))
    one_B, before = policy.imitation_loss(obs, chunk, torch.ones(B, H), drawn), torch.get_rng_state()
    trained_B = policy.train().imitation_loss(obs, chunk, torch.ones(B, H), drawn)
    assert torch.equal(one_B, trained_B) and torch.equal(before, torch.get_rng_state())


def test_times_of_the_flow_are_drawn_as_lerobot_draws_them():
    policy = made("smolvla")
    ours = policy.noise(20_000, generator(4, 0))["time"]
    torch.manual_seed(0)
    theirs = policy.lerobot.model.sample_time(20_000, "cpu")
    levels = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), rtol=0, atol=0.015)
    assert ours.min() >= 0.001 and ours.max() <= 1.0


def test_the_instruction_reaches_smolvla():
    policy = made("smolvla")
    obs = observed(policy.spec)
    other = {**obs, "instruction_text": obs["instruction_text"].flip(0)}
    assert len(set(texts_in(obs["instruction_text"]))) == B
    changed = (policy.act(obs).actions_BHA - policy.act(other).actions_BHA).abs().amax((1, 2))
    assert changed[0] > 1e-5 and changed[-1] > 1e-5


@pytest.mark.parametrize("kind", ["act", "diffusion"])
def test_what_never_moves_is_not_blown_up(kind):
    """LeRobot divides by a deviation of 0, or by a range of 0, with 1e-8 added."""
    policy = made(kind, reads=VECTORS)
    known = statistics_of(policy.spec)
    known["observation.state"] = Statistics.of(np.full((50, 6), 3.0))
    known["action"] = Statistics.of(np.full((50, A), 0.5))
    policy.set_statistics(known)
    obs = observed(policy.spec)
    obs["observation.state"][:] = 3.01
    batch = policy._processors.before(obs, torch.full((B, H, A), 0.51))
    assert batch["observation.state"].abs().max() < 1.5 and batch["action"].abs().max() < 0.02
    torch.testing.assert_close(policy._processors.after(batch["action"]), torch.full((B, H, A), 0.51))


def test_several_cameras_and_odd_names():
    reads = {**READS, WRIST: [32, 40, 3]}
    rename = {CAMERA: "observation.images.camera1", WRIST: "observation.images.camera2"}
    policy = made("diffusion", reads=reads, rename=rename)  # ACT takes its cameras in any order
    assert set(policy.lerobot.config.image_features) == set(rename.values())
    obs = observed(policy.spec)
    swapped = {**obs, CAMERA: obs[WRIST], WRIST: obs[CAMERA]}
    assert (policy.act(obs).actions_BHA - policy.act(swapped).actions_BHA).abs().max() > 1e-6


WRONG = {
    "an unknown kind": ({"kind": "acts"}, "did you mean 'act'"),
    "an unknown field": ({"policy": {"dim_modle": 3}}, "dim_model"),
    "a field of ours": ({"policy": {"device": "cuda"}}, "device"),
    "a value": ({"policy": {"chunk_size": "many"}}, "chunk_size"),
    "a history": ({"kind": "diffusion", "policy": {"n_obs_steps": 2}}, "n_obs_steps"),
    "noise on the way": ({"kind": "diffusion", "policy": {"noise_scheduler_type": "DDPM"}}, "DDIM"),
    "LeRobot's own rule": ({"kind": "diffusion", "policy": {"horizon": 6}}, "horizon"),
    "a feature": ({"reads": {**READS, "observation.gripper": [1]}}, "observation.gripper"),
    "a state in two axes": ({"reads": {**READS, "observation.state": [2, 3]}}, "observation.state"),
    "no state": ({"reads": {CAMERA: [32, 32, 3]}}, "observation.state"),
    "no camera": ({"reads": {"observation.state": [6]}}, "at least one image"),
    "a name": ({"rename": {"observation.images.side": "observation.images.x"}}, "observation.images.side"),
    "a normalisation": ({"policy": {"normalization_mapping": {"STATE": "QUANTILE10"}}}, "QUANTILE10"),
    "adapters of ACT": ({"lora": {"r": 2}}, "targets"),
    "a setting of adapters": ({"lora": {"rank": 2}}, "rank"),
    "a vlm that is not here": ({"kind": "smolvla", "policy": {"vlm_model_name": "/nowhere/at/all"}}, "nowhere"),
    "a compiled model": ({"kind": "smolvla", "policy": {"compile_model": True}}, "compile_model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_by_name(name):
    change, said = WRONG[name]
    config = {**least(change.get("kind", "act")), **change}
    with pytest.raises(PolicyError, match=said):
        build("lerobot", config)


def least(kind):
    return {"reads": READS, "action_dim": A, "kind": kind}


def test_wrong_observations_are_refused_by_name():
    policy = made("smolvla")
    obs = observed(policy.spec)
    for name, value in ((CAMERA, torch.zeros(B, 40, 32, 3, dtype=torch.uint8)), ("observation.state", torch.zeros(B, 5))):
        with pytest.raises(PolicyError, match=name):
            policy.act({**obs, name: value})
        with pytest.raises(PolicyError, match=f"{name}' is missing"):
            policy.act({key: kept for key, kept in obs.items() if key != name})
    with pytest.raises(PolicyError, match="instruction_text"):
        policy.act({key: kept for key, kept in obs.items() if key != "instruction_text"})
    with pytest.raises(PolicyError, match="noise"):
        policy.imitation_loss(obs, Chunk(torch.zeros(B, H, A)), torch.ones(B, H))


def test_every_kind_is_one_of_lerobots():
    from lerobot.configs import PreTrainedConfig

    assert set(KINDS) <= set(PreTrainedConfig.get_known_choices())
