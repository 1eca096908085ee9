"""A run that begins with a policy of another run, of one of its releases, or of a folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load

from algorithms.policies.registry import build, describe, published
from fleet.errors import ConfigError, FleetError, LearnerError, PolicyError, ReleaseError
from fleet.server.releases import ReleaseStore
from fleet.spec import Feature, RobotSpec
from infra.policy_show import policy_lines
from learner.checkpoint import Checkpoints
from learner.main import PolicyConfig, check_learner_tables
from learner.policy import make_policy
from learner.pretrained import check_pretrained, export_policy, is_ours, load_pretrained, same_place, settled
from learner.ranks import RankPlace, Ranks
from learner.tensor_file import dumps
from tests.learner_toys import SMALL_POLICY, SPEC, MemorySource, make_run, make_tables, train_toy, two_releases

ALONE = Ranks(RankPlace())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return two_releases(make_run(tmp_path_factory.mktemp("pretrained") / "first"))


def weights_of(run, version):
    return load(ReleaseStore(run.releases).load(version))


def begin(where, specs=(SPEC,), instruction_dim=4, source=None, **table):
    source = source or MemorySource(100, seed=5)
    source.poll()
    return make_policy(PolicyConfig(pretrained=str(where), **table), None, list(specs), instruction_dim, source, ALONE)


def test_a_run_begins_with_the_newest_release_of_another_or_with_the_one_it_names(first, tmp_path):
    newest, described = begin(first.path)
    second, _ = begin(f"{first.path}@1")
    for policy, version in ((newest, 2), (second, 1)):
        for name, tensor in weights_of(first, version).items():
            assert torch.equal(policy.state_dict()[name], tensor), name
    assert described["family"] == "mlp" and described["config"]["width"] == SMALL_POLICY["width"]
    assert all(p.requires_grad for p in newest.parameters())


def test_an_exported_folder_stands_alone_and_a_run_goes_on_without_it(first, tmp_path):
    folder = tmp_path / "policy"
    assert export_policy(first, 1, folder).version == 1
    assert set(load((folder / "model.safetensors").read_bytes())) == set(weights_of(first, 1))
    facts = json.loads((folder / "policy.json").read_text())
    assert facts["family"] == "mlp" and facts["algorithm"] == "hg_dagger" and facts["step"] == 20
    run, tables = make_run(tmp_path / "second"), make_tables(start_steps=0, steps=3, checkpoint_every=3)
    tables["policy"] = PolicyConfig(pretrained=str(folder))
    tables["algorithm"].config |= {"ema_decay": 0.0, "start_learning_rate": 1e-9, "learning_rate": 1e-9}
    train_toy(run, tables)
    for name, tensor in weights_of(first, 1).items():  # it learns too slowly to be seen
        torch.testing.assert_close(weights_of(run, 1)[name], tensor, rtol=0, atol=1e-6)
    shutil.rmtree(folder)
    tables["learner"].steps = 6
    assert train_toy(run, tables).progress.step == 6
    assert Checkpoints(run.checkpoints).newest().meta["settings"]["policy"]["pretrained"] == str(folder)
    tables["policy"].pretrained = str(first.path)
    with pytest.raises(LearnerError, match=r"policy\.pretrained = .*, but the checkpoint of step 6 has"):
        train_toy(run, tables)


def test_statistics_stay_those_of_the_checkpoint_unless_fitted_anew(first):
    before = weights_of(first, 2)
    far = MemorySource(100, seed=9)
    kept, _ = begin(first.path, source=far)
    fitted, _ = begin(first.path, source=far, statistics="fit")
    assert torch.equal(kept.normaliser.mean_S, before["normaliser.mean_S"])
    assert not torch.equal(fitted.normaliser.mean_S, before["normaliser.mean_S"])
    assert torch.equal(fitted.head.weight, before["head.weight"])
    with pytest.raises(ConfigError, match=r"policy\.statistics = 'new'"):
        PolicyConfig(statistics="new").check()


def robot(shape=(3,), action=2, **more):
    features = {"observation.state": Feature("float32", shape), "action": Feature("float32", (action,)), **more}
    return RobotSpec("other", 20, features)


@pytest.mark.parametrize(
    ("table", "specs", "instruction_dim", "said"),
    [
        ({"family": "flow"}, [SPEC], 4, r"policy\.family = 'flow', but the policy in .* has 'mlp'"),
        ({"config": {"width": 99}}, [SPEC], 4, r"policy\.config\.width = 99, .* has 16"),
        ({"config": {"reads": ["observation.images.top"]}}, [SPEC], 4, r"policy\.config\.reads"),
        ({}, [robot((5,))], 4, r"'observation.state' = \(5,\).*of shape \(3,\)"),
        ({}, [SPEC, robot(action=3)], 4, r"'other' takes actions of shape \(3,\).*of shape \(2,\)"),
        ({}, [SPEC], 32, r"'instruction' of shape \(4,\).*32 elements"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(first, table, specs, instruction_dim, said):
    with pytest.raises(FleetError, match=said):
        begin(first.path, specs, instruction_dim, **table)


def test_same_settings_said_again_are_no_contradiction(first):
    for config in ({"width": 16, "reads": ["observation.state"]}, {"reads": {"observation.state": (3,)}}):
        assert begin(first.path, family="mlp", config=config)[1] == begin(first.path)[1]


def test_a_checkpoint_with_a_camera_does_not_fit_robots_without(tmp_path):
    top = "observation.images.top"
    config = {"reads": {"observation.state": [3], top: [16, 16, 3]}, "action_dim": 2, "instruction_dim": 4, "horizon": 4}
    policy = build("cnn", {**config, "width": 8})
    folder = tmp_path / "cnn"
    folder.mkdir()
    (folder / "policy.json").write_text(json.dumps({"format": "fleet-rl policy", **describe(policy)}))
    (folder / "model.safetensors").write_bytes(dumps(published(policy)))
    begin(folder, [robot(**{top: Feature("uint8", (16, 16, 3))})])
    for camera in ({}, {top: Feature("uint8", (84, 84, 3))}):
        with pytest.raises(PolicyError, match=rf"{top}.*\(16, 16, 3\)"):
            begin(folder, [robot(**camera)])


def test_places_without_a_whole_policy_are_refused(first, tmp_path):
    with pytest.raises(LearnerError, match="there is no policy at"):
        check_pretrained(PolicyConfig(pretrained=str(tmp_path / "nowhere")))
    with pytest.raises(ReleaseError, match="77"):
        load_pretrained(f"{first.path}@77")
    with pytest.raises(LearnerError, match="has no release"):
        load_pretrained(str(make_run(tmp_path / "new").path))
    folder = tmp_path / "policy"
    export_policy(first, 0, folder)
    with pytest.raises(LearnerError, match="holds something"):
        export_policy(first, 0, folder)
    data = (folder / "model.safetensors").read_bytes()
    for content, said in ((data[:-9], "weights of .* are damaged"), (data[:4], "are damaged")):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(LearnerError, match=said):
            load_pretrained(str(folder))
    (folder / "policy.json").write_text('{"format": "something else"}')
    with pytest.raises(LearnerError, match="not marked"):
        load_pretrained(str(folder))


def test_tables_of_a_pretrained_policy_need_no_family(first, monkeypatch):
    tables = make_tables()
    tables["policy"] = PolicyConfig(pretrained=str(first.path), config={"width": 16})
    check_learner_tables(tables)
    check_pretrained(tables["policy"])
    with pytest.raises(LearnerError, match=r"policy\.family = 'token'"):
        check_pretrained(PolicyConfig("token", pretrained=str(first.path)))
    monkeypatch.chdir(first.path.parent)
    assert settled("first@1") == f"{first.path}@1" and settled("first") == f"{first.path}@2"
    assert settled("hub/name") == "hub/name"
    assert is_ours("first") and is_ours("first@2") and not is_ours("hub/name")


def test_a_place_is_the_same_however_the_run_file_says_it():
    assert same_place("/a/runs/x@4", "runs/x") and same_place("/a/runs/x@4", "/a/runs/x@4") and same_place("", "")
    for now in ("", "runs/y", "runs/x@3", "/b/runs/x", "x/runs/x"):
        assert not same_place("/a/runs/x@4", now)
    assert not same_place("", "runs/x")


def test_what_show_prints(first):
    text = "\n".join(policy_lines(f"{first.path}@2"))
    for said in ("family      mlp", "release 2 of first-", "observation.state (3,)", "instruction (4,)", "width = 16", "mean"):
        assert said in text, said
    assert "4 actions of 2 dims; with log-probabilities" in text
