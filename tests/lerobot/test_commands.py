"""fleet data import and export as a user calls them."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.lerobot.helpers import ROOT, make_dataset, make_run, stored_steps

with_lerobot = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="lerobot is not installed here")
without_lerobot = pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="lerobot is installed here")


def fleet_data(*words):
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "infra.cli", "data", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=ROOT)


@with_lerobot
@pytest.mark.timeout(200)
def test_in_and_out_by_command(tmp_path):
    dataset, run = make_dataset(tmp_path / "My Demos", [4, 5, 6]), make_run(tmp_path / "run")
    done = fleet_data("import", run.path, dataset, "--success", "column", "--camera-map", "top=wrist")
    assert (done.returncode, done.stdout) == (0, "import-my-demos: 3 episodes, 15 steps are in the buffer, 15 of them new\n")
    assert len(stored_steps(run)) == 15
    out = tmp_path / "out"
    done = fleet_data("export", run.path, out, "--outcome", "success", "--source", "demo")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"{out}: 2 episodes, 10 frames",
        "  1 episodes left out: not asked for",
    ]
    info = json.loads((out / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"]) == (2, 10) and "observation.images.wrist" in info["features"]


@with_lerobot
@pytest.mark.timeout(100)
def test_wrong_words_are_explained(tmp_path):
    run = make_run(tmp_path / "run")
    for words, said in (
        (("import", run.path, tmp_path), "info.json"),
        (("export", run.path, tmp_path / "out"), "no finished episode"),
        (("export", run.path, tmp_path / "out", "--source", "robot"), "'policy', 'operator', 'script', 'demo'"),
        (("import", run.path, tmp_path, "--task-map", "reach"), "OLD=NEW"),
    ):
        done = fleet_data(*words)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@without_lerobot
def test_without_lerobot_help_works_and_the_remedy_is_said(tmp_path):
    assert "--camera-map" in fleet_data("import", "--help").stdout
    run = make_run(tmp_path / "run")
    (tmp_path / "set" / "meta").mkdir(parents=True)
    features = {"action": {"dtype": "float32", "shape": [2], "names": None}}
    info = {"codebase_version": "v3.0", "fps": 20, "features": features}
    (tmp_path / "set" / "meta" / "info.json").write_text(json.dumps(info))
    done = fleet_data("import", run.path, tmp_path / "set")
    assert done.returncode == 2 and "make lerobot" in done.stderr and "Traceback" not in done.stderr
