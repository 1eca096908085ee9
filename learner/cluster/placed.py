"""A long-running function in a process that Ray places: evaluators and simulators. Nothing else waits for it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError

from fleet.errors import FleetError, LearnerError
from learner.cluster.group import actor, error_of, kill_worker, out_of_memory
from learner.cluster.handle import FINAL
from learner.cluster.session import first_line
from learner.placement import Node
from learner.restarts import RestartRule

log = logging.getLogger("fleet.cluster")
_TRY_AGAIN_S = 60.0


@dataclasses.dataclass
class PlacedStatus:
    """What is known of it. ``pid`` 0: it does not run (yet, or again). ``report``: the newest that it gave, also across
    restarts. ``done``: its function returned, it was stopped, or its error is one that a restart cannot help."""

    name: str
    pid: int = 0
    done: bool = False
    restarts: int = 0
    last_error: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


class Placed:
    """Runs ``function(stop=Callable[[], bool], report=Callable[[dict], None], **arguments)`` somewhere, again when it fails.

    In a crash loop it is tried again once a minute, for ever.

    Args:
        function: module:function.
        arguments: Plain data.
        node: Where; None: where Ray has room.
        output: File on that node for what it prints; None: Ray's own logs.
    """

    def __init__(
        self,
        name: str,
        function: str,
        arguments: Mapping[str, Any],
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        node: Node | None = None,
        *,
        output: Path | None = None,
        rule: RestartRule | None = None,
    ) -> None:
        self.status = PlacedStatus(name)
        self._function, self._arguments, self._node = function, arguments, node
        self._reserved, self._output, self._rule = (num_cpus, num_gpus), str(output or ""), rule or RestartRule()
        self._actor: Any = None
        self._asked: Any = None
        self._start_at = 0.0

    def poll(self) -> PlacedStatus:
        """The newest status; starts what is due. Never waits and never raises for what the function does."""
        if self.status.done:
            return self.status
        if self._actor is None:
            if time.monotonic() >= self._start_at:
                self._actor = actor(self._node.id if self._node else "", *self._reserved, self._output)
                self._actor.begin.remote(self._function, self._arguments)
                self._asked = self._actor.status.remote()
            return self.status
        if ray.wait([self._asked], timeout=0)[0]:
            try:
                self._take(ray.get(self._asked))
            except OutOfMemoryError as error:
                self._failed(out_of_memory(self.status.name, error, "place it elsewhere, or less beside it"))
            except RayError as error:
                self._failed(
                    LearnerError(f"the process of {self.status.name} ended: {type(error).__name__} {first_line(error)}")
                )
        return self.status

    def stop(self, timeout_s: float = 10.0) -> PlacedStatus:
        """Asks it to end, and kills it after ``timeout_s``."""
        if self._actor is not None:
            self._actor.stop.remote()
            deadline = time.monotonic() + timeout_s
            while not self.poll().done and self._actor is not None and time.monotonic() < deadline:
                time.sleep(0.02)
            self._drop()
        self.status.done = True
        return self.status

    def _take(self, answer: dict[str, Any]) -> None:
        self.status.pid, self.status.report = answer["pid"], answer["report"] or self.status.report
        if answer["error"]:
            self._failed(error_of(answer["error"]))
        elif answer["done"]:
            self._drop()
            self.status.done = True
        else:
            self._asked = self._actor.status.remote()

    def _failed(self, error: FleetError) -> None:
        self._drop()
        self.status.last_error = str(error)
        if error.code in FINAL:
            self.status.done = True
            log.error("%s is not started again: %s", self.status.name, error)
            return
        pause_s = self._rule.failed(time.monotonic())
        log.warning("%s failed: %s", self.status.name, error)
        self.status.restarts += 1
        self._start_at = time.monotonic() + (_TRY_AGAIN_S if pause_s is None else pause_s)

    def _drop(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            if self._node is not None and self._node.here:
                kill_worker(self.status.pid)
        self._actor = self._asked = None
        self.status.pid = 0
