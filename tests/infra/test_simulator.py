"""A simulated robot as Ray places it, here as a process of its own, against a real gateway."""

import collections
import stat
import subprocess
import sys
import threading
import time

import psutil
import pytest

from buffer.reader import LogReader
from fleet.errors import IdentityError, RunFolderError
from fleet.identity import create_run_keys
from fleet.journal import read_journal
from fleet.runfolder import RunFolder
from infra.enroll import enroll
from infra.run_config import load_tables, write_catalogue
from infra.simulator import serve
from infra.supervisor import CrashLoop, Supervisor
from infra.up import start_gateway, write_run_file
from tests.command_line import ENV, ROOT

TOY = ROOT / "examples" / "toy.yaml"
SERVE = """
import sys
from infra.simulator import serve
serve(credentials=open(sys.argv[1]).read(), folder=sys.argv[2], stop=lambda: False, report=lambda facts: None)
"""


@pytest.fixture
def run(tmp_path):
    """A served run, and the file of a robot that shows the tasks."""
    run = RunFolder.create(tmp_path / "run")
    tables = load_tables(TOY, ["registry.url=unix:///nowhere"])  # a view only: it may be missing
    write_run_file(run, tables)
    create_run_keys(run.keys)
    write_catalogue(run, tables["run"])
    supervisor = Supervisor()
    start_gateway(run, supervisor)
    shows = {
        "operator": {"settings": {"expert": "toy", "mode": "demonstrate"}},
        "actor": {"demonstrate": True, "fragment_s": 0.1},
    }
    enroll(run.path, "sim-00", tmp_path / "sim-00.yaml", "", shows)
    yield run
    supervisor.stop()


def durable(run):
    return [line for line in read_journal(run.logs / "gateway.jsonl") if line["kind"] == "durable"]


def until(condition, timeout_s=40):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_a_killed_simulator_leaves_no_robot_behind_and_comes_back(run, tmp_path):
    command = [sys.executable, "-c", SERVE, str(tmp_path / "sim-00.yaml"), str(tmp_path / "home")]
    first = subprocess.Popen(command, cwd=ROOT, env=ENV)
    try:
        until(lambda: len(durable(run)) > 2)
        robots = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.kill()
        first.wait()
    assert stat.S_IMODE((tmp_path / "home" / "robot.yaml").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert len(robots) >= 2  # courier and control loop
    psutil.wait_procs(robots, timeout=30)
    assert not any(robot.is_running() for robot in robots)

    boots = {line["boot"] for line in durable(run)}
    told, stop = [], threading.Event()
    credentials = (tmp_path / "sim-00.yaml").read_text()
    arguments = {"credentials": credentials, "folder": str(tmp_path / "home"), "stop": stop.is_set, "report": told.append}
    thread = threading.Thread(target=serve, kwargs=arguments)
    thread.start()
    until(lambda: {line["boot"] for line in durable(run)} > boots)
    with pytest.raises(RunFolderError, match="in use"):
        serve(**arguments)
    stop.set()
    thread.join(30)
    assert not thread.is_alive() and not psutil.pid_exists(told[-1]["pid"])
    assert told[-1]["robot"] == "sim-00" and told[-1]["restarts"] == 0

    reader = LogReader(run.buffer)
    stored = collections.Counter((record.robot_id, record.boot_id, record.seq) for record in reader.poll())
    reader.close()
    assert set(stored.values()) == {1} and len({boot for _, boot, _ in stored}) == 2


def test_a_robot_that_cannot_run_says_why(run, tmp_path):
    text = (tmp_path / "sim-00.yaml").read_text().replace("adapter: toy", "adapter: toi", 1)
    with pytest.raises(CrashLoop, match="did you mean 'toy'"):
        serve(credentials=text, folder=str(tmp_path / "home"), stop=lambda: False, report=lambda facts: None)
    with pytest.raises(IdentityError):
        serve(credentials="no: file", folder=str(tmp_path / "other"), stop=lambda: False, report=lambda facts: None)
