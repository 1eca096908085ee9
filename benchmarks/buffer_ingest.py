"""Ingest over TCP loopback: ours as shipped and in the clear, with and without the robot's spool, and Reverb.

All repeats of all systems are interleaved, so that a slow minute of the machine meets everybody.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from pathlib import Path

import numpy as np

from benchmarks.buffer_data import STEP_BYTES, WARM_STEPS, make_frames
from benchmarks.buffer_limits import disk_bytes_per_s, memcpy_bytes_per_s, tcp_bytes_per_s
from benchmarks.buffer_process import ROOT, Child, Timing, measure, shard
from benchmarks.buffer_report import Peers, measured, median, say
from benchmarks.results import Row
from buffer.reader import LogReader
from fleet.schema import decode_fragment

CLIENTS = (1, 4)


@dataclasses.dataclass(frozen=True)
class Way:
    """One system in one setting."""

    name: str
    wire: str = "curve"
    spool: bool = False
    codec: str = "raw"
    items: str = ""  # Reverb's, see peers/reverb_client


PLAIN, CURVE = Way("plain, no spool", "plain"), Way("CURVE, no spool")
OURS = (
    PLAIN,
    Way("plain, spool", "plain", spool=True),
    CURVE,
    Way("CURVE, spool", spool=True),
    Way("CURVE, no spool, JPEG 224x224", codec="jpeg"),
)
REVERB, REVERB_RUNS = Way("Reverb, items that are windows", items="windows"), Way("Reverb, runs of 16 steps", items="runs")


@dataclasses.dataclass(frozen=True)
class Rate:
    """Steps a second, and CPU-ms per 1,000 steps of clients and server."""

    steps_per_s: float
    client_ms: float
    server_ms: float

    @property
    def cpu_ms(self) -> float:
        return self.client_ms + self.server_ms

    @classmethod
    def of(cls, timing: Timing, steps: int) -> Rate:
        return cls(steps / timing.wall_s, 1e6 * timing.client_s / steps, 1e6 * timing.server_s / steps)


def run(folder: Path, peers: Peers, *, repeats: int, steps: int) -> list[Row]:
    """Rows for 1 and 4 clients; ``steps`` in all, shared among the clients."""
    frames = folder / "frames.npy"
    np.save(frames, make_frames(128, seed=0))
    ways = [*OURS, *((REVERB, REVERB_RUNS) if peers.reverb else ())]
    rates: dict[tuple[Way, int], list[Rate]] = collections.defaultdict(list)
    limits: dict[str, list[float]] = collections.defaultdict(list)
    for repeat in range(-1, repeats):  # the first is not counted: it makes the machine touch its memory
        for name, limit in (("memcpy", memcpy_bytes_per_s()), ("tcp", tcp_bytes_per_s()), ("disk", disk_bytes_per_s(folder))):
            limits[name] += [limit] * (repeat >= 0)
        for way in ways if repeat >= 0 else ways[:1]:
            for clients in CLIENTS:
                each = steps // clients
                timing = _reverb(folder, peers, way, clients, each) if way.items else _ours(folder, way, clients, each)
                rate = Rate.of(timing, each * clients)
                rates[way, clients] += [rate] * (repeat >= 0)
                say(f"{repeat + 1}/{repeats} {way.name}, {clients}: {rate.steps_per_s:.0f} steps/s, {rate.cpu_ms:.0f} CPU-ms")
    return [*_limit_rows(limits), *_rows(rates, median(limits["disk"]) / STEP_BYTES, peers)]


def _ours(folder: Path, way: Way, clients: int, steps: int) -> Timing:
    with shard(folder / "ingest", plain=way.wire == "plain") as running:
        children = []
        for i in range(clients):
            credential = running.credential(f"robot-{i}")
            spool = running.run.path / f"spool-{i}" if way.spool else "-"
            command = [sys.executable, "-m", "benchmarks.buffer_client", credential, spool, way.wire, way.codec, str(steps)]
            children.append(Child(command, folder / "clients.log"))
        timing = measure(running.pid, children)
        _check_all_stored(running.run.buffer, clients, steps)
    return timing


def _check_all_stored(buffer: Path, clients: int, steps: int) -> None:
    """RuntimeError unless every step that was acknowledged is in the log, once."""
    reader, stored = LogReader(buffer, verify=False), 0
    keys: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for record in reader.poll():
        keys[record.robot_id, record.boot_id, record.seq] += 1
        stored += decode_fragment(record.tables, record.payload).num_steps
    reader.close()
    if stored != clients * (steps + WARM_STEPS) or max(keys.values()) > 1:
        raise RuntimeError(f"{stored} steps in the log, {clients * (steps + WARM_STEPS)} were acknowledged")


def _reverb(folder: Path, peers: Peers, way: Way, clients: int, steps: int) -> Timing:
    here, log = ROOT / "benchmarks" / "peers", folder / "peers.log"
    server = Child([peers.reverb, here / "reverb_server.py", "100000"], log)
    try:
        port = server.wait_for("port")
        command = [peers.reverb, here / "reverb_client.py", port, str(steps), way.items, folder / "frames.npy"]
        return measure(server.process.pid, [Child(command, log) for _ in range(clients)])
    finally:
        server.end()


def _limit_rows(limits: dict[str, list[float]]) -> list[Row]:
    names = {
        "memcpy": "memcpy, one thread",
        "tcp": "TCP over loopback",
        "disk": "disk, fdatasync every 8 fragments of 16 steps",
    }
    return [measured(f"limit: {text}", [v / 1e9 for v in limits[name]], "GB/s", 2) for name, text in names.items()]


def _rows(rates: dict[tuple[Way, int], list[Rate]], disk_steps_per_s: float, peers: Peers) -> list[Row]:
    rows = []
    for (way, clients), found in rates.items():
        where = f"ingest, {way.name}, {clients} client{'s' * (clients > 1)}"
        peer = rates.get((REVERB, clients), [])
        rate = measured(f"{where}: steps", [r.steps_per_s for r in found], "steps/s")
        cpu = measured(f"{where}: CPU", [r.cpu_ms for r in found], "ms/1000 steps")
        cpu.why = f"clients {median([r.client_ms for r in found]):.0f}, server {median([r.server_ms for r in found]):.0f}"
        if not way.items:
            _judge(way, rate, cpu, peer, disk_steps_per_s, peers)
        rows += [rate, cpu]
    return rows


def _judge(way: Way, rate: Row, cpu: Row, peer: list[Rate], disk_steps_per_s: float, peers: Peers) -> None:
    """Fills in peer, limit and target of the rows of one of our ways."""
    rate.limit = f"disk with fsync {disk_steps_per_s:.0f} steps/s"
    rate.peer = cpu.peer = "Reverb"
    if not peer:
        rate.why = peers.why_no_reverb
        return
    rate.peer_value, cpu.peer_value = round(median([r.steps_per_s for r in peer])), round(median([r.cpu_ms for r in peer]))
    assert rate.value is not None and cpu.value is not None
    if way == PLAIN:
        needed = min(2 * rate.peer_value, 0.7 * disk_steps_per_s)
        rate.target, rate.met = f">= {needed:.0f}: the smaller of 2x Reverb and 0.7x the disk", rate.value >= needed
        cpu.target, cpu.met = f"<= {cpu.peer_value / 2:.0f}: half of Reverb", cpu.value <= cpu.peer_value / 2
    elif way == CURVE:
        rate.target, rate.met = ">= Reverb", rate.value >= rate.peer_value
        cpu.target, cpu.met = "<= Reverb", cpu.value <= cpu.peer_value
