import json
import os

import pytest

from fleet.config import load_run
from fleet.errors import RunFolderError
from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder
from infra.run_config import load_tables
from infra.sim import fleet_children, lock_fleet
from infra.supervisor import recorded
from infra.up import LocalRun, lock_file

RUN_FILE = """
run: {tasks: {reach: reach the target}}
operator: {adapter: scripted, settings: {expert: toy, budget_steps: 100, task_budget_steps: 40}}
"""


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text(RUN_FILE)
    create_run_keys(run.keys)
    (run.path / "gateway.json").write_text(json.dumps({"endpoint": "tcp://127.0.0.1:7447"}))
    return run


def operator_of(run, robot_id):
    from actors.config import TABLES

    return load_run(run.robots / f"{robot_id}.yaml", TABLES)["operator"].settings


def test_robots_share_the_operators_budgets_also_when_their_number_changes(run):
    for num in (2, 4):
        children = fleet_children(run, num, [])
        assert [child.name for child in children] == [f"sim-{i:02d}" for i in range(num)]
        for child in children:
            settings = operator_of(run, child.name)
            assert (settings["budget_steps"], settings["task_budget_steps"]) == (100 // num, 40 // num)


def test_a_second_fleet_on_a_run_is_refused(run):
    lock = lock_fleet(run)
    with pytest.raises(RunFolderError, match="simulated robots"):
        lock_fleet(run)
    lock.release()
    lock_fleet(run).release()


def test_a_second_server_on_a_run_is_refused(run):
    local = LocalRun(run, load_tables(run.config, []))
    try:
        with pytest.raises(RunFolderError, match="another process"):
            LocalRun(run, load_tables(run.config, []))
        assert recorded(lock_file(run)) == os.getpid()
    finally:
        local.stop()
    assert LocalRun(run, load_tables(run.config, [])).stop() is None
