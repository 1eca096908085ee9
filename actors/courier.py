"""The courier: everything beside the control loop. Inference on the main thread; spool, wire and releases on another.

control process -> steps ring -> Courier.serve_once -> rows -> Uplinker thread -> spool -> gateway
gateway -> Uplinker thread -> mailbox -> PolicyRunner.load -> Courier.serve_once -> chunks ring -> control process
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from typing import Any

import numpy as np

from actors.fragments import ChunkRow, FragmentBuilder, Rows, encode_rows
from actors.policy_runner import PolicyRunner
from actors.records import RecordKind
from actors.ring import Ring, RingClosed
from actors.uplink import Uplink
from fleet.errors import FleetError, FragmentRefused, PolicyError, StorageError
from fleet.robot import Source
from fleet.schema import check_fragment, decode_fragment
from fleet.spec import RobotSpec
from fleet.spool import Spool

log = logging.getLogger("fleet.actor")
MAX_QUEUED_CUTS = 256  # two minutes of fragments of half a second
WIRE_POLL_S = 0.005


@dataclasses.dataclass
class Counters:
    """What a heartbeat reports about the work of this actor."""

    steps: int = 0
    operator_steps: int = 0
    held_steps: int = 0
    episodes: int = 0
    lost_rows: int = 0
    failed_chunks: int = 0
    late_ms_max: float = 0.0
    in_control: float = 0.0  # 1 while an operator has control
    inference_ms: float = 0.0


class Courier:
    """The main thread's part: takes records, runs the policy, cuts fragments.

    Args:
        cuts: Where finished rows go; bounded, and what does not fit is counted in ``Counters.lost_rows``.
    """

    def __init__(
        self,
        spec: RobotSpec,
        steps: Ring,
        chunks: Ring,
        runner: PolicyRunner,
        builder: FragmentBuilder,
        cuts: queue.Queue[Rows],
        counters: Counters,
        fragment_s: float,
    ) -> None:
        self.spec, self.steps, self.chunks = spec, steps, chunks
        self.runner, self.builder, self.cuts = runner, builder, cuts
        self.counters, self.fragment_s = counters, fragment_s
        self._lost_episode = -1

    def serve_once(self, timeout_s: float) -> None:
        """Handles one record, if one comes in time.

        Raises:
            RingClosed: The control process is gone; the open episode was closed as aborted.
        """
        try:
            if self.steps.wait(timeout_s):
                self._handle(self.steps.peek())
                self.steps.release()
        except RingClosed:
            if self.builder.episode_open:
                self.builder.end("aborted", "control process died", -1)
            self.cut()
            raise
        if self.builder.age_s >= self.fragment_s:
            self.cut()

    def cut(self) -> None:
        """Hands the gathered rows to the wire's thread."""
        rows = self.builder.cut()
        if rows is None:
            return
        try:
            if episode_of(rows) == self._lost_episode:
                raise queue.Full  # an episode has no gaps: what follows the lost part is lost too
            self.cuts.put_nowait(rows)
        except queue.Full:
            self._lost_episode = episode_of(rows)
            self.counters.lost_rows += sum(len(table) for table in rows.values())

    def _handle(self, record: np.void) -> None:
        kind = RecordKind(int(record["kind"]))
        self.builder.add(record)
        if kind == RecordKind.OBSERVE and record["wants_chunk"]:
            self._answer(record)
        elif kind == RecordKind.RESULT:
            self._count(record)
        elif kind == RecordKind.CLOSE:
            self.counters.episodes += 1
            self.counters.in_control = 0.0
            self.cut()

    def _answer(self, record: np.void) -> None:
        """The control loop has one request on its way at a time: each is answered, by an empty chunk if need be."""
        episode_id, frame_index = int(record["episode_id"]), int(record["frame_index"])
        chunk: ChunkRow | None = None
        if self.runner.ready:
            prefix_DA = record["prefix"][: int(record["delay"])]
            try:
                chunk = self.runner.act(episode_id, frame_index, self.builder.task, self.builder.observation, prefix_DA)
            except PolicyError as error:
                self._say_failed(error)
        self._send(chunk or ChunkRow(episode_id, -1, frame_index, -1, 0.0, np.zeros((0, self.spec.action.size)), np.zeros(0)))
        if chunk is not None:
            self.counters.inference_ms = chunk.latency_ms
            self.builder.add_chunk(chunk)

    def _send(self, chunk: ChunkRow) -> None:
        slot = self.chunks.reserve()
        if slot is None:
            return  # the control loop is stalled and holds anyway
        slot["episode_id"], slot["frame_index"] = chunk.episode_id, chunk.frame_index
        slot["chunk_id"], slot["version"] = chunk.chunk_id, chunk.version
        slot["horizon"] = len(chunk.actions_HA)
        slot["actions"][: len(chunk.actions_HA)] = chunk.actions_HA
        with contextlib.suppress(RingClosed):  # the control process has ended; what it still had to say is read first
            self.chunks.commit()

    def _say_failed(self, error: PolicyError) -> None:
        self.counters.failed_chunks += 1
        if self.counters.failed_chunks in (1, 10, 100, 1000):
            log.warning(
                "the robot holds, %d chunks have failed: %s", self.counters.failed_chunks, error, exc_info=error.__cause__
            )

    def _count(self, record: np.void) -> None:
        self.counters.steps += 1
        self.counters.operator_steps += bool(record["intervention"])
        self.counters.held_steps += record["source"] == Source.SCRIPT
        self.counters.in_control = float(record["intervention"])
        self.counters.late_ms_max = max(self.counters.late_ms_max, float(record["late_ms"]))


