"""One actor: drives one robot. ``fleet join FILE`` ends up in ``join``.

This process is the courier; it starts the control process, learns the robot's spec from it, and lets it go once the
gateway answered and a policy is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any

from actors.config import TABLES, ActorConfig
from actors.control import ControlArgs, ControlProcess
from actors.courier import MAX_QUEUED_CUTS, Counters, Courier, Uplinker
from actors.fragments import FragmentBuilder
from actors.mailbox import Mailbox
from actors.policy_runner import PolicyRunner
from actors.ring import RingClosed
from actors.uplink import Uplink
from fleet.config import load_run
from fleet.errors import ConfigError, FleetError, GatewayUnreachable, RobotError
from fleet.identity import Credential
from fleet.memory import keep_freed_memory
from fleet.spool import Spool
from fleet.transport_zmq import ZmqRobotLink

log = logging.getLogger("fleet.actor")
SAY_EVERY_S = 5.0
KEPT_BYTES = 64 * 1024 * 1024  # freed memory that stays with the process
FIRST_RELEASE = (
    "waiting for the first release: the learner publishes it when it has demonstrations; give some with "
    "`fleet join FILE --demonstrate 10`"
)


class Actor:
    """One robot's courier process, from its file to its end.

    Args:
        path: The credential file of ``fleet enroll``; spool and release cache lie beside it in ``<robot id>.state/``.
        overrides: ``table.key=value`` as on the command line.

    Raises:
        FleetError: Whatever of the configuration, the robot or the credential cannot be used.
    """

    def __init__(self, path: Path, overrides: list[str] | None = None) -> None:
        self.credential = Credential.load(path)
        tables = load_run(path, TABLES, overrides or [])
        self.config: ActorConfig = tables["actor"]
        self.stop = threading.Event()
        self.counters = Counters()
        self._tasks: dict[str, Any] = {}
        self._folder = folder = path.parent / f"{self.credential.robot_id}.state"
        # The spool's lock first: a second actor for the same robot must not get as far as opening the hardware.
        self.spool = Spool(folder / "spool", max_bytes=self.config.spool_mb * 1_000_000)
        args = ControlArgs(tables["robot"], tables["operator"], self.config)
        self.control = ControlProcess(multiprocessing.get_context("spawn"), args)
        self.spec = self.control.spec
        self.mailbox = Mailbox(folder / "release", self.credential.release_public)
        self.link = ZmqRobotLink(self.credential)
        self.runner = PolicyRunner(
            self.spec,
            {},
            stream=f"{self.credential.robot_id}/{self.spool.boot_id}",
            execute=self.config.execute,
            guidance=self.config.guidance,
            sample=self.config.sample,
            device=self.config.device,
        )
        self.uplink = Uplink(self.link, self.spool, self.spec, self.mailbox, self._welcome, self._metrics)
        self.cuts: queue.Queue[Any] = queue.Queue(MAX_QUEUED_CUTS)
        self.uplinker = Uplinker(self.credential.robot_id, self.spec, self.spool, self.uplink, self.runner, self.cuts)

    def run(self) -> None:
        """Works until the stated number of episodes is done, or ``stop`` is set.

        Raises:
            FleetError: The gateway refused this robot, or the robot failed.
        """
        self.uplinker.start()
        try:
            if self._wait_until_ready():
                self._work()
        finally:
            self.control.stop()
            drained = self.uplinker.stop(self.config.drain_s)
            self.link.close()
            if not drained:
                log.warning("%d fragments stay in the spool and are sent at the next start", self.spool.num_pending)
            self.spool.close()
        self._raise_failure()

    def _wait_until_ready(self) -> bool:
        started, said = time.monotonic(), 0.0
        while not self.stop.is_set():
            self._raise_failure()
            if not self.control.alive:
                raise RobotError("the control process died while it waited", rule="it runs until it is stopped")
            if self._tasks and (self.runner.ready or self.config.demonstrate):
                return True
            waited = time.monotonic() - started
            if 0 < self.config.wait_for_gateway_s < waited and not self.uplink.connected:
                raise self._unreachable()
            if waited - said >= SAY_EVERY_S:
                said = waited
                log.warning("%s", FIRST_RELEASE if self.uplink.connected else str(self._unreachable()))
            time.sleep(0.01)
        return False

    def _unreachable(self) -> FleetError:
        """Why nothing answers, as far as the link can tell."""
        return self.link.last_error or GatewayUnreachable(
            f"nothing answers at {self.credential.endpoint}", rule="the gateway of the run listens there", remedy="trying again"
        )

    def _work(self) -> None:
        names = self.config.tasks or sorted(self._tasks)
        unknown = sorted(set(names) - set(self._tasks))
        if unknown:
            raise ConfigError(f"actor.tasks has {unknown}", rule=f"the run's tasks are {sorted(self._tasks)}")
        instructions = {task: str(entry["instruction"]) for task, entry in self._tasks.items()}
        builder = FragmentBuilder(self.spec, self.credential.robot_id, self.spool.boot_id, instructions)
        steps, chunks = self.control.go(names, f"{self.credential.robot_id}/{self._count_start()}")
        courier = Courier(self.spec, steps, chunks, self.runner, builder, self.cuts, self.counters, self.config.fragment_s)
        try:
            while True:
                if self.stop.is_set() or self.uplinker.failure is not None:
                    self.control.ask_to_stop()
                courier.serve_once(0.05)
        except RingClosed:
            self.control.join()
        if self.control.failure is not None and not self.stop.is_set():
            raise self.control.failure

    def _count_start(self) -> int:
        """Which start of this robot this is: each draws episode starts of its own, the same ones in a repeated run."""
        path = self._folder / "starts"
        with contextlib.suppress(OSError, ValueError):  # missing, or damaged by a power loss: count anew
            number = int(path.read_text()) + 1
            path.write_text(str(number))
            return number
        path.write_text("1")
        return 1

    def _welcome(self, tasks: dict[str, Any], settings: dict[str, Any]) -> None:
        texts = {task: str(entry["instruction"]) for task, entry in tasks.items()}
        self.runner.set_embeddings({task: entry["embedding"] for task, entry in tasks.items()}, texts)
        self._tasks = tasks

    def _metrics(self) -> dict[str, float]:
        late, self.counters.late_ms_max = self.counters.late_ms_max, 0.0
        spool = {
            "spool": self.spool.num_pending,
            "spool_bytes": self.spool.bytes_pending,
            "dropped_steps": self.spool.dropped_steps,
        }
        here = {"late_ms_max": late, "version": self.runner.version, "lost_steps": self.uplinker.lost_steps}
        return {**dataclasses.asdict(self.counters), **spool, **here}

    def _raise_failure(self) -> None:
        if self.uplinker.failure is not None:
            raise self.uplinker.failure


def join(path: Path, overrides: list[str] | None = None) -> None:
    """Runs an actor until it is done or gets SIGINT or SIGTERM.

    Raises:
        FleetError: See ``Actor``.
    """
    keep_freed_memory(KEPT_BYTES)
    actor = Actor(path, overrides)

    def ask_to_stop(number: int, frame: object) -> None:
        actor.stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    try:
        actor.run()
    finally:
        if actor.control.alive:
            actor.control.kill()
    if not actor.config.num_episodes:
        return
    if actor.counters.episodes < actor.config.num_episodes and not actor.stop.is_set():
        raise RobotError(f"{actor.counters.episodes} of {actor.config.num_episodes} episodes were done", rule="all are done")
