"""Tests releases of a run on held-out starts, and keeps the results beside the run's report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from actors.config import TABLES
from actors.robots import ROBOTS
from fleet.config import load_run
from fleet.errors import ConfigError, ReleaseError, RobotError
from fleet.lookup import resolve
from fleet.runfolder import RunFolder
from fleet.seeds import CLAIMS, held_out_seeds
from fleet.server.releases import ReleaseStore
from infra.evaluate import Table, Watch, check_starts, evaluate
from infra.evaluator import EvaluatorConfig
from infra.results import add_results


def evaluate_release(run_path: Path, version: int = 0, episodes: int = 50, workers: int = 2, label: str = "") -> Table:
    """Runs one release on ``episodes`` held-out starts of each task and appends the result to report/evaluations.json.

    Args:
        version: 0 takes the newest.
        label: "start", "release" or "final"; default: "final" for the newest, else "release".

    Raises:
        ReleaseError: There is no such release.
        ConfigError: The run's robot is no simulator, and the run file names none.
    """
    run = RunFolder.open(run_path)
    newest = ReleaseStore(run.releases).newest()
    if newest is None:
        raise ReleaseError(
            f"{run.path} has no release", rule="the learner publishes one after its start phase", remedy="wait for it"
        )
    version = version or newest
    label = label or ("final" if version == newest else "release")
    return evaluate_version(run, version, label, held_out_seeds(episodes, first=CLAIMS), workers=workers)


def evaluate_version(
    run: RunFolder, version: int, label: str, seeds: list[int], *, workers: int, watch: Watch | None = None
) -> Table:
    """Runs release ``version`` from each of ``seeds`` in each task of the run, and keeps the result under ``label``.

    Args:
        workers: Processes; 0 runs in this one.
        watch: See ``evaluate``.

    Raises:
        ReleaseError: There is no such release, or it is damaged.
        FleetError: As ``evaluate``.
    """
    from safetensors.torch import load

    from algorithms.policies.registry import load_published, rebuild

    store = ReleaseStore(run.releases)
    manifest = store.manifest(version)
    policy = rebuild(manifest.policy)
    load_published(policy, load(store.load(version)))
    tables = load_run(run.config, {**TABLES, "evaluator": EvaluatorConfig})
    catalogue = json.loads((run.path / "tasks.json").read_text())
    tasks = {task: entry["embedding"] for task, entry in catalogue.items()}
    adapter, settings = simulator(tables)
    actor = tables["actor"]
    table = evaluate(
        policy,
        adapter,
        settings,
        tasks,
        seeds,
        execute=actor.execute,
        num_workers=workers,
        max_steps=tables["evaluator"].max_steps,
        watch=watch,
        chunking=actor.chunking,
        ensemble_decay=actor.ensemble_decay,
        guidance=actor.guidance,
        safety=actor.safety,
        instructions={task: entry["instruction"] for task, entry in catalogue.items()},
    )
    counts = {row.task: (row.num_episodes, row.num_successes) for row in table.rows}
    add_results(run, version, manifest.created_ns, label, counts)
    return table


def simulator(tables: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Adapter and settings of the simulator that a run's releases are tested in. Nothing is started.

    Raises:
        ConfigError: The run's robot does not say that it is simulated, and the run file names no simulator.
    """
    if tables["evaluator"].adapter:
        return tables["evaluator"].adapter, tables["evaluator"].settings
    adapter = tables["robot"].adapter
    if not getattr(resolve(ROBOTS, adapter, kind="robot adapter", error=RobotError), "simulated", False):
        raise ConfigError(
            f"robot.adapter = {adapter!r} does not say that it is simulated",
            rule="releases are tested in a simulator, never on a robot that could move",
            remedy="name one with evaluator.adapter and evaluator.settings; a class of your own says simulated = True",
        )
    return adapter, tables["robot"].settings


def check_simulator(run: RunFolder) -> None:
    """Builds the simulator once and sees whether its starts follow their seed.

    Raises:
        ConfigError: See ``simulator``.
        RobotError: See ``infra.evaluate.check_starts``.
    """
    tables = load_run(run.config, {**TABLES, "evaluator": EvaluatorConfig})
    tasks = json.loads((run.path / "tasks.json").read_text())
    check_starts(*simulator(tables), next(iter(tasks)))


def print_table(table: Table) -> None:
    """Shows a result as people read it."""
    shown = RichTable("task", "episodes", "success", "95 % interval", "mean steps")
    for row in (*table.rows, table.total):
        interval = f"{100 * row.low:.0f} - {100 * row.high:.0f} %"
        shown.add_row(row.task, str(row.num_episodes), f"{100 * row.rate:.1f} %", interval, f"{row.mean_steps:.0f}")
    Console().print(shown)
