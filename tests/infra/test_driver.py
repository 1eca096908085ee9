"""The driver and its plans where nodes or the whole cluster are missing: real files and processes, without Ray."""

import json
import subprocess
import sys
import threading
import time

import pytest

import infra.driver_nodes
from fleet.errors import ConfigError
from fleet.runfolder import RunFolder
from infra.driver import NO_CLUSTER
from infra.driver_nodes import NodeKeeper
from infra.driver_status import read_status
from infra.run_config import load_plain_tables
from infra.supervisor import record
from learner.placement import Node
from tests.command_line import ENV, ROOT

HERE, OTHER = Node("1", "a", "127.0.0.1", 4, 0, here=True), Node("2", "b", "127.0.0.1", 4, 0)


def make_run(folder, cluster="{}"):
    (folder / "mnt").mkdir()
    run = RunFolder.create(folder / "run", folder / "mnt" / "run")
    run.config.write_text(f"run: {{tasks: {{reach: go}}, shared: '{folder / 'mnt'}'}}\ncluster: {cluster}\n")
    return run, load_plain_tables(run.config, [])


def drive(run):
    command = [sys.executable, "-m", "infra.driver", str(run.path), "--address", "127.0.0.1:1"]
    return subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.timeout(90)
def test_a_cluster_that_is_away_is_waited_for_once_the_run_has_trained_there(tmp_path):
    run, _ = make_run(tmp_path)
    rank = subprocess.Popen(["sleep", "60"])  # of a driver that was killed
    record(run.logs / "learner-rank0.pid", rank.pid)
    first = drive(run)
    assert first.returncode == 1 and "no Ray cluster answers" in first.stderr and "Traceback" not in first.stderr
    assert rank.wait(1) != 0
    run.learner_status.write_text(json.dumps({"step": 70, "time_ns": 1, "driver": 1, "state": "training"}))
    assert drive(run).returncode == NO_CLUSTER
    status = read_status(run)
    assert (status["state"], status["step"]) == ("waiting", 70) and "no Ray cluster answers" in status["waiting"]


def test_a_node_whose_gateway_does_not_come_is_waited_for_and_then_left_out(tmp_path, monkeypatch):
    run, tables = make_run(tmp_path, "{nodes: [a, b]}")
    release, launched = threading.Event(), []

    def launch(node, command, log):  # on a node that hangs
        launched.append(node.name)
        release.wait(30)

    monkeypatch.setattr(infra.driver_nodes, "nodes", lambda: [HERE, OTHER])
    monkeypatch.setattr(infra.driver_nodes, "launch", launch)
    monkeypatch.setattr(infra.driver_nodes, "START_S", 0.5)
    monkeypatch.setattr(infra.driver_nodes, "AGAIN_S", 0.05)
    monkeypatch.setattr(infra.driver_nodes, "WATCH_S", 0.0)
    keeper = NodeKeeper(run, tables, 0.0)
    try:
        assert "waits for the gateway of b" in keeper.plan().waiting
        for _ in range(6):
            time.sleep(0.1)
            keeper.watch()
        assert [slot.node.name for slot in keeper.plan().slots] == ["a"]
        assert launched == ["b"]  # not one more for each attempt while the first is on its way
    finally:
        release.set()
    deadline = time.monotonic() + 10
    while len(launched) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        keeper.watch()
    for thread in keeper._launches.values():  # before the real ``launch`` is back in its place
        thread.join(10)


def test_nodes_that_are_still_joining_are_waited_for_before_a_plan_is_impossible(tmp_path, monkeypatch):
    run, tables = make_run(tmp_path, "{nodes: [a, b]}")
    monkeypatch.setattr(infra.driver_nodes, "nodes", lambda: [HERE])
    keeper = NodeKeeper(run, tables, 0.3)
    plan = keeper.plan()
    assert not plan.slots and "'b'" in plan.waiting
    time.sleep(0.4)
    with pytest.raises(ConfigError, match="'b'"):
        keeper.plan()
