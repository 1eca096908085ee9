"""The gateway process as it is shipped, with an actor process in front of it: what does not fit, and a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from buffer.reader import LogReader
from fleet.config import load_run
from fleet.identity import create_run_keys
from fleet.journal import read_journal
from fleet.runfolder import RunFolder
from fleet.server.registry import RegistryServer
from fleet.server.releases import ReleaseStore
from infra.enroll import enroll_here
from infra.run_config import RunConfig, write_catalogue

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
TEACH = {"operator": {"settings": {"expert": "toy", "mode": "demonstrate"}}, "actor": {"demonstrate": True, "realtime": False}}


class Shard:
    """A run folder with its registry and gateway process, and no learner."""

    def __init__(self, path):
        self.run = RunFolder.create(path)
        self.run.config.write_text((ROOT / "examples" / "toy.yaml").read_text())
        create_run_keys(self.run.keys)
        write_catalogue(self.run, load_run(self.run.config, {"run": RunConfig})["run"])
        self.registry = RegistryServer(self.run.registry)
        self.gateway = None

    def start(self):
        log = (self.run.logs / "gateway.log").open("ab")
        self.gateway = subprocess.Popen(
            [sys.executable, "-m", "buffer.main", str(self.run.path)], env=ENV, stderr=log, cwd=ROOT
        )
        wait_until((self.run.path / "gateway.json").exists)
        return self

    def join(self, robot_id, changes, *overrides):
        path = enroll_here(self.run, robot_id, changes)
        command = [sys.executable, "-m", "infra.cli", "join", str(path), *overrides]
        return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    def stored(self):
        """Keys of all fragments, and whether they have steps: only these get a line of their own in the journal."""
        reader = LogReader(self.run.buffer)
        records = [((r.robot_id, r.boot_id, r.seq), "steps" in r.tables) for r in reader.poll()]
        reader.close()
        return records

    def log_text(self):
        return (self.run.logs / "gateway.log").read_text()

    def stop(self):
        if self.gateway is not None:
            self.gateway.send_signal(signal.SIGTERM)
            self.gateway.wait(15)
        self.registry.stop()


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def shard(tmp_path):
    shard = Shard(tmp_path / "run")
    yield shard
    shard.stop()


@pytest.mark.timeout(120)
def test_a_robot_whose_spec_does_not_match_the_policy_is_refused_with_both_sides_named(shard):
    store = ReleaseStore(shard.run.releases, shard.run.keys)
    spec = {"reads": {"observation.images.wrist": [84, 84, 3]}, "conditions": {}, "action_dim": 2, "horizon": 8, "replay": []}
    policy = {"family": "mlp", "config": {}, "spec": spec}
    store.publish(save({"w": np.zeros(4, np.float32)}), algorithm="bc", step=1, metrics={}, policy=policy)
    actor = shard.start().join("arm-1", {})
    said, _ = actor.communicate(timeout=60)
    assert actor.returncode == 2
    assert "toy_two_joint" in said and "observation.images.wrist" in said and "Traceback" not in said


@pytest.mark.timeout(120)
def test_a_finished_demonstration_is_all_there(shard):
    actor = shard.start().join("teacher", TEACH, "actor.num_episodes=4")
    actor.communicate(timeout=60)
    assert actor.returncode == 0
    episodes = [line for line in read_journal(shard.run.logs / "gateway.jsonl") if line["kind"] == "episode"]
    assert [(e["source"], e["outcome"], e["operator_steps"]) for e in episodes] == [("demo", "success", 0)] * 4
    durable = sum(
        len(line["latency_ms"]) for line in read_journal(shard.run.logs / "gateway.jsonl") if line["kind"] == "durable"
    )
    assert durable == sum(e["length"] for e in episodes)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.timeout(180)
def test_a_full_disk_stops_acknowledgements_not_robots_and_nothing_is_lost(shard):
    buffer = shard.run.buffer
    with shard.run.config.open("a") as file:  # to the last byte: what a guard below the last gigabyte would not reach
        file.write("\nbuffer: {min_free_gb: 0, warn_free_gb: 0}\n")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(buffer)], check=True)
    try:
        ballast = buffer / "ballast"
        shard.start()
        ballast.write_bytes(b"\0" * (os.statvfs(buffer).f_bavail * os.statvfs(buffer).f_frsize - 150_000))
        actor = shard.join("teacher", TEACH, "actor.num_episodes=150", "actor.fragment_s=0.05", "actor.drain_s=60")
        wait_until(lambda: "cannot be stored" in shard.log_text(), 60)
        assert shard.gateway.poll() is None and actor.poll() is None
        ballast.unlink()
        said, _ = actor.communicate(timeout=90)
        assert actor.returncode == 0 and "stay in the spool" not in said
        records = shard.stored()
        stored = [key for key, _ in records]
        durable = [
            (x["robot"], x["boot"], x["seq"]) for x in read_journal(shard.run.logs / "gateway.jsonl") if x["kind"] == "durable"
        ]
        assert len(stored) == len(set(stored)) and set(durable) == {key for key, has_steps in records if has_steps}
        assert sorted(seq for _, _, seq in stored) == list(range(1, len(stored) + 1))
        closed = [x for x in read_journal(shard.run.logs / "gateway.jsonl") if x["kind"] == "episode"]
        assert len(closed) == 150
        assert json.loads((shard.run.path / "gateway.json").read_text())["endpoint"]
    finally:
        shard.gateway.send_signal(signal.SIGTERM)
        shard.gateway.wait(15)
        subprocess.run(["umount", str(buffer)], check=True)
