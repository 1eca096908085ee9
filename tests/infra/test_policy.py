"""``fleet policy``, and how a new run takes a policy and an instruction encoder from its run file."""

import json

import numpy as np
import pytest

from fleet.errors import ConfigError, LearnerError, PolicyError, RunFolderError
from fleet.runfolder import RunFolder
from infra.run_config import RunConfig, settle_pretrained, write_catalogue
from infra.up import open_run
from learner.main import PolicyConfig
from learner.pretrained import load_pretrained
from tests.command_line import answer
from tests.learner_toys import make_run, two_releases

TASKS = {"close": "close the drawer", "reach": "reach the target"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return two_releases(make_run(tmp_path_factory.mktemp("policy") / "first"))


def test_show_and_export_as_users_type_them(first, tmp_path):
    code, out, _ = answer("policy", "show", f"{first.path}@1")
    assert code == 0
    for said in ("family      mlp", "reads       observation.state (3,)", "config      width = 16"):
        assert said in out
    folder = tmp_path / "mine"
    code, out, _ = answer("policy", "export", first.path, folder, "--version", "1")
    assert code == 0 and out.startswith("release 1 (step 20, mlp) is in")
    assert load_pretrained(str(folder)).described["step"] == 20
    assert answer("policy", "show", folder)[0] == 0
    for arguments, said in (
        (("export", first.path, folder), "holds something"),
        (("show", tmp_path / "nothing"), "there is no policy at"),
        (("show", f"{first.path}@99"), "there is no release 99"),
        (("export", tmp_path / "nothing", tmp_path / "other"), "is not a folder"),
    ):
        code, _, err = answer("policy", *arguments)
        assert code == 2 and said in err


def run_file(tmp_path, policy):
    path = tmp_path / "second.yaml"
    path.write_text(f"run: {{tasks: {{reach: reach the target}}}}\npolicy: {json.dumps(policy)}\n")
    return path


def test_a_new_run_settles_where_its_policy_comes_from_before_anything_starts(first, tmp_path, monkeypatch):
    monkeypatch.chdir(first.path.parent)
    path = run_file(tmp_path, {"pretrained": "first"})
    run, tables = open_run(path, [], resume=False, runs=tmp_path / "runs")
    assert tables["policy"].pretrained == f"{first.path}@2" and run.path.name == "second"
    wrong = {
        "there is no policy at 'elsewhere'": {"pretrained": "elsewhere"},
        "policy.family = 'flow', but the policy in first has 'mlp'": {"pretrained": "first", "family": "flow"},
        "policy.config.width = 3, but the policy in first has 16": {"pretrained": "first", "config": {"width": 3}},
    }
    for said, policy in wrong.items():
        with pytest.raises(LearnerError) as caught:
            open_run(run_file(tmp_path, policy), [], resume=False, runs=tmp_path / "other")
        assert said in str(caught.value) and not (tmp_path / "other").exists()
    assert settle_pretrained({"policy": PolicyConfig()}) == {"policy": PolicyConfig()}


def reversed_text(instruction):
    return np.array([len(instruction), 1.0])


def endless(instruction):
    return np.array([np.inf])


def matrix(instruction):
    return np.zeros((2, 2))


def test_the_catalogue_says_who_encoded_it_and_refuses_another_encoder(tmp_path):
    run, own = RunFolder.create(tmp_path / "run"), f"{__name__}:reversed_text"
    tasks = write_catalogue(run, RunConfig(TASKS, instruction_encoder=own))
    assert tasks["close"] == {"instruction": "close the drawer", "embedding": [16.0, 1.0], "encoder": own}
    again = write_catalogue(run, RunConfig({**TASKS, "new": "press"}, instruction_encoder=own))
    assert again["close"] == tasks["close"] and again["new"]["embedding"] == [5.0, 1.0]
    before = (run.path / "tasks.json").read_bytes()
    with pytest.raises(ConfigError, match=r"encoder = 'hashed', but task 'close' was encoded by .*reversed_text"):
        write_catalogue(run, RunConfig(TASKS))
    assert (run.path / "tasks.json").read_bytes() == before
    again["by_hand"] = {"instruction": "x", "embedding": [1.0]}
    (run.path / "tasks.json").write_text(json.dumps(again))
    with pytest.raises(ConfigError, match=r"several sizes.*'by_hand': 1"):
        write_catalogue(run, RunConfig(TASKS, instruction_encoder=own))
    (run.path / "tasks.json").write_text("{")
    with pytest.raises(RunFolderError, match="no JSON"):
        write_catalogue(run, RunConfig(TASKS))


@pytest.mark.parametrize("encoder", ["endless", "matrix"])
def test_an_encoder_that_gives_something_else_is_refused(tmp_path, encoder):
    with pytest.raises(PolicyError, match=rf"{encoder}' makes float64.*of 'close the drawer'.*finite floats"):
        write_catalogue(RunFolder.create(tmp_path / "run"), RunConfig(TASKS, instruction_encoder=f"{__name__}:{encoder}"))
