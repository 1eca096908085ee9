"""One simulated robot that works when it is told to, in the learner's own thread: so many steps between two updates, no more.

The control loop, the courier with its policy runner, the operator, the fragments, ingest and log are those of a robot; only
what lies between processes is replaced: rings by lists, the wire by a call. Nothing here depends on a clock but the times
that are recorded.
"""

from __future__ import annotations

import collections
import math
import queue
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from actors.control import NoOperator
from actors.courier import MAX_QUEUED_CUTS, Counters, Courier
from actors.fragments import FragmentBuilder, Rows, encode_rows
from actors.loop import ControlLoop, LoopSettings
from actors.operators import make_operator
from actors.policy_runner import PolicyRunner
from actors.records import chunk_dtype, step_dtype
from actors.robots import make_robot
from actors.safety import SafetyFilter
from buffer.ingest import Ingest
from buffer.log import Log
from fleet.releases import Manifest
from fleet.robot import Operator
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore

FRAGMENT_STEPS = 10  # half a second at 20 Hz
RELEASE_WAIT_S = 120.0
BOOT_ID = "0" * 16


class Mail:
    """``actors.ring.Ring`` within one thread.

    Args:
        arrived: Called at each commit.
    """

    def __init__(self, dtype: np.dtype[Any], arrived: Callable[[], None] | None = None) -> None:
        self._dtype, self._arrived = dtype, arrived
        self._records: collections.deque[Any] = collections.deque()
        self._new: Any = None

    def reserve(self) -> Any:
        self._new = np.zeros(1, self._dtype)[0]
        return self._new

    def commit(self) -> None:
        self._records.append(self._new)
        if self._arrived is not None:
            self._arrived()

    def wait(self, timeout_s: float) -> bool:
        return bool(self._records)

    def peek(self) -> Any:
        return self._records[0]

    def release(self) -> None:
        self._records.popleft()


def await_release(store: ReleaseStore, step: int) -> Manifest:
    """The newest release, as soon as it is that of update ``step`` or a later one: a thread writes it.

    Raises:
        TimeoutError: It does not come.
    """
    deadline = time.monotonic() + RELEASE_WAIT_S
    while True:
        version = store.newest()
        if version is not None and (manifest := store.manifest(version)).step >= step:
            return manifest
        if time.monotonic() > deadline:
            raise TimeoutError(f"no release of update {step} or later after {RELEASE_WAIT_S:.0f} s")
        time.sleep(0.002)


class LockstepRobot:
    """A robot of a run, its log beside it.

    Args:
        tables: "robot", "operator" and "actor" of the run file.
        catalogue: The run's tasks.json.
        keep: Whether an episode goes to the log, by its task and outcome; None: each fragment does at once.

    Attributes:
        counters: What it did: ``steps``, ``operator_steps``, ``episodes``.
    """

    def __init__(
        self,
        run: RunFolder,
        robot_id: str,
        tables: Mapping[str, Any],
        catalogue: Mapping[str, Any],
        keep: Callable[[str, str], bool] | None = None,
    ) -> None:
        actor, operator = tables["actor"], tables["operator"]
        self._store, self._robot_id, self._keep = ReleaseStore(run.releases), robot_id, keep
        self.robot = make_robot(tables["robot"].adapter, **tables["robot"].settings)
        spec = self.robot.spec
        self._operator: Operator = NoOperator()
        if operator.adapter != "none":
            self._operator = make_operator(operator.adapter, control_hz=spec.control_hz, **operator.settings)
        self._log = Log(run.buffer)
        self._ingest = Ingest(self._log)
        self._seq = self._ingest.admit(robot_id, BOOT_ID, spec)
        tasks = actor.tasks or list(catalogue)
        embeddings = {task: entry["embedding"] for task, entry in catalogue.items()}
        instructions = {task: str(entry["instruction"]) for task, entry in catalogue.items()}
        settings = {"execute": actor.execute, "guidance": actor.guidance, "sample": actor.sample}
        self._runner = PolicyRunner(spec, embeddings, stream=f"{actor.seed}/{robot_id}", **settings)
        self._runner.set_embeddings(embeddings, instructions)
        self._cuts: queue.Queue[Rows] = queue.Queue(MAX_QUEUED_CUTS)
        self._waiting: list[Rows] = []  # of an episode whose outcome decides
        self.counters = Counters()
        steps: Any = Mail(step_dtype(spec), lambda: self._courier.serve_once(0.0))
        chunks: Any = Mail(chunk_dtype(spec))
        builder = FragmentBuilder(spec, robot_id, BOOT_ID, instructions)
        self._courier = Courier(spec, steps, chunks, self._runner, builder, self._cuts, self.counters, math.inf)
        self._stopped = False
        how = LoopSettings(
            tasks, actor.first_task, actor.seed, robot_id, actor.num_episodes, actor.chunk_rule(), realtime=False
        )
        safety = SafetyFilter(spec, actor.safety)
        loop = ControlLoop(
            self.robot, self._operator, safety, steps, chunks, how, lambda: self._stopped, demonstrates=actor.demonstrate
        )
        self._ticks = loop.ticks()

    def take_release(self, step: int) -> None:
        """Acts by the newest release from here on, which is at least that of update ``step``; see ``await_release``."""
        manifest = await_release(self._store, step)
        if manifest.version != self._runner.version:
            self._runner.load(manifest, self._store.load(manifest.version))

    def work(self, num_steps: int) -> None:
        """Makes so many steps; then all of them are in the log."""
        for _ in range(num_steps):
            next(self._ticks)
            if self._keep is None and self.counters.steps % FRAGMENT_STEPS == 0:
                self._courier.cut()
            if self._cuts.qsize() > MAX_QUEUED_CUTS // 2:
                self._store_cuts()
        if self._keep is None:
            self._courier.cut()
        self._store_cuts()

    def close(self) -> None:
        """Ends the open episode as aborted, if there is one."""
        if self._courier.builder.episode_open:
            self._stopped = True
            next(self._ticks, None)
            self._store_cuts()
        self._ticks.close()
        self._log.close()
        self.robot.close()

    def _store_cuts(self) -> None:
        while not self._cuts.empty():
            rows = self._cuts.get_nowait()
            if self._keep is None:
                self._offer(rows)
                continue
            self._waiting.append(rows)
            closed = [row for row in rows.get("episodes", ()) if row["event"] == "closed"]
            if closed:
                if self._keep(closed[0]["task"], closed[0]["outcome"]):
                    for waited in self._waiting:
                        self._offer(waited)
                self._waiting.clear()
        self._ingest.commit()

    def _offer(self, rows: Rows) -> None:
        self._seq += 1
        directory, payload = encode_rows(self.robot.spec, rows)
        fields = {"boot_id": BOOT_ID, "seq": self._seq, "spec_hash": self.robot.spec.hash, "tables": directory}
        self._ingest.offer(self._robot_id, fields, payload)
