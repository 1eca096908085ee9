"""A run of several nodes on one machine, each with a folder of its own; real gateways, without Ray."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fleet.errors import ConfigError, RunFolderError
from fleet.identity import Credential
from infra.down import down
from infra.enroll import enroll
from infra.nodes import HEAD, choose_node, read_nodes
from infra.run_config import write_catalogue
from infra.supervisor import recorded
from infra.up import LocalRun, open_run, write_run_file
from tests.command_line import ENV, ROOT

RUN_FILE = "run: {tasks: {reach: reach the target}, shared: SHARED}\ngateway: {bind: 'tcp://127.0.0.1:0'}\n"


def wait_until(condition, timeout_s=30, meanwhile=lambda: None):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        meanwhile()
        time.sleep(0.05)


def start_node(shared, folder, name):
    command = [sys.executable, "-m", "infra.node", "--shared", shared, "--folder", folder, "--name", name]
    return subprocess.Popen(list(map(str, command)), env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """(what `fleet up` serves, the supervisors of two more nodes by name, the folder of all)"""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "mnt").mkdir()
    (folder / "toy.yaml").write_text(RUN_FILE.replace("SHARED", str(folder / "mnt")))
    run, tables = open_run(folder / "toy.yaml", [], resume=False, runs=folder / "head")
    local = LocalRun(run, tables)
    nodes = {}
    try:
        local.start()
        nodes = {name: start_node(run.shared, folder / name, name) for name in ("b", "c")}
        wait_until(lambda: {n for n, e in read_nodes(run).items() if e.alive} == {HEAD, "b", "c"}, meanwhile=local.poll)
        yield local, nodes, folder
    finally:
        for node in nodes.values():
            node.terminate()
        local.stop()
        for node in nodes.values():
            node.wait(20)


def test_robots_are_spread_over_the_gateways(shared_run, tmp_path):
    local, _, folder = shared_run
    endpoints = {entry.endpoint: name for name, entry in read_nodes(local.run).items()}
    assert len(endpoints) == 3
    for index in range(6):
        enroll(local.run.path, f"arm-{index}", tmp_path / f"arm-{index}.yaml")
    given = [endpoints[Credential.load(tmp_path / f"arm-{index}.yaml").endpoint] for index in range(6)]
    assert collections.Counter(given) == {HEAD: 2, "b": 2, "c": 2}
    path = enroll(folder / "b", "arm-6", tmp_path / "arm-6.yaml", node="c")  # from any node
    assert endpoints[Credential.load(path).endpoint] == "c"
    with pytest.raises(RunFolderError, match="does not serve"):
        enroll(local.run.path, "arm-7", tmp_path / "arm-7.yaml", node="d")
    wait_until(lambda: read_nodes(local.run)["c"].num_robots == 3, meanwhile=local.poll)


def test_a_second_supervisor_of_a_node_ends_at_once(shared_run):
    local, nodes, folder = shared_run
    again = start_node(local.run.shared, folder / "b", "b")
    assert again.wait(20) == 2 and "another process" in again.stderr.read()
    assert nodes["b"].poll() is None


def test_a_killed_gateway_of_a_node_comes_back_at_its_address(shared_run):
    local, _, folder = shared_run
    before = read_nodes(local.run)["b"].endpoint
    pid = recorded(folder / "b" / "logs" / "gateway.pid")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: recorded(folder / "b" / "logs" / "gateway.pid") not in (0, pid), meanwhile=local.poll)
    assert json.loads((folder / "b" / "gateway.json").read_text())["endpoint"] == before


def test_a_node_that_is_gone_gets_no_robots(shared_run, tmp_path, monkeypatch):
    local, _, _ = shared_run
    entry = read_nodes(local.run)["b"]
    gone = dataclasses.replace(entry, pid=0)
    entries = {**read_nodes(local.run), "b": gone}
    monkeypatch.setattr("infra.nodes.read_nodes", lambda run: entries)
    monkeypatch.setattr("infra.nodes.robots_by_node", lambda run: collections.Counter({HEAD: 5, "c": 4}))
    assert choose_node(local.run).name == "c"
    assert choose_node(local.run, "b") == gone  # unless it is asked for


def test_another_machine_cannot_serve_the_same_run(shared_run):
    local, _, folder = shared_run
    run, tables = open_run(folder / "toy.yaml", [], resume=True, runs=folder / "other")
    assert run.shared == local.run.shared
    with pytest.raises(RunFolderError, match="was served"):
        LocalRun(run, tables)


def test_a_node_can_be_killed_and_started_again(shared_run):
    local, nodes, folder = shared_run
    pid = recorded(folder / "c" / "logs" / "gateway.pid")
    nodes["c"].kill()
    nodes["c"].wait()
    assert recorded(folder / "c" / "logs" / "gateway.pid") == pid  # its gateway goes on
    nodes["c"] = start_node(local.run.shared, folder / "c", "c")
    new = nodes["c"].pid
    wait_until(lambda: read_nodes(local.run)["c"].pid == new, meanwhile=local.poll)
    assert recorded(folder / "c" / "logs" / "gateway.pid") not in (0, pid)


def test_the_end_of_a_run_ends_its_nodes(shared_run):
    local, nodes, folder = shared_run
    gateways = [folder / name / "logs" / "gateway.pid" for name in nodes]
    assert all(recorded(path) for path in gateways)
    local.stop()
    assert [node.wait(20) for node in nodes.values()] == [0, 0]
    assert not any(recorded(path) for path in gateways)
    assert not any(entry.alive for entry in read_nodes(local.run).values())
    late = start_node(local.run.shared, folder / "c", "c")  # one that the driver had just asked Ray for
    assert late.wait(20) == 0 and not recorded(gateways[1])
    said = []
    down(local.run.path, said.append)  # nothing is left, and that is no error
    assert len(said) == 1 and "--resume" in said[0]


def test_a_start_that_was_killed_on_its_way_is_gone_on_with(tmp_path):
    (tmp_path / "mnt").mkdir()
    (tmp_path / "toy.yaml").write_text(RUN_FILE.replace("SHARED", str(tmp_path / "mnt")))
    run, _ = open_run(tmp_path / "toy.yaml", [], resume=False, runs=tmp_path)
    (run.path / "run.json").unlink()  # links of other names were made, this one not yet
    again, _ = open_run(tmp_path / "toy.yaml", [], resume=True, runs=tmp_path)
    assert again.run_id.startswith("toy-")


def test_what_others_read_is_replaced_whole_where_it_is_a_link_too(tmp_path):
    (tmp_path / "mnt").mkdir()
    (tmp_path / "toy.yaml").write_text(RUN_FILE.replace("SHARED", str(tmp_path / "mnt")))
    run, tables = open_run(tmp_path / "toy.yaml", [], resume=False, runs=tmp_path)
    for _ in range(2):
        write_run_file(run, tables)
        write_catalogue(run, tables["run"])
        readers = [path.open() for path in (run.config, run.path / "tasks.json")]
    before = [reader.read(1) for reader in readers]
    write_run_file(run, tables)
    write_catalogue(run, tables["run"])
    for reader, first, path in zip(readers, before, (run.config, run.path / "tasks.json"), strict=True):
        assert os.fstat(reader.fileno()).st_ino != path.stat().st_ino and path.is_symlink()
        assert first + reader.read() == path.read_text()  # who had begun to read sees no half of it
        reader.close()


def test_a_run_that_was_not_shared_does_not_become_it(tmp_path):
    (tmp_path / "mnt").mkdir()
    (tmp_path / "toy.yaml").write_text(RUN_FILE.replace("SHARED", "''"))
    open_run(tmp_path / "toy.yaml", [], resume=False, runs=tmp_path)
    with pytest.raises(RunFolderError, match="settled at its start"):
        open_run(tmp_path / "toy.yaml", [f"run.shared={tmp_path / 'mnt'}"], resume=True, runs=tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.shared=s3://bucket/runs", "other file systems"),
        ("run.shared=/not/mounted", "no folder"),
        ("cluster.nodes=[a, b]", "run.shared is empty"),
    ],
)
def test_several_nodes_that_cannot_work_are_refused_before_anything_starts(tmp_path, override, words):
    (tmp_path / "toy.yaml").write_text(RUN_FILE.replace("SHARED", "''"))
    with pytest.raises(ConfigError, match=words) as caught:
        open_run(tmp_path / "toy.yaml", [override], resume=False, runs=tmp_path / "runs")
    assert caught.value.rule or caught.value.remedy
    assert not (tmp_path / "runs").exists()


def test_one_address_for_all_gateways_is_refused(tmp_path):
    (tmp_path / "toy.yaml").write_text(RUN_FILE.replace("SHARED", str(tmp_path)))
    with pytest.raises(ConfigError, match=r"gateway\.advertise"):
        open_run(tmp_path / "toy.yaml", ["gateway.advertise=tcp://gw:7447"], resume=False, runs=tmp_path / "runs")
