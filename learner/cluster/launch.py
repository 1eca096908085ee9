"""Plain processes on the nodes of a cluster: Ray starts them and forgets them, so that they outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fleet.errors import LearnerError
from learner.cluster.session import first_line, nodes
from learner.placement import Node

_ANSWER_S = 60.0
_KEPT = ("RAY_AUTH_", "RAY_USE_TLS", "RAY_TLS_", "RAY_TMPDIR")  # what a user sets for Ray; the rest Ray sets for its workers
# A process between this one and the new one: Ray ends the children of its workers, not what has lost its parent.
_DETACH = """
import subprocess, sys
with open(sys.argv[1], "ab") as output:
    process = subprocess.Popen(
        sys.argv[2:], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
print(process.pid)
"""


def launch(node: Node, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Starts a process on a node that goes on without Ray; its pid there. Waits until it is started, not for more.

    Args:
        command: "python" in front means the interpreter of Ray on that node.
        log: File on that node for its output, added at its end.
        environment: Added to that of Ray's workers on that node.

    Raises:
        LearnerError: The node did not start it within a minute, or has no such program.
    """
    return int(_on(node, _launch, list(command), str(log), dict(environment or {})))


def alive(node: Node, pid: int) -> bool:
    """Whether a process of that number runs on the node.

    Raises:
        LearnerError: The node does not answer.
    """
    return bool(_on(node, _alive, pid))


def end(node: Node, pid: int, force: bool = False) -> None:
    """Asks a process on the node to end (SIGTERM), or ends it (SIGKILL).

    Raises:
        LearnerError: The node does not answer.
    """
    _on(node, _end, pid, force)


def place_on(robot_id: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """``launch`` on the host of a robot: the node started with ``--resources '{"robot:ID": 1}'``.

    Raises:
        LearnerError: No node has that resource, or it does not start the process.
    """
    for node in nodes():
        if robot_id in node.robots:
            return launch(node, command, log, environment)
    raise LearnerError(
        f"no node of the Ray cluster is the host of robot {robot_id!r}",
        rule=f"the robot's host is a node with the resource robot:{robot_id}",
        remedy=f"""on the host: ray start --address ... --resources '{{"robot:{robot_id}": 1}}'""",
    )


def _on(node: Node, function: Callable[..., Any], *arguments: Any) -> Any:
    if not ray.is_initialized():  # Ray would start a cluster of its own
        raise LearnerError(f"node {node.name} cannot be asked: this process is in no Ray cluster", rule="start_ray comes first")
    pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote(*arguments)
    try:
        return ray.get(task, timeout=_ANSWER_S)
    except RayError as error:
        said = str(getattr(error, "cause", "") or first_line(error))
        raise LearnerError(
            f"node {node.name} at {node.address} could not do it: {said}", rule="nodes answer within a minute"
        ) from None


def _launch(command: list[str], log: str, environment: dict[str, str]) -> int:
    command = [sys.executable, *command[1:]] if command[0] == "python" else command
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name.startswith(_KEPT)}
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    started = subprocess.run(
        [sys.executable, "-c", _DETACH, log, *command],
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if started.returncode:
        raise OSError(started.stderr.strip().splitlines()[-1])
    return int(started.stdout)


def _alive(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].lstrip().startswith("Z")
    except OSError:
        return False


def _end(pid: int, force: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if force else signal.SIGTERM)
