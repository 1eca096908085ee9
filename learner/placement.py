"""Which node gets which ranks. Pure: nodes and a configuration in, a plan out. Needs no torch.

    ranks = plan(nodes, tables["cluster"], tables["learner"].device)
    for slot in ranks.slots: ...           # rank by rank; empty while ranks.waiting says why

Ranks of one node stand next to each other and read that node's shard of the buffer; the first node of the list comes first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fleet.batch import Split
from fleet.errors import ConfigError
from fleet.files import Files
from learner.main import ClusterConfig


@dataclasses.dataclass(frozen=True)
class Node:
    """A machine of a Ray cluster. ``name`` is what users call it; ``cpus`` and ``gpus`` are what it has when idle;
    ``here``: this process runs on it; ``robots``: ids of robots whose host it is."""

    id: str
    name: str
    address: str
    cpus: float
    gpus: float
    here: bool = False
    robots: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one rank: its node, the shard that it reads, and what is reserved for it."""

    node: Node
    shard: int
    gpus: float
    cpus: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rank r gets ``slots[r]``. ``wanted``: ranks there would be with all nodes. ``waiting``: why there is no rank now."""

    slots: tuple[Slot, ...]
    wanted: int
    waiting: str = ""

    @property
    def shards(self) -> tuple[int, ...]:
        """Shard by rank."""
        return tuple(slot.shard for slot in self.slots)

    def better_than(self, other: Plan) -> bool:
        """Whether it has more ranks, or as many on more nodes."""
        return _worth(self) > _worth(other)


def plan(nodes: Sequence[Node], cluster: ClusterConfig, device: str, lost: Sequence[Node] = ()) -> Plan:
    """Places ranks on the nodes that are there.

    Nodes in ``cluster.nodes`` get at least one rank each, evenly as far as they have room. Where none is named, nodes are
    filled one after the other; hosts of robots are left out then, unless this process runs there.

    Args:
        nodes: That are there now, this one first.
        device: ``learner.device``.
        lost: Nodes that were there earlier and may come back: with them a plan that cannot be made now only waits.

    Raises:
        ConfigError: No plan is possible even with ``lost`` and when all is idle. It says what is there.
    """
    here_now = {node.name for node in nodes}
    known = [*nodes, *(node for node in lost if node.name not in here_now)]
    candidates = _candidates(known, cluster)
    _check_names([node for node in nodes if node in candidates])
    gpus = _gpus_per_rank(candidates, cluster, device)
    room = {node.name: _room(node, cluster.cpus_per_rank, gpus) for node in candidates}
    wanted = cluster.ranks or _auto_ranks(candidates, cluster, gpus)
    if cluster.nodes:
        quota = _spread(candidates, cluster, room, wanted)
    else:
        present = [node for node in candidates if node.name in here_now]
        quota = _fill(present, room, wanted)
    if sum(room.values()) < wanted:
        raise _no_room(candidates, cluster, gpus, wanted, sum(room.values()))
    slots: list[Slot] = []
    for node in candidates:
        if node.name in here_now and quota.get(node.name):
            shard = slots[-1].shard + 1 if slots else 0
            slots += [Slot(node, shard, gpus, cluster.cpus_per_rank)] * quota[node.name]
    if len(slots) < cluster.min_ranks or not slots:
        away = ", ".join(node.name for node in candidates if node.name not in here_now) or "none"
        return Plan((), wanted, f"room for {len(slots)} of at least {cluster.min_ranks} ranks; nodes that are away: {away}")
    return Plan(tuple(slots), wanted)


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """Which rank a process is. ``shards``: number of the shard that each rank reads, ascending from 0.

    ``rendezvous``: tcp://HOST:PORT of rank 0, "" where there is one rank. ``timeout_s``: of every exchange; a rank that
    does not answer in time is taken for dead.
    """

    rank: int = 0
    shards: tuple[int, ...] = (0,)
    rendezvous: str = ""
    timeout_s: float = 120.0

    @property
    def size(self) -> int:
        return len(self.shards)

    @property
    def num_shards(self) -> int:
        return self.shards[-1] + 1

    @property
    def leaders(self) -> list[int]:
        """The first rank of each shard."""
        return [self.shards.index(shard) for shard in range(self.num_shards)]

    def split(self) -> Split:
        """The part of each batch that this rank makes."""
        return Split(self.rank, self.shards)


class KnownNodes:
    """Nodes that a run has seen, in a file: who starts again while one of them is away must know that it may come back.

    Args:
        path: JSON; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            rows = json.loads(path.read_text())
            self._nodes = {row["name"]: Node(**{**row, "robots": tuple(row["robots"])}) for row in rows}
        except (OSError, ValueError, TypeError, KeyError):
            self._nodes = {}

    def lost(self, nodes: Sequence[Node]) -> list[Node]:
        """Remembers ``nodes`` and returns those of earlier times that are not among them."""
        new = {node.name: dataclasses.replace(node, id="", here=False) for node in nodes}
        if any(self._nodes.get(name) != node for name, node in new.items()):
            self._nodes |= new
            text = json.dumps([dataclasses.asdict(node) for node in self._nodes.values()])
            with contextlib.suppress(OSError):  # of use after a restart only; a full disk ends nobody
                Files().write_atomic(self._path, text.encode())
        return [node for name, node in self._nodes.items() if name not in new]


