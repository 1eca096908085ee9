"""Registers robots with a run: a key pair each, and one file that holds all a robot needs to join."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from actors.config import TABLES
from fleet.config import load_run
from fleet.errors import IdentityError, RunFolderError
from fleet.identity import Credential, revoke
from fleet.identity import enroll as make_credential
from fleet.runfolder import RunFolder
from infra.nodes import choose_node, give_robot


def enroll(
    run_path: Path,
    robot_id: str,
    out: Path,
    endpoint: str = "",
    overrides: dict[str, dict[str, Any]] | None = None,
    *,
    node: str = "",
) -> Path:
    """Writes the file of one robot. Its robot, operator and actor tables start as those of the run, to be edited.

    Args:
        endpoint: The gateway as the robot sees it; empty: where it listens.
        overrides: Keys of those tables that differ for this robot, by table.
        node: Whose gateway it connects to in a run of several nodes; empty: the one with the fewest robots.

    Raises:
        IdentityError: The robot is enrolled already, or the name breaks the rules.
        RunFolderError: The folder is not a run, its gateway was never started, or there is no such node.
    """
    run = RunFolder.open(run_path)
    if out.exists():
        raise IdentityError(f"{out} exists", rule="a credential file is never overwritten", remedy="name another with --out")
    tables = {name: dataclasses.asdict(table) for name, table in load_run(run.config, TABLES).items()}
    for name, changes in (overrides or {}).items():
        tables[name] |= changes
    if node and not run.shared:
        raise RunFolderError(f"--node {node} in a run of one node", rule="run.shared makes it a run of several")
    chosen = choose_node(run, node) if run.shared else None
    own = chosen.endpoint if chosen else gateway_endpoint(run)
    credential = make_credential(run.keys, robot_id, endpoint or own, run.run_id)
    if chosen is not None:
        give_robot(run, robot_id, chosen.name)
    try:
        credential.save(out, tables)
    except OSError as error:
        revoke(run.keys, robot_id)  # the secret was only in the file: without it the robot is not enrolled
        raise IdentityError(
            f"{out} cannot be written: {error}", rule="the folder exists and has room", remedy="name another with --out"
        ) from None
    return out


def enroll_here(run: RunFolder, robot_id: str, overrides: dict[str, dict[str, Any]]) -> Path:
    """The file of a robot that is simulated on this machine; keys that exist are used again, the tables are those of now."""
    path = run.robots / f"{robot_id}.yaml"
    if path.exists():
        tables = {name: dataclasses.asdict(table) for name, table in load_run(run.config, TABLES).items()}
        for name, changes in overrides.items():
            tables[name] |= changes
        Credential.load(path).save(path, tables)
        return path
    return enroll(run.path, robot_id, path, "", overrides)


def gateway_endpoint(run: RunFolder) -> str:
    """Where the run's gateway listens.

    Raises:
        RunFolderError: It was never started.
    """
    try:
        return str(json.loads((run.path / "gateway.json").read_text())["endpoint"])
    except (OSError, ValueError, KeyError):
        raise RunFolderError(
            f"{run.path} has no gateway.json",
            rule="the gateway writes its address at its first start",
            remedy="start the run first: fleet up",
        ) from None
