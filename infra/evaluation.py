"""Tests releases of a run on held-out starts, and keeps the results beside the run's report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from actors.config import TABLES
from fleet.config import load_run
from fleet.errors import ReleaseError
from fleet.runfolder import RunFolder
from fleet.seeds import held_out_seeds
from fleet.server.releases import ReleaseStore
from infra.evaluate import Table, evaluate
from infra.intervals import wilson

FIRST_START = 2000  # the demo's settings were chosen on earlier held-out starts; claims are made on these


def results_file(run: RunFolder) -> Path:
    return run.report / "evaluations.json"


def evaluate_release(run_path: Path, version: int = 0, episodes: int = 50, workers: int = 2, label: str = "") -> Table:
    """Runs one release on ``episodes`` held-out starts of each task and appends the result to report/evaluations.json.

    Args:
        version: 0 takes the newest.
        label: "start", "release" or "final"; default: "final" for the newest, else "release".

    Raises:
        ReleaseError: There is no such release.
    """
    from safetensors.torch import load

    from algorithms.policies.registry import build

    run = RunFolder.open(run_path)
    store = ReleaseStore(run.releases)
    newest = store.newest()
    if newest is None:
        raise ReleaseError(
            f"{run.path} has no release", rule="the learner publishes one after its start phase", remedy="wait for it"
        )
    version = version or newest
    manifest = store.manifest(version)
    policy = build(manifest.policy["family"], manifest.policy["config"])
    policy.load_state_dict(load(store.load(version)))
    tables = load_run(run.config, TABLES)
    tasks = {task: entry["embedding"] for task, entry in json.loads((run.path / "tasks.json").read_text()).items()}
    table = evaluate(
        policy,
        tables["robot"].adapter,
        tables["robot"].settings,
        tasks,
        held_out_seeds(episodes, first=FIRST_START),
        execute=tables["actor"].execute,
        num_workers=workers,
    )
    _keep(run, table, version, manifest.created_ns, label or ("final" if version == newest else "release"))
    return table


def _keep(run: RunFolder, table: Table, version: int, created_ns: int, label: str) -> None:
    path = results_file(run)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if (row["version"], row["label"]) != (version, label)]
    if label == "final":
        for kept in rows:
            kept["label"] = "release" if kept["label"] == "final" else kept["label"]
    for row in table.rows:
        rows.append(
            {
                "version": version,
                "label": label,
                "at_ns": created_ns,
                "measured_ns": time.time_ns(),
                "task": row.task,
                "episodes": row.num_episodes,
                "successes": row.num_successes,
            }
        )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


def success_rate(run: RunFolder, label: str) -> tuple[float, float, float] | None:
    """Mean success over tasks of the results with this label, with its Wilson 95 % interval; None if there are none."""
    path = results_file(run)
    rows = [r for r in json.loads(path.read_text()) if r["label"] == label] if path.exists() else []
    if not rows:
        return None
    successes, episodes = sum(r["successes"] for r in rows), sum(r["episodes"] for r in rows)
    return successes / episodes, *wilson(successes, episodes)


def print_table(table: Table) -> None:
    """Shows a result as people read it."""
    shown = RichTable("task", "episodes", "success", "95 % interval", "mean steps")
    for row in (*table.rows, table.total):
        interval = f"{100 * row.low:.0f} - {100 * row.high:.0f} %"
        shown.add_row(row.task, str(row.num_episodes), f"{100 * row.rate:.1f} %", interval, f"{row.mean_steps:.0f}")
    Console().print(shown)
