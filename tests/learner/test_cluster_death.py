"""Ray as a whole dies, or the process that uses it: the other one ends within seconds, and so does all that Ray placed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fleet.errors import RunFolderError
from fleet.files import FolderLock
from tests.learner_toys import make_run

DRIVER = """
import json, logging, sys, time
from pathlib import Path
from learner.cluster import LearnerHandle, RestartRule, nodes, start_ray
from learner.main import LEARNER_TABLES
from learner.placement import plan
logging.basicConfig(level=logging.INFO)
run = Path(sys.argv[1])
start_ray(token=run / "keys" / "ray.token", num_cpus=2)
tables = {name: table() for name, table in LEARNER_TABLES.items()}
tables["learner"].steps, tables["cluster"].ranks = 10**6, 2
here = nodes()[0]
toy = "tests.learner.cluster_toys:pretend_locked"
learner = LearnerHandle(tables, lambda: plan(nodes(), tables["cluster"], "cpu"), {here.name: run}, function=toy)
while True:
    status = learner.poll()
    print(json.dumps({"step": status.progress.get("step", 0), "pids": [r["pid"] for r in status.ranks]}), flush=True)
    time.sleep(0.1)
"""
PLENTY_S = 20.0  # on a busy machine; an idle one takes 1 to 3


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("victim", "code"), [("gcs_server", 70), ("raylet", 70), ("python", -9)])
def test_nothing_hangs_and_nothing_is_left(victim, code, tmp_path):
    run = make_run(tmp_path / "run")
    log = tmp_path / "driver.log"
    with log.open("w") as errors:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(run.path)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        pids = train_until(driver, step=10)
        family = {process.pid: process for process in psutil.Process(driver.pid).children(recursive=True)}
        ours = [process for process in family.values() if "Agent" not in process.name()]  # agents end later and hold nothing
        assert set(pids) <= set(family)
        assert not is_free(run.checkpoints)
        killed = time.monotonic()
        for process in [psutil.Process(driver.pid), *family.values()]:
            if process.name().startswith(victim) and (victim != "python" or process.pid == driver.pid):
                process.kill()
        assert driver.wait(PLENTY_S) == code, log.read_text()
        ended = time.monotonic() - killed
        assert code == -9 or f"({victim}) at" in log.read_text()
        wait_for(lambda: is_free(run.checkpoints), killed)
        print(f"{victim} killed: driver ended after {ended:.1f} s, ranks after {time.monotonic() - killed:.1f} s")
        wait_for(lambda: ended_all(ours), killed)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.timeout(120)
def test_a_rank_that_takes_too_much_memory_is_told_the_knobs(tmp_path):
    run = make_run(tmp_path / "run")
    used = psutil.virtual_memory()
    limit = (used.total - used.available + (1500 << 20)) / used.total
    environment = os.environ | {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}
    script = DRIVER.replace("pretend_locked", "eat").replace("function=toy", "function=toy, rule=RestartRule(max_failures=1)")
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1  # Python's own for an error: that Ray ends with the process is not Ray's death
    assert "running low on memory" in done.stderr.splitlines()[-1], done.stderr
    assert all(knob in done.stderr.splitlines()[-1] for knob in ("rank ", "learner.image_cache_mb", "engine.micro_batch"))


def train_until(driver: subprocess.Popen[str], step: int) -> list[int]:
    assert driver.stdout is not None
    for line in driver.stdout:
        status = json.loads(line)
        if status["step"] > step:
            return status["pids"]
    raise AssertionError("the driver ended")


def wait_for(condition, begin):
    while not condition():
        assert time.monotonic() - begin < PLENTY_S
        time.sleep(0.05)


def is_free(folder: Path) -> bool:
    try:
        FolderLock(folder, "free").release()
    except RunFolderError:
        return False
    return True


def ended_all(processes) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