class Uplinker:
    """The wire's thread: encodes rows, writes them to the spool, drives the uplink, loads releases.

    ``failure`` holds the error that ended it, for the main thread to raise.
    """

    def __init__(
        self, robot_id: str, spec: RobotSpec, spool: Spool, uplink: Uplink, runner: PolicyRunner, cuts: queue.Queue[Rows]
    ) -> None:
        self.robot_id, self.spec, self.spool, self.uplink, self.runner, self.cuts = robot_id, spec, spool, uplink, runner, cuts
        self.failure: FleetError | None = None
        self.lost_steps = 0
        self._lost_episode = -1
        self._warned: collections.Counter[str] = collections.Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain_s: float) -> bool:
        """Ends the thread; first waits up to ``drain_s`` for everything to be acknowledged. True if it was."""
        deadline = time.monotonic() + drain_s
        while self._thread.is_alive() and time.monotonic() < deadline and not (self.cuts.empty() and self.uplink.drained):
            time.sleep(0.01)
        self._stop.set()
        self._thread.join(timeout=5)
        return self.cuts.empty() and self.uplink.drained

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._spool_cuts()
                self.uplink.run_once(WIRE_POLL_S)
                self._load_release()
            self._spool_cuts()
            self.uplink.bye()
        except FleetError as error:
            self.failure = error
        except Exception as error:  # a defect; an actor without its wire must end and be started again, not hang
            log.exception("the wire's thread failed")
            self.failure = FleetError(f"the wire's thread failed: {error!r}", remedy="report this with the log above")

    def _spool_cuts(self) -> None:
        wrote = False
        while not self.cuts.empty():
            rows = self.cuts.get_nowait()
            episode = episode_of(rows)
            try:
                if episode == self._lost_episode:
                    raise FragmentRefused(f"a part of episode {episode} was refused", rule="an episode has no gaps")
                directory, payload = encode_rows(self.spec, rows)
                # What the gateway would refuse must not get a number: it would be sent again for ever.
                check_fragment(decode_fragment(directory, payload), self.spec, self.robot_id, self.spool.boot_id)
                self.spool.append(self.spec.hash, directory, payload, episode)
                wrote = True
            except (FragmentRefused, StorageError) as error:
                self._lost_episode = episode
                self.lost_steps += len(rows.get("steps", []))
                self._warn(error.code, f"{self.lost_steps} steps of this robot are lost: {error}")
        if wrote:
            self.spool.flush()

    def _load_release(self) -> None:
        taken = self.uplink.mailbox.take()
        if taken is None:
            return
        manifest, data = taken
        try:
            self.runner.load(manifest, data)
        except PolicyError as error:
            self.uplink.mailbox.refuse(manifest.version)
            self.uplink.tell("release_failed", version=manifest.version, what=error.what)
            if not self.runner.ready:
                raise
            self._warn("release", f"release {manifest.version} is not used, release {self.runner.version} goes on: {error}")
            return
        self.uplink.tell("release_loaded", version=manifest.version, created_ns=manifest.created_ns)

    def _warn(self, topic: str, text: str) -> None:
        self._warned[topic] += 1
        if self._warned[topic] in (1, 10, 100, 1000):
            log.warning("%s", text)


def episode_of(rows: Rows) -> int:
    table: list[dict[str, Any]] = rows.get("steps") or rows.get("episodes") or rows["chunks"]
    return int(table[0]["episode_id"])