def _worth(plan: Plan) -> tuple[int, int]:
    return len(plan.slots), len(set(plan.shards))


def _candidates(known: Sequence[Node], cluster: ClusterConfig) -> list[Node]:
    if not cluster.nodes:
        return [node for node in known if node.here or not node.robots]
    by_name = {node.name: node for node in reversed(known)}
    for name in cluster.nodes:
        if name not in by_name:
            raise ConfigError(
                f"cluster.nodes has {name!r}, and the Ray cluster has {_list(known)}",
                rule="each node of cluster.nodes is in the cluster",
                remedy=f"start it with `ray start --address ... --node-name {name}`, or take it out of cluster.nodes",
            )
    repeated = [name for name, count in collections.Counter(cluster.nodes).items() if count > 1]
    if repeated:
        raise ConfigError(f"cluster.nodes has {repeated[0]!r} twice", rule="each node is named once")
    return sorted((by_name[name] for name in cluster.nodes), key=lambda node: not node.here)


def _gpus_per_rank(candidates: Sequence[Node], cluster: ClusterConfig, device: str) -> float:
    gpus, there = cluster.gpus_per_rank, any(node.gpus > 0 for node in candidates)
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"cluster.gpus_per_rank = {gpus:g}", rule="a whole number of GPUs, or a part of one")
    if device == "cuda" and not there:
        raise ConfigError(
            f"learner.device = 'cuda', and the Ray cluster has {_list(candidates)}",
            rule="cuda needs a GPU that Ray knows of",
            remedy="learner.device=auto, or start Ray's node with --num-gpus",
        )
    return (1.0 if there and device != "cpu" else 0.0) if gpus == -1 else gpus


def _auto_ranks(candidates: Sequence[Node], cluster: ClusterConfig, gpus: float) -> int:
    if gpus:
        return max(sum(int(node.gpus / max(gpus, 1.0)) for node in candidates), len(cluster.nodes), 1)
    return max(len(cluster.nodes), 1)


def _room(node: Node, cpus: float, gpus: float) -> int:
    """Ranks that the node can hold when it is idle."""
    by_cpu = int(node.cpus / cpus + 1e-6) if cpus else 4096
    by_gpu = int(node.gpus) * int(1 / gpus + 1e-6) if 0 < gpus < 1 else int(node.gpus / gpus) if gpus else 4096
    return min(by_cpu, by_gpu)


def _fill(nodes: Sequence[Node], room: dict[str, int], wanted: int) -> dict[str, int]:
    quota: dict[str, int] = {}
    for node in nodes:
        quota.setdefault(node.name, min(room[node.name], wanted - sum(quota.values())))
    return quota


def _spread(nodes: Sequence[Node], cluster: ClusterConfig, room: dict[str, int], wanted: int) -> dict[str, int]:
    """By turns, so that what a node gets does not depend on who is away."""
    if wanted < len(nodes):
        raise ConfigError(
            f"cluster.ranks = {wanted}, and cluster.nodes has {len(nodes)} nodes",
            rule="each node of cluster.nodes trains with at least one rank",
            remedy=f"cluster.ranks={len(nodes)}, or fewer nodes",
        )
    quota = dict.fromkeys((node.name for node in nodes), 0)
    while sum(quota.values()) < min(wanted, sum(room.values())):
        for name in quota:
            if quota[name] < room[name] and sum(quota.values()) < wanted:
                quota[name] += 1
    return quota


def _no_room(nodes: Sequence[Node], cluster: ClusterConfig, gpus: float, wanted: int, room: int) -> ConfigError:
    each = f"{cluster.cpus_per_rank:g} CPUs and {gpus:g} GPUs each"
    smaller = [f"cluster.ranks={room}"] if room and room >= len(cluster.nodes) else []
    if gpus and sum(_room(node, cluster.cpus_per_rank, 0) for node in nodes) >= wanted:
        smaller.append("cluster.gpus_per_rank=0" if not any(node.gpus for node in nodes) else "a smaller cluster.gpus_per_rank")
    elif any(_room(node, cluster.cpus_per_rank, gpus) < _room(node, 0, gpus) for node in nodes):
        smaller.append("a smaller cluster.cpus_per_rank")
    return ConfigError(
        f"cluster.ranks = {wanted} with {each}, and the Ray cluster has {_list(nodes)}",
        rule=f"there is room for {room} such ranks even when all is idle",
        remedy=", or ".join([*smaller, "add nodes"]),
    )


def _check_names(nodes: Sequence[Node]) -> None:
    for name, count in collections.Counter(node.name for node in nodes).items():
        if count > 1:
            raise ConfigError(
                f"{count} nodes of the Ray cluster are called {name!r}",
                rule="nodes that train have names of their own",
                remedy="start each with `ray start ... --node-name NAME`",
            )


def _list(nodes: Sequence[Node]) -> str:
    return "; ".join(f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes) or "no node"
