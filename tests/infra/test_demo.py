"""`fleet demo` on the toy robot: the whole way to a report, and a Ctrl-C in the middle of it."""

import json
import os
import signal
import subprocess
import time

import pytest

from fleet.journal import read_journal
from fleet.server.releases import ReleaseStore
from tests.command_line import ROOT, fleet

SMALL = [
    "demo.num_robots=2",
    "demo.demonstrations=4",
    "demo.episodes=10",
    "demo.curve_releases=1",
    "demo.curve_episodes=5",
    "learner.min_size_to_sample=50",
    "learner.start_steps=100",
]


def lines(run, name, kind):
    return [line for line in read_journal(run / "logs" / f"{name}.jsonl") if line["kind"] == kind]


def leftovers(run):
    """Processes that still work on this run."""
    shown = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if str(run) in line]


@pytest.mark.timeout(180)
def test_the_demo_ends_with_tested_releases_and_a_report(tmp_path):
    run = tmp_path / "run"
    demo = fleet(
        "demo", run, "--config", ROOT / "examples" / "toy.yaml", *SMALL, "learner.steps=400", "learner.publish_every=50"
    )
    said, _ = demo.communicate(timeout=170)
    assert demo.returncode == 0, said
    assert "(start)" in said and "(final)" in said and "index.html" in said
    numbers = json.loads((run / "report" / "report.json").read_text())
    assert numbers["counts"]["updates"] == 400
    assert {entry["task"] for entry in numbers["before_after"]} == {"reach", "mirror", "all tasks"}
    for chain in ("durable", "sampleable", "loaded"):
        assert numbers["latencies_ms"][chain]["num"] > 0
    assert {line["robot"] for line in lines(run, "gateway", "episode")} >= {"demonstrator"}
    assert leftovers(run) == []


@pytest.mark.timeout(180)
def test_ctrl_c_leaves_a_run_that_up_goes_on_with(tmp_path):
    run = tmp_path / "run"
    demo = fleet("demo", run, "--config", ROOT / "examples" / "toy.yaml", *SMALL, "learner.publish_every=25")
    try:
        deadline = time.monotonic() + 90
        while len(lines(run, "learner", "published")) < 4:
            assert time.monotonic() < deadline and demo.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0 and f"fleet up {run} --resume" in said
    assert leftovers(run) == []
    kept = lines(run, "learner", "checkpoint")[-1]["step"]
    released = ReleaseStore(run / "releases").newest()
    up = fleet("up", run, "--resume")
    sims = fleet("sim", run, "--num", 2)
    try:
        deadline = time.monotonic() + 90
        while ReleaseStore(run / "releases").newest() <= released:
            assert time.monotonic() < deadline and up.poll() is None and sims.poll() is None
            time.sleep(0.1)
        (resumed,) = lines(run, "learner", "resumed")
        assert resumed["step"] == kept and resumed["version"] == released
    finally:
        for process in (sims, up):
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=60)
    assert leftovers(run) == []
