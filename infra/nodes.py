"""The nodes of a run that is shared: who serves it, where robots connect, and how a node is asked to end.

Each node keeps SHARED/nodes/NAME.json fresh while it serves. A file NAME.stop beside it ends its supervisor. Which robot
was given to which node stands in SHARED/nodes/robots/ROBOT.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import time

from fleet.errors import ConfigError, RunFolderError
from fleet.identity import enrolled
from fleet.runfolder import RunFolder

HEAD = "head"  # the node of `fleet up`
SHOW_S = 1.0
LOST_S = 10.0
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
    """Shows that this node serves the run.

    Raises:
        ConfigError: The name cannot be that of a file.
    """

    def __init__(self, run: RunFolder, name: str) -> None:
        check_name(name)
        self._run, self._name, self._shown = run, name, 0.0
        self._path, self.stop_file = run.nodes / f"{name}.json", run.nodes / f"{name}.stop"
        self.stop_file.unlink(missing_ok=True)

    def show(self) -> None:
        """Writes the entry anew when a second has passed. A shared folder that does not answer stops nobody."""
        if time.monotonic() - self._shown >= SHOW_S:
            self._shown = time.monotonic()
            with contextlib.suppress(OSError):
                self._write(os.getpid())

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            self._write(0)
            self.stop_file.unlink(missing_ok=True)

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
    """Asks all other nodes to end and waits for them; returns those that did not in time."""
    asked = [entry.name for entry in read_nodes(run).values() if entry.alive and entry.name != HEAD]
    for name in asked:
        (run.nodes / f"{name}.stop").touch()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        nodes = read_nodes(run)
        if not any(name in nodes and nodes[name].alive for name in asked):
            return []
        time.sleep(0.2)
    return [name for name in asked if read_nodes(run)[name].alive]
