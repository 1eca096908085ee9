"""`fleet up --address` on a Ray cluster of three nodes on this host; one of them dies while the run trains."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from fleet.identity import Credential
from infra.nodes import read_nodes
from infra.supervisor import recorded
from tests.faults.toy_run import ToyRun
from tests.ports import free_port

NODES = ("n0", "n1", "n2")


class RayNodes:
    """Raylets on this host, each a node of its own name, that ask for a token."""

    def __init__(self, folder):
        self.folder, self.short = folder, Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))  # Ray's sockets need a short path
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        self.env["RAY_raylet_start_wait_time_s"] = "120"  # on a busy machine its 30 s are not enough
        self.address = f"127.0.0.1:{free_port()}"
        self.processes = {}

    def start(self, name):
        head = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.short}", "--include-dashboard=false"]
        command = [Path(sys.executable).with_name("ray"), "start", "--block", f"--node-name={name}", "--num-cpus=4"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--disable-usage-stats"]
        command += head if not self.processes else [f"--address={self.address}"]
        with (self.folder / f"ray-{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                env=os.environ | self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while "--block" not in (self.folder / f"ray-{name}.log").read_text():  # it says so when the node has started
            assert self.processes[name].poll() is None, (self.folder / f"ray-{name}.log").read_text()
            time.sleep(0.1)

    def kill(self, name):
        """All of the node's processes that Ray knows of, at once."""
        top = psutil.Process(self.processes[name].pid)
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes[name].wait()

    def end(self):
        for name in reversed(self.processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.kill(name)
        shutil.rmtree(self.short, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    nodes = RayNodes(tmp_path)
    for name, value in nodes.env.items():
        monkeypatch.setenv(name, value)
    try:
        for name in NODES:
            nodes.start(name)
        yield nodes
    finally:
        nodes.end()


def nodes_of(run):
    return {rank["node"] for rank in run.status.get("ranks", ())}


@pytest.mark.timeout(600)
def test_a_node_dies_and_training_goes_on(cluster, tmp_path, tell, scale):
    (tmp_path / "mnt").mkdir()
    folder = f"{tmp_path}/{{node}}/{{run}}"
    overrides = [f"run.shared={tmp_path / 'mnt'}", "cluster.ranks=3", f"cluster.nodes=[{', '.join(NODES)}]"]
    overrides += [f"cluster.node_folder={folder}", "cluster.rank_timeout_s=30", "engine.name=ddp"]
    folders = {name: tmp_path / name / "toy" for name in NODES}
    run = ToyRun(tmp_path / "runs", overrides, num_robots=3, other_folders=folders.values())
    try:
        run.start(cluster.address)
        here, *others = sorted(NODES, key=lambda name: name in read_nodes(run.run))  # where `fleet up` is another node is not
        run.until(lambda: nodes_of(run) == set(NODES) and run.status["state"] == "training", 120)
        assert [rank["shard"] for rank in run.status["ranks"]] == [0, 1, 2]
        endpoints = {Credential.load(run.run.robots / f"{child.name}.yaml").endpoint for child in run.robots}
        assert endpoints == {entry.endpoint for entry in read_nodes(run.run).values()} and len(endpoints) == 3
        victim = next(name for name in others if name != NODES[0])  # not Ray's head
        reached = max(step for _, step in run.trained())
        pids = [recorded(folders[victim] / "logs" / "gateway.pid"), read_nodes(run.run)[victim].pid]
        killed = time.monotonic()
        cluster.kill(victim)
        for pid in pids:
            os.kill(pid, 9)
        run.until(lambda: nodes_of(run) == set(NODES) - {victim} and max(step for _, step in run.trained()) > reached + 5, 240)
        took = time.monotonic() - killed
        assert run.local.failure is None and all(child.num_restarts == 0 for child in run.robots)
        if scale >= 10:
            cluster.start(victim)
            run.until(lambda: nodes_of(run) == set(NODES) and run.status["state"] == "training", 240)
        folders.pop(here)
        run.folders = [run.run.path, *folders.values()]
        run.check_that_nothing_was_lost()  # also what was on the node that died is on its disk
        tell(f"a node of 3 was killed: training went on with 2 after {took:.1f} s")
    finally:
        run.local.stop()
    assert not any(recorded(path / "logs" / "gateway.pid") for path in run.folders)
