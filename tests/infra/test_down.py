"""`fleet down` on servers that live, that were killed, and on what is not its own. Without Ray."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fleet.runfolder import RunFolder
from infra.down import down
from infra.supervisor import recorded
from infra.up import lock_run
from tests.command_line import ENV, ROOT, fleet

RUN_FILE = "run: {tasks: {reach: reach the target}}\ngateway: {bind: 'tcp://127.0.0.1:0'}\n"
SERVER = """
import signal, sys, threading
from pathlib import Path
from fleet.runfolder import RunFolder
from infra.run_config import load_tables
from infra.up import LocalRun
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
run = RunFolder.open(Path(sys.argv[1]))
local = LocalRun(run, load_tables(run.config, []))
local.start()
print("up", flush=True)
while not stop.wait(0.1):
    local.poll()
local.stop()
"""


@pytest.fixture
def served(tmp_path):
    """A run, and the process that serves it."""
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text(RUN_FILE)
    server = subprocess.Popen([sys.executable, "-c", SERVER, run.path], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "up\n"
        yield run, server
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()
        down(run.path, lambda text: None)


def living(run):
    return [name for name in ("driver", "gateway", "registry") if recorded(run.logs / f"{name}.pid")]


def test_a_run_ends_from_another_terminal(served):
    run, server = served
    assert living(run) == ["gateway", "registry"]
    command = fleet("down", run.path)
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 0 and "waiting for gateway" in said and f"fleet up {run.path} --resume" in said
    assert server.wait(5) == 0 and living(run) == []


def test_what_a_killed_server_left_behind_is_ended(served):
    run, server = served
    server.kill()
    server.wait()
    assert living(run) == ["gateway", "registry"]
    said = []
    down(run.path, said.append)
    assert living(run) == [] and any("gateway, which was left behind" in text for text in said)


def test_a_second_server_is_refused_and_told_how_to_end_the_first(served):
    run, server = served
    second = fleet("up", run.path, "--resume")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "served by another process" in said and "fleet down" in said
    assert server.poll() is None and living(run) == ["gateway", "registry"]


def test_who_does_not_end_in_time_is_named(served, monkeypatch):
    run, server = served
    monkeypatch.setattr("infra.down.BEYOND_S", 0.0)
    monkeypatch.setattr("infra.down.stop_within_s", lambda run: 1.0)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Exception, match=f"process {server.pid} did not end within 1 s; it waits for gateway"):
            down(run.path, lambda text: None)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert server.wait(20) == 0


def test_an_import_is_not_ended(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text(RUN_FILE)
    with contextlib.closing(lock_run(run, "an import")):
        refused = fleet("down", run.path)
        said, _ = refused.communicate(timeout=30)
    assert refused.returncode == 2 and f"an import (process {os.getpid()})" in said


def test_a_number_that_another_process_got_meanwhile_is_left_alone(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text(RUN_FILE)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.2)
        for path in (run.path / "run.lock", run.logs / "gateway.pid"):
            path.write_text(f"{bystander.pid} an earlier start\nfleet up\n")
        down(run.path, lambda text: None)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
