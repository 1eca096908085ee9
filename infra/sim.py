"""Simulated robots: the same actor program as on a real robot, enrolled and connected the same way, one process tree each."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

from actors.config import TABLES
from fleet.config import load_run
from fleet.errors import FleetError
from fleet.files import FolderLock
from fleet.runfolder import RunFolder
from infra.enroll import enroll_here
from infra.supervisor import Child, Supervisor


def sim_child(
    run: RunFolder, robot_id: str, changes: dict[str, dict[str, Any]], overrides: list[str], *, once: bool = False
) -> Child:
    """The supervised process of one simulated robot; ``changes`` are its differences from the run's tables."""
    path = enroll_here(run, robot_id, changes)
    command = [sys.executable, "-m", "infra.cli", "join", str(path), *overrides]
    return Child(robot_id, command, run.logs / f"{robot_id}.log", once=once, optional=not once)


def sim_settings(run: RunFolder, num: int, prefix: str = "sim") -> dict[str, dict[str, dict[str, Any]]]:
    """For each of ``num`` simulated robots its differences from the run's tables: they share the run's operator budget
    evenly and begin with different tasks."""
    tables = load_run(run.config, TABLES)
    robots = {}
    for index in range(num):
        settings = dict(tables["operator"].settings)
        for budget in ("budget_steps", "task_budget_steps"):
            if settings.get(budget) is not None:
                settings[budget] //= num
        changes: dict[str, dict[str, Any]] = {"operator": {"settings": settings}, "actor": {"first_task": index}}
        robots[f"{prefix}-{index:02d}"] = changes
    return robots


def fleet_children(run: RunFolder, num: int, overrides: list[str]) -> list[Child]:
    """``num`` simulated robots on this machine."""
    return [sim_child(run, robot_id, changes, overrides) for robot_id, changes in sim_settings(run, num).items()]


def lock_fleet(run: RunFolder) -> FolderLock:
    """One simulated fleet a run: a second one would start the same robots again.

    Raises:
        RunFolderError: There is one.
    """
    return FolderLock(run.robots, "run's simulated robots: end the other `fleet sim` or demo first")


def run_sims(run_path: Path, num: int, overrides: list[str]) -> None:
    """Runs ``num`` simulated robots until SIGINT or SIGTERM.

    Raises:
        FleetError: A robot cannot run; its last words are in the error.
    """
    if num < 1:
        raise FleetError(f"--num {num}", rule="at least one robot")
    run = RunFolder.open(run_path)
    lock = lock_fleet(run)
    supervisor, stopping = Supervisor(), False

    def ask_to_stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    try:
        for child in fleet_children(run, num, overrides):
            supervisor.add(child)
        while not stopping:
            supervisor.poll()
            time.sleep(0.2)
    finally:
        supervisor.stop()
        lock.release()
