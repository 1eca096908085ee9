"""`fleet status`: one look at a run, from the registry."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fleet.errors import FleetError
from fleet.runfolder import RunFolder


def read_status(run: RunFolder) -> dict[str, Any]:
    """Robots, learner and newest release of a run as plain data. What is not reachable is said, not guessed."""
    from fleet.config import load_run
    from fleet.server.registry import Registry, RegistryConfig, registry_url
    from fleet.server.releases import ReleaseStore

    status: dict[str, Any] = {"run": run.run_id, "folder": str(run.path), "release": ReleaseStore(run.releases).newest()}
    try:
        prefix = load_run(run.config, {"registry": RegistryConfig})["registry"].prefix
        registry = Registry(registry_url(run.registry, run.config), prefix)
        status["robots"], status["learner"] = registry.robots(), registry.learner()
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
    if "registry" in status:
        console.print(f"registry {status['registry']}; is `fleet up` running?")
        return
    learner = status.get("learner") or {}
    if learner:
        console.print("learner " + ", ".join(f"{key} {value}" for key, value in sorted(learner.items())))
    table = Table("robot", "state", "last seen", "version", "steps", "operator steps", "spool")
    for robot_id, robot in sorted((status.get("robots") or {}).items()):
        seen = time.time() - float(robot.get("last_seen_ns", 0)) / 1e9
        numbers = [f"{float(robot.get(key, 0)):.0f}" for key in ("version", "steps", "operator_steps", "spool")]
        table.add_row(robot_id, str(robot.get("state", "")), f"{seen:.1f} s ago", *numbers)
    console.print(table)
