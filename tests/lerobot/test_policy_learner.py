"""The fleet's learner trains a LeRobot policy on a log; what it publishes acts on a robot and in lerobot."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from safetensors.torch import load

from actors.policy_inference import ActingPolicy
from algorithms.policies.registry import build, load_published, rebuild
from buffer.ingest import Ingest
from buffer.log import Log
from fleet.errors import PolicyError
from fleet.robot import Source
from fleet.server.releases import ReleaseStore
from learner.checkpoint import Checkpoints
from learner.pretrained import export_policy
from learner.train import train
from tests.buffer.fragments import make_spec, message
from tests.learner_toys import make_run, make_tables
from tests.lerobot.tiny_policies import tiny

SPEC = make_spec(image="raw")
READS = {"observation.state": [3], "observation.images.top": [16, 16, 3]}


def fill(run):
    log = Log(run.buffer)
    ingest = Ingest(log)
    seq = ingest.admit("r1", "b" * 16, SPEC)
    for i in range(4):
        fields = message(
            "r1",
            "b" * 16,
            seq + 1 + i,
            i,
            0,
            [Source.DEMO] * 20,
            spec=SPEC,
            task=("left", "right")[i % 2],
            opened=True,
            closed=True,
        )
        ingest.offer("r1", *fields)
    ingest.commit()
    log.close()


def names_in(value, path=""):
    if isinstance(value, dict):
        return [name for key, inner in value.items() for name in names_in(inner, f"{path}/{key}")]
    return [path]


def tables_of(config, steps=20, **policy):
    tables = make_tables(steps=steps, start_steps=10, publish_every=10, checkpoint_every=10)
    tables["policy"] = dataclasses.replace(tables["policy"], family="lerobot", config=config, **policy)
    tables["algorithm"].config = {"batch_size": 8, "start_steps": 10}
    return tables


def test_smolvla_is_trained_published_resumed_and_exported(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run)
    config = {name: value for name, value in tiny("smolvla").items() if name in ("kind", "policy")}
    progress = train(run, tables_of(config), stop=lambda: False, report=lambda seen: None)
    assert progress.step == 20 and np.isfinite(progress.stats["loss"])
    progress = train(run, tables_of(config, steps=30), stop=lambda: False, report=lambda seen: None)
    assert progress.step == 30

    store = ReleaseStore(run.releases)
    newest = store.newest()
    manifest, weights = store.manifest(newest), load(store.load(newest))
    vlm = "lerobot.model.vlm_with_expert.vlm"
    assert list(manifest.policy["frozen"]) == [vlm] and manifest.policy["config"]["reads"] == READS
    assert not any(name.startswith(f"{vlm}.") for name in weights)
    kept = names_in(Checkpoints(run.checkpoints).load(30).state)
    assert any("lm_expert" in name for name in kept) and not any(f"{vlm}." in name for name in kept)
    policy = rebuild(manifest.policy)
    size = sum(t.numel() * t.element_size() for t in policy.state_dict().values())
    print(f"tiny SmolVLA: {sum(t.numel() * t.element_size() for t in weights.values()):,} of {size:,} bytes published")

    load_published(policy, weights)
    acting = ActingPolicy(policy, SPEC)
    acting.self_test()
    obs = {"observation.state": np.ones(3, np.float32), "observation.images.top": np.full((16, 16, 3), 50, np.uint8)}
    left, right = (acting(obs, np.zeros(4), instruction=text).actions_HA for text in ("left", "right"))
    assert left.shape == (4, 2) and np.abs(left - right).max() > 1e-6
    with pytest.raises(PolicyError, match="bytes"):
        acting(obs, np.zeros(4))
    first = rebuild(store.manifest(1).policy)
    load_published(first, load(store.load(1)))
    assert not torch.equal(first.lerobot.model.action_out_proj.weight, policy.lerobot.model.action_out_proj.weight)

    export_policy(run, 0, tmp_path / "out")
    kind = PreTrainedConfig.from_pretrained(tmp_path / "out").type
    theirs = get_policy_class(kind).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs.model.action_out_proj.weight, policy.lerobot.model.action_out_proj.weight)


def test_a_run_begins_with_a_lerobot_checkpoint(tmp_path):
    base = build("lerobot", {**tiny("smolvla"), "reads": READS, "action_dim": 2})
    run = make_run(tmp_path / "run")
    fill(run)
    base.export(tmp_path / "base")
    config = {"policy": {"num_steps": 3}, "lora": {"r": 2, "alpha": 4}}
    where = str(tmp_path / "base")
    train(run, tables_of(config, pretrained=where, statistics="fit"), stop=lambda: False, report=lambda seen: None)
    resumed = tables_of(config, steps=30, pretrained=where, statistics="fit")
    assert train(run, resumed, stop=lambda: False, report=lambda seen: None).step == 30
    manifest = ReleaseStore(run.releases).manifest(1)
    policy = rebuild(manifest.policy)
    assert policy.lerobot.config.num_steps == 3 and manifest.policy["config"]["pretrained"] == where
    same = policy.lerobot.model.vlm_with_expert.lm_expert.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(same, base.lerobot.model.vlm_with_expert.lm_expert.layers[0].self_attn.q_proj.weight)


def test_a_checkpoint_for_other_sizes_wants_statistics_of_this_run(tmp_path):
    base = build("lerobot", {**tiny("smolvla"), "reads": {**READS, "observation.state": [5]}, "action_dim": 2})
    base.export(tmp_path / "base")
    run = make_run(tmp_path / "run")
    fill(run)
    with pytest.raises(PolicyError, match=r"no statistics that fit \['observation.state'\].*statistics=fit"):
        train(run, tables_of({}, pretrained=str(tmp_path / "base")), stop=lambda: False, report=lambda seen: None)
