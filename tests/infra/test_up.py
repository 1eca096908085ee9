"""What `fleet up` makes of its driver: real processes, without Ray."""

import json
import signal
import sys
import time

import pytest

from fleet.runfolder import RunFolder
from infra.driver import CANNOT_GO_ON
from infra.run_config import load_tables
from infra.supervisor import Child
from infra.up import DRIVER, LocalRun

RUN_FILE = "run: {tasks: {reach: reach the target}}\n"
SAYS = """
import json, os, sys, time
status = {"driver": os.getpid(), "time_ns": time.time_ns(), "state": "training", "step": 0, "pid": 1, **json.loads(sys.argv[2])}
with open(sys.argv[1], "w") as file:
    json.dump(status, file)
"""


@pytest.fixture
def local(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text(RUN_FILE)
    local = LocalRun(run, load_tables(run.config, []))
    yield local
    local.stop()


def drive(local, ending, **says):
    """A driver that says one thing, then does ``ending``."""
    command = [sys.executable, "-c", SAYS + ending, str(local.run.learner_status), json.dumps(says)]
    child = Child(DRIVER, command, local.run.logs / "driver.log", once=True, gives_up=CANNOT_GO_ON, window_s=float("inf"))
    local.supervisor.add(child)
    return child


def poll_until(local, condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition(local.poll()):
        assert time.monotonic() < deadline, local.poll()
        time.sleep(0.02)


def test_a_learner_that_cannot_go_on_is_told_once_and_never_started_again(local, caplog):
    told = {"what": "the loss is not finite", "rule": "it is finite", "remedy": "a smaller learning rate"}
    driver = drive(local, f"sys.exit({CANNOT_GO_ON})", state="failed", error=told)
    poll_until(local, lambda status: local.failure is not None)
    assert local.poll()["state"] == "failed"
    assert local.failure.remedy == "a smaller learning rate" and "smaller learning rate" in local.poll()["last_error"]
    time.sleep(0.5)
    local.poll()
    assert driver.num_restarts == 0
    assert sum("not finite" in record.message for record in caplog.records) == 1


def test_a_driver_that_gets_nowhere_is_given_up_with_its_last_words(local):
    drive(local, "sys.exit('no such cluster')")
    poll_until(local, lambda status: status["state"] == "failed", 30)
    assert "no such cluster" in str(local.failure)
    assert local.poll()["state"] == "failed"  # and nobody else ends


def test_a_driver_whose_learner_gets_further_each_time_is_started_as_often_as_it_takes(local):
    further = (
        "status['step'] = int(time.monotonic() * 1000)\nopen(sys.argv[1], 'w').write(json.dumps(status))\ntime.sleep(.1)\n"
    )
    driver = drive(local, further + "sys.exit(1)")
    poll_until(local, lambda status: driver.num_restarts >= 6, 30)
    assert local.failure is None


def test_what_an_earlier_driver_said_does_not_count(local):
    local.run.learner_status.write_text(
        json.dumps({"driver": 1, "time_ns": time.time_ns(), "state": "training", "step": 70, "pid": 12, "waiting": "x"})
    )
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    local.supervisor.add(Child(DRIVER, command, local.run.logs / "driver.log"))
    status = local.poll()
    assert (status["state"], status["pid"], status["waiting"], status["step"]) == ("starting", 0, "", 70)


def test_a_driver_that_hangs_is_ended_and_started_again(local, monkeypatch):
    monkeypatch.setattr("infra.up.SILENT_S", 0.5)
    driver = drive(local, "time.sleep(60)")
    poll_until(local, lambda status: driver.num_restarts == 1)
    assert driver.exit_code == -signal.SIGKILL


def test_a_driver_that_was_asked_to_end_stays_ended(local):
    driver = drive(local, "time.sleep(0.3); sys.exit(0)", state="stopped")
    poll_until(local, lambda status: driver.done)
    assert local.poll()["state"] == "stopped" and driver.num_restarts == 0 and local.failure is None
