"""LeRobot's checkpoints in and out; what of a policy is frozen, and what of it is published."""

import json

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from algorithms.base import generator
from algorithms.policies.base import Chunk
from algorithms.policies.policy_lerobot import LerobotPolicy
from algorithms.policies.registry import build, describe, load_published, published, rebuild
from fleet.errors import PolicyError
from tests.algorithms.policies.cases import statistics_of
from tests.lerobot.tiny_policies import CAMERA, READS, A, B, H, lerobot_batch, observed, tiny

LORA = {"r": 2, "alpha": 8, "train": ["model.action_out_proj"]}


def trained(kind, **more):
    """With statistics, and every trained weight moved."""
    policy = build("lerobot", tiny(kind, **more))
    policy.set_statistics(statistics_of(policy.spec))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return policy


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("case", ["act", "diffusion", "smolvla", "smolvla, lora", "act, renamed"])
def test_an_export_acts_the_same_in_lerobot_and_comes_back(tmp_path, case):
    kind = case.split(",")[0]
    more = {"lora": LORA} if "lora" in case else {}
    if "renamed" in case:
        more = {"rename": {CAMERA: "observation.images.camera1"}}
    policy = trained(kind, **more)
    policy.export(tmp_path / "out")
    assert {"config.json", "model.safetensors", "policy_preprocessor.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    obs, drawn = observed(policy.spec), policy.noise(B, generator(1, 0))
    ours_BHA = policy.act(obs, drawn).actions_BHA

    config = PreTrainedConfig.from_pretrained(tmp_path / "out")
    theirs = get_policy_class(config.type).from_pretrained(tmp_path / "out")
    before, after = make_pre_post_processors(config, str(tmp_path / "out"))
    batch = before(lerobot_batch(obs))
    if kind == "diffusion":
        batch["observation.state"] = batch["observation.state"][:, None]
    noise = {} if kind == "act" else {"noise": drawn["start"]}
    torch.testing.assert_close(after(theirs.predict_action_chunk(batch, **noise)), ours_BHA, rtol=1e-4, atol=1e-5)

    again = LerobotPolicy.from_pretrained(
        str(tmp_path / "out"),
        {"reads": READS, "action_dim": A, **{key: value for key, value in more.items() if key == "rename"}},
    )
    assert again.family == "lerobot" and again.spec == policy.spec and not again.lacks_statistics
    torch.testing.assert_close(again.act(obs, drawn).actions_BHA, ours_BHA, rtol=1e-4, atol=1e-5)
    assert again.config["pretrained"] == ("" if kind != "smolvla" else str(tmp_path / "out"))
    robot = rebuild(json.loads(json.dumps(describe(again))))
    load_published(robot, published(again))
    torch.testing.assert_close(robot.act(obs).actions_BHA, again.act(obs).actions_BHA, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["whole", "expert alone", "lora"])
def test_frozen_parts_are_not_published(case):
    more = {"whole": {"policy": {"train_expert_only": False, "freeze_vision_encoder": False}}, "lora": {"lora": LORA}}
    policy = trained("smolvla", **more.get(case, {}))
    parameters = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    sent, kept = num_bytes(published(policy).values()), num_bytes(policy.state_dict().values())
    print(f"smolvla, {case}: {sent:,} of {kept:,} bytes published")
    vlm = num_bytes(policy.lerobot.model.vlm_with_expert.vlm.state_dict().values())
    trained_bytes = num_bytes(p for p in policy.parameters() if p.requires_grad)
    assert set(parameters).isdisjoint(published(policy))
    if case == "expert alone":
        assert policy.frozen == ("lerobot.model.vlm_with_expert.vlm",) and sent == kept - vlm
    if case == "lora":
        assert sent < 0.2 * kept and all(
            ".lora_" in n or "action_out_proj" in n for n, p in policy.named_parameters() if p.requires_grad
        )
    assert trained_bytes <= sent <= trained_bytes + 2000  # statistics, and the draw that acting starts from
    assert set(describe(policy)["frozen"]) == set(policy.frozen)


def test_robots_draw_the_same_frozen_weights():
    """Random ones, where nothing is loaded: by the seed of the config, whatever was drawn before."""
    torch.manual_seed(1)
    one = build("lerobot", tiny("smolvla"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = rebuild(describe(one))
    assert torch.equal(state, torch.get_rng_state())
    load_published(other, published(one))
    obs = observed(one.spec)
    assert torch.equal(one.act(obs).actions_BHA, other.act(obs).actions_BHA)
    strange = {**describe(one), "config": {**tiny("smolvla"), "seed": 5}}
    with pytest.raises(PolicyError, match="frozen module"):
        rebuild(strange)


def test_adapters_begin_at_nothing_and_learn(tmp_path):
    plain = trained("smolvla")
    plain.export(tmp_path / "base")
    where = str(tmp_path / "base")
    policy = LerobotPolicy.from_pretrained(where, {"reads": READS, "action_dim": A, "lora": LORA})
    obs, drawn = observed(plain.spec), plain.noise(B, generator(1, 0))
    torch.testing.assert_close(policy.act(obs, drawn).actions_BHA, plain.act(obs, drawn).actions_BHA, rtol=1e-4, atol=1e-5)
    policy.imitation_loss(obs, Chunk(torch.zeros(B, H, A)), torch.ones(B, H), drawn).sum().backward()
    touched = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(".lora_" in name or "action_out_proj" in name for name in touched)


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path):
    trained("act").export(tmp_path / "act")
    where, fits = str(tmp_path / "act"), {"reads": READS, "action_dim": A}
    state = {"observation.state": [6]}
    wrong = {
        "kind": ({**fits, "kind": "diffusion"}, "checkpoint of 'act'"),
        "camera missing": ({**fits, "reads": state}, CAMERA),
        "camera of another name": ({**fits, "reads": {**state, "observation.images.side": [32, 40, 3]}}, "images.side.*rename"),
        "images of another size": (
            {**fits, "reads": {**state, CAMERA: [64, 64, 3]}},
            rf"{CAMERA}.*\(3, 64, 64\).*\(3, 32, 40\)",
        ),
        "another state": ({**fits, "reads": {**READS, "observation.state": [7]}}, "observation.state"),
        "other actions": ({**fits, "action_dim": 5}, "action"),
        "other layers": ({**fits, "policy": {"dim_model": 64}}, "do not fit"),
        "unknown field": ({**fits, "policy": {"dim": 64}}, "'dim'"),
    }
    for config, said in wrong.values():
        with pytest.raises(PolicyError, match=said):
            LerobotPolicy.from_pretrained(where, config)
    for there in (tmp_path / "nothing", tmp_path):
        with pytest.raises(PolicyError, match="cannot be read"):
            LerobotPolicy.from_pretrained(str(there), fits)
    settings = json.loads((tmp_path / "act" / "config.json").read_text())
    (tmp_path / "act" / "config.json").write_text(json.dumps({**settings, "type": "vqbet"}))
    with pytest.raises(PolicyError):
        LerobotPolicy.from_pretrained(where, fits)


def test_vectors_of_another_size_need_new_statistics(tmp_path):
    """SmolVLA pads states and actions: its weights fit other robots, its statistics do not."""
    trained("smolvla").export(tmp_path / "out")
    policy = LerobotPolicy.from_pretrained(
        str(tmp_path / "out"), {"reads": {**READS, "observation.state": [7]}, "action_dim": 2}
    )
    assert policy.lacks_statistics == ["action", "observation.state"]
    policy.set_statistics(statistics_of(policy.spec))
    assert policy.lacks_statistics == [] and policy.act(observed(policy.spec)).actions_BHA.shape == (B, H, 2)
