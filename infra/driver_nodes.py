"""Where the ranks of a run go, and the supervisors of the nodes that they go to: what the driver asks Ray for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleet.errors import ConfigError, FleetError
from fleet.runfolder import RunFolder
from infra.nodes import HEAD, LOST_S, NodeEntry, check_name, read_nodes
from infra.supervisor import last_lines
from learner.cluster import launch, nodes
from learner.placement import KnownNodes, Node, Plan, plan

log = logging.getLogger("fleet.driver")
NODE_FOLDER = "~/.fleet-rl/{run}-{node}"
START_S = 60.0  # a node that does not serve by then is left out until it does
WATCH_S = 2.0
AGAIN_S = 15.0  # between two attempts to start the same node


class NodeKeeper:
    """Plans ranks and keeps a supervisor with gateway and shard going on each node that they need. Ray has been started.

    Args:
        joining_s: So long nodes of a cluster may still come before a plan that is impossible without them is an error.

    Attributes:
        folders: The run's folder on each node that serves, by name.
    """

    def __init__(self, run: RunFolder, tables: Mapping[str, Any], joining_s: float) -> None:
        self._run, self._cluster, self._device = run, tables["cluster"], tables["learner"].device
        self._known = KnownNodes(run.path / "known-nodes.json")
        self._seen: dict[str, tuple[int, float]] = {}  # by node: its newest time, and when it was new to us
        self._tried: dict[str, float] = {}
        self._launches: dict[str, threading.Thread] = {}
        self._since: dict[str, float] = {}
        self._used: dict[str, Node] = {}
        self._watched = 0.0
        self._complete_by = time.monotonic() + joining_s
        self.folders: dict[str, Path] = {}

    def plan(self) -> Plan:
        """A plan for now: one that waits while nodes are being started, one without them when they do not come.

        Raises:
            ConfigError: No plan is possible with this configuration.
        """
        there = nodes()
        lost = self._known.lost(there)
        try:
            wish = plan(there, self._cluster, self._device, lost)
        except ConfigError as error:
            if time.monotonic() > self._complete_by:
                raise
            return Plan((), 0, f"the learner waits for nodes: {error.what}")
        self._used = {slot.node.name: slot.node for slot in wish.slots}
        self._check(list(self._used.values()))
        missing = self._start_missing()
        if not missing:
            return wish
        now = time.monotonic()
        if any(now - self._since[node.name] < START_S for node in missing):
            names = ", ".join(node.name for node in missing)
            return Plan((), wish.wanted, f"the learner waits for the gateway of {names}, which is being started")
        rest = [node for node in there if node not in missing]
        smaller = plan(rest, self._cluster, self._device, [*lost, *missing])
        self._used |= {slot.node.name: slot.node for slot in smaller.slots}
        return smaller

    def watch(self) -> None:
        """Now and then starts the supervisors of nodes in use again that are gone. Call it as often as you like."""
        if time.monotonic() - self._watched >= WATCH_S:
            self._start_missing()

    def _start_missing(self) -> list[Node]:
        """Starts the supervisors of nodes in use that are not there, and returns these nodes. Waits for none."""
        self._watched = time.monotonic()
        entries, now, missing = read_nodes(self._run), time.monotonic(), []
        for node in self._used.values():
            if node.here:
                self.folders[node.name] = self._run.path
            elif self._serves(node.name, entries):
                self.folders[node.name] = Path(entries[node.name].folder)
                self._since.pop(node.name, None)
            else:
                missing.append(node)
                self._since.setdefault(node.name, now)
                if now - self._tried.get(node.name, -AGAIN_S) >= AGAIN_S and self._launched(node.name):
                    self._tried[node.name] = now
                    # A daemon: one that hangs does not keep this process from ending.
                    self._launches[node.name] = threading.Thread(target=self._start, args=(node,), name="launch", daemon=True)
                    self._launches[node.name].start()
        return missing

    def _launched(self, name: str) -> bool:
        """Whether no start of it is on its way; one to a node that hangs takes a minute."""
        return name not in self._launches or not self._launches[name].is_alive()

    def _serves(self, name: str, entries: Mapping[str, NodeEntry]) -> bool:
        """By our own clock: the node's may be wrong."""
        if name not in entries or not entries[name].pid:
            return False
        written, now = entries[name].time_ns, time.monotonic()
        if name not in self._seen:
            self._seen[name] = (written, now if entries[name].alive else now - LOST_S)
        elif self._seen[name][0] != written:
            self._seen[name] = (written, now)
        return now - self._seen[name][1] < LOST_S

    def _start(self, node: Node) -> None:
        shared, output = self._run.shared, self._run.nodes / f"{node.name}.log"
        folder = (self._cluster.node_folder or NODE_FOLDER).replace("{node}", node.name).replace("{run}", self._run.path.name)
        command = ["python", "-m", "infra.node", "--shared", str(shared), "--folder", folder, "--name", node.name]
        if said := last_lines(output, 3):
            log.warning("node %s is started again; it last said:\n%s", node.name, said)
        try:
            launch(node, command, output)
        except FleetError as error:
            log.error("%s", error)

    def _check(self, used: list[Node]) -> None:
        others = [node.name for node in used if not node.here]
        for name in others:
            check_name(name)
        if HEAD in others:
            raise ConfigError(f"a node is called {HEAD!r}", rule="that is the name of the node of `fleet up`")
        if others and self._run.shared is None:
            raise ConfigError(
                f"ranks go to the nodes {', '.join(node.name for node in used)}, and run.shared is empty",
                rule="nodes share keys, releases and checkpoints in a folder that all of them mount",
                remedy=f"run.shared=/mnt/fleet in a new run, or cluster.nodes=[{next(n.name for n in nodes() if n.here)}]",
            )
