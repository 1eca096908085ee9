"""Processes of the learner are killed at any instant; what is on disk stays whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.numpy import load

from fleet.errors import LearnerError
from fleet.identity import create_run_keys
from fleet.journal import read_journal
from fleet.releases import parse_manifest
from fleet.server.releases import ReleaseStore
from learner.checkpoint import Checkpoints
from tests.learner_toys import MemorySource, make_run, make_tables, state_of, train_toy

ROOT = Path(__file__).resolve().parents[2]
SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))

PUBLISH_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save
from fleet.server.releases import ReleaseStore

folder, start = Path(sys.argv[1]), int(sys.argv[2])
store = ReleaseStore(folder / "releases", folder / "keys")
policy = {"family": "mlp", "config": {}, "spec": {}}
for step in range(start, start + 10**6):
    weights = {"step": np.array([step]), "w": np.full(40_000, step, np.float32), "same": np.zeros(40_000, np.float32)}
    version = store.publish(save(weights), algorithm="bc", step=step, metrics={}, policy=policy).version
    print(version, step, flush=True)
"""

TRAIN_FOR_EVER = """
import sys
from pathlib import Path
from fleet.runfolder import RunFolder
from tests.learner_toys import MemorySource, make_tables, train_toy

run = RunFolder.open(Path(sys.argv[1]))
print("begin", flush=True)
train_toy(run, make_tables(steps=int(sys.argv[2]), publish_every=3, checkpoint_every=2), MemorySource(1000))
"""


def start(script, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True, env=env)


def kill(process):
    process.send_signal(signal.SIGKILL)
    told = process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    return told


def test_kill_during_publish_leaves_the_newest_readable_and_no_number_twice(tmp_path):
    create_run_keys(tmp_path / "keys")
    public = (tmp_path / "keys" / "release.pub").read_text().strip()
    reader, rng, told = ReleaseStore(tmp_path / "releases"), random.Random(0), {}
    for attempt in range(8 * SCALE):
        process = start(PUBLISH_FOR_EVER, tmp_path, 1000 * attempt)
        first = process.stdout.readline()
        time.sleep(rng.random() * 0.05)
        for line in [first, *kill(process)]:
            version, step = map(int, line.split())
            assert version not in told, "a version was given twice"
            told[version] = step
        newest = reader.newest()
        assert newest is not None and newest >= max(told)
        for version in reader.versions():
            manifest = parse_manifest(reader.read("manifest", str(version)), public)
            weights = load(reader.load(version))
            assert int(weights["step"][0]) == manifest.step == told.setdefault(version, manifest.step)
            assert (weights["w"] == manifest.step).all()
        # The newest is deleted: its number is gone for good.
        (tmp_path / "releases" / "manifests" / f"{newest}.json").unlink()
        assert reader.newest() != newest
    assert len(told) > 8 * SCALE


def test_kill_of_a_training_process_at_any_instant_resumes_to_the_same_bits(tmp_path):
    straight = state_of(train_toy(make_run(tmp_path / "straight"), make_tables(steps=60, publish_every=3, checkpoint_every=2)))
    run, rng = make_run(tmp_path / "run"), random.Random(1)
    for _ in range(2 * SCALE):
        process = start(TRAIN_FOR_EVER, run.path, 60)
        process.stdout.readline()
        time.sleep(rng.random() * 0.5)
        kill(process)
    loop = train_toy(run, make_tables(steps=60, publish_every=3, checkpoint_every=2))
    resumed = state_of(loop)
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)
    store = ReleaseStore(run.releases)
    steps = [store.manifest(v).step for v in store.versions()]
    assert steps == sorted(set(steps)) and steps[-1] == 60


def test_a_checkpoint_cut_in_half_costs_only_what_came_after_the_one_before(tmp_path):
    straight = state_of(train_toy(make_run(tmp_path / "straight"), make_tables(steps=60)))
    run = make_run(tmp_path / "run")
    for steps in (20, 40):
        train_toy(run, make_tables(steps=steps))
    victim = run.checkpoints / "0000000040" / "tensors.safetensors"
    os.truncate(victim, victim.stat().st_size // 2)
    resumed = state_of(train_toy(run, make_tables(steps=60)))
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)
    line = next(line for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == "resumed" and line["passed_over"])
    assert line["step"] == 20 and "0000000040" in line["passed_over"][0]


