"""`fleet status`: one look at a run: what its processes last wrote, and the robots as the registry knows them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fleet.errors import FleetError
from fleet.runfolder import RunFolder
from infra import driver_status
from infra.results import CONTINUAL, newest_result

OLD_S = 10.0  # what the driver said longer ago no longer holds


def read_status(run: RunFolder) -> dict[str, Any]:
    """Robots, learner, nodes and newest release of a run as plain data. What is not reachable is said, not guessed."""
    from fleet.config import load_run
    from fleet.server.registry import Registry, RegistryConfig, registry_url
    from fleet.server.releases import ReleaseStore
    from infra.nodes import read_nodes

    status: dict[str, Any] = {"run": run.run_id, "folder": str(run.path), "release": ReleaseStore(run.releases).newest()}
    status["evaluation"] = newest_result(run, CONTINUAL)
    status["learner"] = learner = driver_status.read_status(run)
    if learner and (age_s := (time.time_ns() - learner["time_ns"]) / 1e9) > OLD_S:
        learner |= {"was": learner["state"], "state": "not running", "seen_s_ago": round(age_s), "waiting": "", "ranks": []}
    status["nodes"] = {name: {**vars(node), "alive": node.alive} for name, node in read_nodes(run).items()}
    try:
        prefix = load_run(run.config, {"registry": RegistryConfig})["registry"].prefix
        registry = Registry(registry_url(run.registry, run.config), prefix)
        status["robots"] = registry.robots()
        status["learner"] = learner or registry.learner()  # on another node only the registry tells of it
        registry.close()
    except FleetError as error:  # the registry is only a view: without it the rest is shown
        status["registry"] = f"not reachable: {error.what}"
    return status


def show_status(run_path: Path, as_json: bool) -> None:
    status = read_status(RunFolder.open(run_path))
    if as_json:
        print(json.dumps(status, indent=1))
        return
    console = Console()
    console.print(f"run [bold]{status['run']}[/] in {status['folder']}, newest release {status['release'] or 'none'}")
    if learner := status["learner"]:
        _show_learner(console, learner)
    if result := status["evaluation"]:
        rate, low, high = (100 * result[key] for key in ("rate", "low", "high"))
        console.print(
            f"release {result['version']} succeeds on {rate:.0f} % of held-out starts (95 % interval {low:.0f} - {high:.0f} %)"
        )
    if status["nodes"]:
        table = Table("node", "gateway", "robots", "folder", "")
        for name, node in status["nodes"].items():
            table.add_row(name, node["endpoint"], str(node["num_robots"]), node["folder"], "" if node["alive"] else "away")
        console.print(table)
    if "registry" in status:
        console.print(f"registry {status['registry']}; is `fleet up` running?")
        return
    table = Table("robot", "state", "last seen", "version", "steps", "operator steps", "spool")
    for robot_id, robot in sorted((status.get("robots") or {}).items()):
        seen = time.time() - float(robot.get("last_seen_ns", 0)) / 1e9
        numbers = [f"{float(robot.get(key, 0)):.0f}" for key in ("version", "steps", "operator_steps", "spool")]
        table.add_row(robot_id, str(robot.get("state", "")), f"{seen:.1f} s ago", *numbers)
    console.print(table)


def _show_learner(console: Console, learner: dict[str, Any]) -> None:
    long = ("waiting", "advice", "last_error")
    console.print(driver_status.one_line({key: value for key, value in learner.items() if key not in long}))
    for key in long:
        if learner.get(key):
            console.print(f"  {key.replace('_', ' ')}: {learner[key]}", markup=False)
    if len(learner.get("ranks", ())) > 1:
        table = Table("rank", "node", "shard", "pid")
        for rank in learner["ranks"]:
            table.add_row(*(str(rank[key]) for key in ("rank", "node", "shard", "pid")))
        console.print(table)
    for evaluator in learner.get("evaluators", ()):
        console.print("evaluator " + ", ".join(f"{key} {value}" for key, value in evaluator.items() if value), markup=False)
