"""The ranks of one learner from their start to their end: they live together and die together.

Nobody is started again here (``handle`` does that). What a rank does wrong, or its death, ends all; the cause is what
happened first and is not merely the echo of it in the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import fleet.errors
from fleet.errors import FleetError, LearnerError, OutOfMemory
from learner.cluster.session import first_line
from learner.cluster.worker import Worker
from learner.placement import Plan, RankPlace

log = logging.getLogger("fleet.cluster")
_GRACE_S = {True: 2.0, False: 0.3}  # from bad news, an echo or not, to the decision which one was the cause
_LESS_MEMORY = "lower learner.image_cache_mb, learner.prefetch_depth, engine.micro_batch or the ranks on that node"
_START_S = 10.0  # Ray starts a process in a few seconds; what takes longer is told
_SILENT_S = 4.0  # a rank answers several times a second
_ECHO = re.compile("lost another rank|did not meet the others|gloo|NCCL|closed by peer|Connection reset|timed out")


@dataclasses.dataclass
class Fate:
    """How a rank ended badly. ``time_s``: when, on this process's wall clock. ``echo``: it tells of another's end."""

    rank: int
    time_s: float
    error: FleetError
    echo: bool = False


class RankGroup:
    """One attempt to train. ``poll`` never blocks; ``kill`` when it is over.

    Args:
        tables: ``learner.main.LEARNER_TABLES``, loaded.
        plan: Not a waiting one.
        folders: The run's folder on each node, by the node's name.
        function: module:function that each rank calls as learner.train.train is called.
    """

    def __init__(
        self,
        tables: Mapping[str, Any],
        plan: Plan,
        folders: Mapping[str, Path],
        function: str = "learner.train:train",
    ) -> None:
        self.plan, self.error, self.done, self.waiting = plan, None, False, ""
        self._tables, self._folders, self._function = tables, folders, function
        self.logs = [folders[s.node.name] / "logs" / f"learner-rank{rank}.log" for rank, s in enumerate(plan.slots)]
        self.pids = [0] * len(plan.slots)
        self.report: Any = {}
        self._actors = [actor(s.node.id, s.cpus, s.gpus, str(path)) for s, path in zip(plan.slots, self.logs, strict=True)]
        self._asked = {rank: a.status.remote() for rank, a in enumerate(self._actors)}
        self._answered = [0.0] * len(plan.slots)
        self._ended: set[int] = set()
        self._fates: dict[int, Fate] = {}
        self._meeting: Any = None
        self._begun = False
        self._decide_at, self._patient_until = float("inf"), time.monotonic() + _START_S

    error: FleetError | None
    """Why the ranks ended, if they did so badly."""

    def poll(self) -> None:
        """Takes what the ranks say: ``report`` (of rank 0), ``pids``, ``waiting``, and at the end ``done`` or ``error``."""
        if self.done or self.error is not None:
            return
        ready, _ = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for rank, reference in list(self._asked.items()):
            if reference in ready:
                del self._asked[rank]
                self._take(rank, reference)
        if self._fates:
            if time.monotonic() >= self._decide_at or len(self._fates) + len(self._ended) == len(self.plan.slots):
                self.error = self._cause()
        elif len(self._ended) == len(self.plan.slots):
            self.done = True
        elif not self._begun:
            self._begin()

    def ask_to_stop(self) -> None:
        """Every rank writes what it has to and ends."""
        for worker in self._actors:
            worker.stop.remote()

    @property
    def begun(self) -> bool:
        """Whether the ranks were told to train."""
        return self._begun

    def kill(self) -> None:
        """Ends all processes, also those that do not answer."""
        for rank, worker in enumerate(self._actors):
            with contextlib.suppress(RayError, ValueError):
                ray.kill(worker)
            if self.plan.slots[rank].node.here:
                kill_worker(self.pids[rank])
        self._asked.clear()

    def _take(self, rank: int, reference: Any) -> None:
        try:
            answer = ray.get(reference)
        except OutOfMemoryError as error:
            self._fail(rank, out_of_memory(self._who(rank), error, _LESS_MEMORY))
            return
        except RayError as error:
            self._fail(rank, self._death(rank, error))
            return
        self.pids[rank], self._answered[rank] = answer["pid"], time.monotonic()
        if rank == 0:
            self.report = answer["report"]
        if answer["error"]:
            own = error_of(answer["error"])
            self._fail(rank, own, answer["error"]["time_s"], bool(_ECHO.search(own.what)))
        elif answer["done"]:
            self._ended.add(rank)
        else:
            self._asked[rank] = self._actors[rank].status.remote()

    def _begin(self) -> None:
        """Once all processes are there: rank 0 says where to meet, then all train."""
        there = [rank for rank, pid in enumerate(self.pids) if pid]
        if len(there) < len(self.plan.slots):
            missing = [self._who(rank) for rank in range(len(self.pids)) if rank not in there]
            if time.monotonic() > self._patient_until:
                self.waiting = f"the learner waits for Ray to start {', '.join(missing[:4])}{' ...' if missing[4:] else ''}"
            return
        if len(self._actors) == 1:
            self._tell(RankPlace())
            return
        if self._meeting is None:
            self._meeting = self._actors[0].rendezvous.remote(self.plan.slots[0].node.address)
        if not ray.wait([self._meeting], timeout=0)[0]:
            return
        try:
            meeting = ray.get(self._meeting)
        except RayError as error:
            self._fail(0, self._death(0, error))
            return
        timeout_s = self._tables["cluster"].rank_timeout_s
        self._tell(*(RankPlace(rank, self.plan.shards, meeting, timeout_s) for rank in range(len(self._actors))))

    def _tell(self, *places: RankPlace) -> None:
        for worker, slot, place in zip(self._actors, self.plan.slots, places, strict=True):
            rank: dict[str, Any] = {"tables": self._tables, "place": place}
            arguments = {"function": self._function, "run": str(self._folders[slot.node.name]), "arguments": rank}
            worker.begin.remote("learner.cluster.worker:run_rank", arguments, slot.node.address if len(places) > 1 else "")
        self._begun, self.waiting = True, ""

    def _fail(self, rank: int, error: FleetError, time_s: float = 0.0, echo: bool = False) -> None:
        self._fates.setdefault(rank, Fate(rank, time_s or time.time(), error, echo))
        self._decide_at = min(self._decide_at, time.monotonic() + _GRACE_S[echo])

    def _cause(self) -> FleetError:
        fates = sorted(self._fates.values(), key=lambda fate: (fate.echo, fate.time_s))
        error = fates[0].error
        silent = [rank for rank in range(len(self.pids)) if rank not in self._fates and rank not in self._ended]
        late = [r for r in silent if self._begun and time.monotonic() - self._answered[r] > _SILENT_S]
        if fates[0].echo and late:
            return LearnerError(
                f"{self._who(late[0])} does not answer; another says: {error.what}", remedy=f"see {self.logs[late[0]]}"
            )
        if len(self.pids) > 1 and "rank" not in error.what:
            return type(error)(f"{self._who(fates[0].rank)}: {error.what}", rule=error.rule, remedy=error.remedy)
        return error

    def _death(self, rank: int, error: RayError) -> LearnerError:
        slot, words = self.plan.slots[rank], ""
        if slot.node.here and (text := tail(self.logs[rank])):
            words = f"; its last words:\n{text}"
        return LearnerError(
            f"the learner's process ended: {self._who(rank)}, {type(error).__name__}",
            remedy=f"see {self.logs[rank]} on {slot.node.name}{words}",
        )

    def _who(self, rank: int) -> str:
        return f"rank {rank} on {self.plan.slots[rank].node.name}"


def actor(node_id: str, cpus: float, gpus: float, output: str) -> Any:
    """A Worker on a node ("" for any), with what is reserved for it. Ray itself never restarts it: the rule is in one place."""
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 4}
    if node_id:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Worker).options(**options).remote(output)


def kill_worker(pid: int) -> None:
    """Ends a worker of Ray on this machine at once; ``ray.kill`` asks first, and gives one that is stuck 5 s."""
    try:
        if pid and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
    except OSError:
        return


def error_of(fields: Mapping[str, Any]) -> FleetError:
    """The error that ``to_fields`` was called on."""
    classes = [c for c in vars(fleet.errors).values() if isinstance(c, type) and issubclass(c, FleetError)]
    cls = next((c for c in classes if c.code == fields["code"]), LearnerError)
    return cls(fields["what"], rule=fields["rule"], remedy=fields["remedy"])


def out_of_memory(who: str, error: OutOfMemoryError, remedy: str) -> OutOfMemory:
    """The error of a process that Ray ended because its node's memory ran out."""
    return OutOfMemory(
        f"{who} was ended by Ray: {first_line(error)}", rule="what runs on a node fits its memory", remedy=remedy
    )


def tail(path: Path, num: int = 8) -> str:
    """The last lines of a log; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - 4096, 0))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-num:])
    except OSError:
        return ""