def test_a_second_learner_is_refused_until_the_first_is_dead(tmp_path):
    from fleet.errors import RunFolderError
    from fleet.files import FolderLock

    run = make_run(tmp_path / "run")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom fleet.runfolder import RunFolder\n"
        "from learner.train import train\nfrom tests.learner_toys import make_tables\n"
        "def say(progress): print(progress.waiting, flush=True)\n"
        "train(RunFolder.open(Path(sys.argv[1])), make_tables(), stop=lambda: False, report=say)"
    )
    process = start(script, run.path)
    try:
        assert "waits for data" in process.stdout.readline()
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"):
            FolderLock(run.checkpoints, "run's checkpoints")
    finally:
        kill(process)
    FolderLock(run.checkpoints, "run's checkpoints").release()


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    from learner.cluster import start_ray, stop_ray

    start_ray(token=tmp_path_factory.mktemp("keys") / "ray.token", num_cpus=2)
    yield
    stop_ray()


def learner_of(run, tables, **options):
    from learner.cluster import LearnerHandle, nodes
    from learner.placement import plan

    here = nodes()[0]
    return LearnerHandle(tables, lambda: plan(nodes(), tables["cluster"], "cpu"), {here.name: run.path}, **options)


def wait_for(handle, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = handle.poll()
        if condition(status):
            return status
        time.sleep(0.05)
    raise AssertionError(f"timed out at {handle.status}")


def fill(run):
    from tests.learner.test_train import fill as fill_log

    fill_log(run)


@pytest.mark.timeout(180)
def test_a_killed_learner_comes_back_from_its_checkpoint(tmp_path, ray_cluster):
    run = make_run(tmp_path / "run")
    fill(run)
    handle = learner_of(run, make_tables(steps=10**6, checkpoint_every=20, publish_every=50))
    try:
        first = wait_for(handle, lambda s: s.progress.get("step", 0) > 100)
        victim = first.pid
        assert victim == int((run.logs / "learner.pid").read_text()) and psutil.pid_exists(victim)
        os.kill(victim, signal.SIGKILL)
        kept = Checkpoints(run.checkpoints).steps()[-1]
        back = wait_for(handle, lambda s: s.pid not in (0, victim) and s.progress.get("step", 0) > kept)
        assert back.restarts == 1 and "process ended" in back.last_error
        # The instant between the kill and our look at the disk may hold one more checkpoint.
        resumed = [line["step"] for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == "resumed"]
        assert len(resumed) == 1 and resumed[0] >= kept > 0
    finally:
        last = handle.stop()
    assert last.done and Checkpoints(run.checkpoints).steps()[-1] == last.progress["step"]
    store = ReleaseStore(run.releases)
    steps = [store.manifest(v).step for v in store.versions()]
    assert steps == sorted(set(steps))
    assert not psutil.pid_exists(back.pid) or psutil.Process(back.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(180)
def test_a_learner_that_cannot_run_stops_with_its_error(tmp_path, ray_cluster):
    from learner.cluster import RestartRule

    run = make_run(tmp_path / "run")
    fill(run)
    (run.keys / "server.key").unlink()
    tables = make_tables(steps=40)
    train_toy(run, tables, MemorySource(100))
    for step in Checkpoints(run.checkpoints).steps():
        (run.checkpoints / f"{step:010d}" / "meta.json").write_text("{}")
    handle = learner_of(run, tables, rule=RestartRule(max_failures=2, first_s=0.1))
    with pytest.raises(LearnerError, match=r"failed 2 times at or before step 0.*damaged"):
        wait_for(handle, lambda s: s.done)
    assert handle.status.done and handle.status.restarts == 1
    tables["algorithm"].name = "no_such"
    other = make_run(tmp_path / "other")
    fill(other)
    handle = learner_of(other, tables)
    from fleet.errors import ConfigError

    with pytest.raises(ConfigError, match="no_such"):
        wait_for(handle, lambda s: s.done)


def test_the_restart_rule_doubles_its_pause_and_ends_a_crash_loop():
    from learner.restarts import RestartRule

    rule = RestartRule(max_failures=5, window_s=60, first_s=0.5, longest_s=3)
    assert [rule.failed(t) for t in (0, 1, 2, 3, 4)] == [0.5, 1, 2, 3, None]
    rule = RestartRule(max_failures=5, window_s=60, first_s=0.5, longest_s=3)
    assert [rule.failed(t) for t in range(0, 600, 20)][-1] == 2  # three a minute are no crash loop
    rule = RestartRule(max_failures=5, window_s=60, first_s=0.5, longest_s=3)
    assert [rule.failed(t, got_further=t % 4 == 0) for t in range(9)] == [0.5, 1, 2, 3, 0.5, 1, 2, 3, 0.5]
