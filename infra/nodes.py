"""The nodes of a run that is shared: who serves it, where robots connect, and how a node is asked to end.

Each node keeps SHARED/nodes/NAME.json fresh while it serves. The file SHARED/nodes/stop, there from the end of `fleet up` to
the next one, ends the supervisors of all others, also of one that only just starts. Which robot was given to which node
stands in SHARED/nodes/robots/ROBOT.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import threading
import time
from pathlib import Path

from fleet.errors import ConfigError, RunFolderError
from fleet.identity import enrolled
from fleet.runfolder import RunFolder

HEAD = "head"  # the node of `fleet up`
SHOW_S = 1.0
LOST_S = 10.0
LEAVE_S = 5.0
STOP_TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True)
class NodeEntry:
    """What a node says of itself. ``pid`` 0: it has ended. ``folder``: the run's on that node."""

    name: str
    endpoint: str
    folder: str
    pid: int
    metrics_port: int
    time_ns: int
    num_robots: int

    @property
    def alive(self) -> bool:
        """Whether it was there just now, by clocks that agree to some seconds."""
        return self.pid != 0 and abs(time.time_ns() - self.time_ns) < LOST_S * 1e9


class Presence:
    """Shows that this node serves the run, on a thread: a shared folder that hangs stops nobody.

    Attributes:
        stop_asked: The run has ended, and this node with it. Not told to the node of `fleet up`, which says so itself.

    Raises:
        ConfigError: The name cannot be that of a file.
    """

    def __init__(self, run: RunFolder, name: str) -> None:
        check_name(name)
        self._run, self._name, self._path = run, name, run.nodes / f"{name}.json"
        self.stop_asked, self._left = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="presence", daemon=True)

    def start(self) -> None:
        """From now on; the gateway listens."""
        self._thread.start()

    def leave(self) -> None:
        """Shows that the node has ended; does not wait for a folder that hangs."""
        self._left.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_S)

    def _work(self) -> None:
        while not self._left.is_set():
            self._show(os.getpid())
            self._left.wait(SHOW_S)
        self._show(0)

    def _show(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            if self._name != HEAD and stop_file(self._run).exists():
                self.stop_asked.set()
            self._write(pid)

    def _write(self, pid: int) -> None:
        try:
            gateway = json.loads((self._run.path / "gateway.json").read_text())
        except (OSError, ValueError):
            return  # not listening yet
        num_robots = robots_by_node(self._run)[self._name]
        entry = NodeEntry(
            self._name, gateway["endpoint"], str(self._run.path), pid, gateway["metrics_port"], time.time_ns(), num_robots
        )
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(entry)))
        os.replace(partial, self._path)


def stop_file(run: RunFolder) -> Path:
    return run.nodes / "stop"


def check_name(name: str) -> None:
    """Raises ConfigError where a node's name cannot be that of a file."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ConfigError(f"node name {name!r}", rule="a file can have that name", remedy="ray start ... --node-name NAME")


def read_nodes(run: RunFolder) -> dict[str, NodeEntry]:
    """All nodes that ever served the run, by name."""
    found = {}
    for path in sorted(run.nodes.glob("*.json")) if run.shared else ():
        with contextlib.suppress(OSError, ValueError, TypeError):  # being replaced
            found[path.stem] = NodeEntry(**json.loads(path.read_text()))
    return found


def robots_by_node(run: RunFolder) -> collections.Counter[str]:
    """How many enrolled robots were given to each node."""
    given: collections.Counter[str] = collections.Counter()
    for robot_id in enrolled(run.keys):
        with contextlib.suppress(OSError):
            given[(run.nodes / "robots" / robot_id).read_text()] += 1
    return given


def give_robot(run: RunFolder, robot_id: str, node: str) -> None:
    """Remembers which node a robot was given to."""
    (run.nodes / "robots").mkdir(exist_ok=True)
    (run.nodes / "robots" / robot_id).write_text(node)


def choose_node(run: RunFolder, name: str = "") -> NodeEntry:
    """The node for one more robot: ``name``, or the one with the fewest robots among those that are there.

    Raises:
        RunFolderError: There is no such node, or none has ever served this run.
    """
    nodes = read_nodes(run)
    if name and name not in nodes:
        raise RunFolderError(
            f"node {name!r} does not serve this run", rule=f"one of {sorted(nodes)}", remedy="see fleet status"
        )
    if name:
        return nodes[name]
    there = [node for node in nodes.values() if node.alive] or list(nodes.values())
    if not there:
        raise RunFolderError(f"no node has served {run.path} yet", rule="robots connect to a gateway", remedy="fleet up first")
    given = robots_by_node(run)
    return min(there, key=lambda node: (given[node.name], node.name != HEAD, node.name))


def stop_nodes(run: RunFolder, timeout_s: float = STOP_TIMEOUT_S) -> list[str]:
    """Asks all other nodes to end and waits for those that are there; returns those that did not in time."""
    stop_file(run).touch()
    asked = [entry.name for entry in read_nodes(run).values() if entry.alive and entry.name != HEAD]
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        nodes = read_nodes(run)
        if not any(name in nodes and nodes[name].alive for name in asked):
            return []
        time.sleep(0.2)
    return [name for name in asked if read_nodes(run)[name].alive]
