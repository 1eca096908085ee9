"""`fleet up`, `fleet join`, `fleet sim`, `fleet status` as a user types them; `fleet up` is killed and gone on with."""

import json
import signal
import subprocess
import time

import pytest

from buffer.reader import LogReader
from fleet.journal import read_journal
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from infra.driver_status import read_status
from tests.command_line import ROOT, fleet

QUICK = ["learner.min_size_to_sample=50", "learner.start_steps=100", "learner.checkpoint_every=50", "learner.publish_every=25"]


def wait_until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


def stop(process):
    """As a service manager does it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    return said


def lines(run, name, kind):
    return [line for line in read_journal(run / "logs" / f"{name}.jsonl") if line["kind"] == kind]


@pytest.mark.timeout(240)
def test_a_killed_run_is_gone_on_with_and_its_robots_never_stop(tmp_path):
    run = tmp_path / "toy"
    up = fleet("up", ROOT / "examples" / "toy.yaml", "--runs", tmp_path, *QUICK)
    started = [up]
    try:
        wait_until((run / "gateway.json").exists, 60)
        teacher = tmp_path / "teacher.yaml"
        assert fleet("enroll", "teacher", "--run", run, "--out", teacher).wait(30) == 0
        taught = fleet("join", teacher, "actor.demonstrate=true", "operator.settings.mode=demonstrate", "actor.num_episodes=8")
        assert taught.wait(60) == 0, taught.communicate()
        sims = fleet("sim", run, "--num", 2)
        started.append(sims)
        wait_until(lambda: len(lines(run, "learner", "checkpoint")) >= 3, 90)
        up.kill()
        up.communicate()
        kept = lines(run, "learner", "checkpoint")[-1]["step"]
        refused = fleet("up", ROOT / "examples" / "toy.yaml", "--runs", tmp_path)
        assert "--resume" in refused.communicate(timeout=30)[0] and refused.returncode == 2
        more = ["evaluator.every=1", "evaluator.episodes=2", "cluster.simulators=1"]
        again = fleet("up", run, "--resume", *more, HOME=str(tmp_path))
        started.append(again)
        resumed = wait_until(lambda: lines(run, "learner", "resumed"), 90)
        assert resumed[0]["step"] >= kept
        before = len(lines(run, "gateway", "durable"))
        wait_until(lambda: len(lines(run, "gateway", "durable")) > before + 6, 60)
        status = fleet("status", run, "--json")
        shown = json.loads(status.communicate(timeout=30)[0])
        assert {"sim-00", "sim-01"} <= set(shown["robots"]) and shown["learner"]["step"] > kept
        assert 1 <= shown["release"] <= ReleaseStore(run / "releases").newest()
        wait_until(lambda: lines(run, "evaluator", "evaluated"), 90)
        wait_until(lambda: any(line["robot"].startswith("sim-ray") for line in lines(run, "gateway", "durable")), 90)
        learner = read_status(RunFolder.open(run))
        assert learner["simulators"] == 1 and learner["evaluators"][0]["tested"] >= 1
        end = fleet("down", run)
        ended, _ = end.communicate(timeout=120)
        assert end.returncode == 0 and "the learner's checkpoint" in ended and "--resume" in ended
    finally:
        said = [stop(process) for process in reversed(started)]
    assert "--resume" in said[0]  # the last one says how to go on
    assert again.returncode == 0 and lines(run, "learner", "checkpoint")[-1]["step"] > resumed[0]["step"]
    assert read_status(RunFolder.open(run))["state"] == "stopped"
    assert str(run) not in subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    restarts = [line for line in (run / "logs").glob("sim-*.log") if "Traceback" in line.read_text()]
    assert restarts == []
    reader = LogReader(run / "buffer")
    stored = [(r.robot_id, r.boot_id, r.seq) for r in reader.poll()]
    reader.close()
    acknowledged = {(line["robot"], line["boot"], line["seq"]) for line in lines(run, "gateway", "durable")}
    assert acknowledged <= set(stored) and len(stored) == len(set(stored))
    assert {robot: len({b for r, b, _ in stored if r == robot}) for robot in ("sim-00", "sim-01")} == {"sim-00": 1, "sim-01": 1}


@pytest.mark.timeout(120)
def test_ranks_that_no_node_can_hold_are_told_and_robots_are_served_further(tmp_path):
    impossible = "cluster.gpus_per_rank=1"
    run = tmp_path / "toy"
    up = fleet("up", ROOT / "examples" / "toy.yaml", "--runs", tmp_path, impossible, CUDA_VISIBLE_DEVICES="")
    try:
        wait_until(lambda: (run / "learner-status.json").exists() and read_status(RunFolder(run))["state"] == "failed", 90)
        assert fleet("enroll", "teacher", "--run", run, "--out", tmp_path / "teacher.yaml").wait(30) == 0
        shows = "operator.settings.mode=demonstrate"
        taught = fleet("join", tmp_path / "teacher.yaml", "actor.demonstrate=true", shows, "actor.num_episodes=1")
        assert taught.wait(60) == 0, taught.communicate()
    finally:
        said = stop(up)
    assert impossible.partition("=")[0] in said and "0 GPUs" in said and "rule:" in said and "remedy:" in said
    assert said.count("the learner cannot go on") == 1 and "Traceback" not in said
    assert len(lines(run, "gateway", "durable")) > 0
