"""Ray: the learner as an actor process that is watched, and started again from its newest checkpoint when it dies.

    handle = LearnerHandle(run, tables)          # start_ray() first
    while not handle.poll().done: ...            # never blocks
    handle.stop()

Ray keeps the process and moves small facts; all that a restarted learner needs it reads from the run folder.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

import fleet.errors
from fleet.errors import FleetError, LearnerError
from fleet.runfolder import RunFolder
from learner.progress import Progress

log = logging.getLogger("fleet.learner")
FINAL = ("config", "policy", "run_folder", "spec", "identity")  # starting again cannot help
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # nothing of size goes through Ray


def start_ray(address: str | None = None, num_cpus: int | None = None) -> None:
    """Joins the Ray cluster at ``address``, or starts a quiet one on this machine that ends with this process.

    Raises:
        LearnerError: No cluster answers at ``address``.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    # Workers must find these packages also when they are not installed but lie beside this file.
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH", "")])]
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    if not address:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env=env,
            **quiet,
        )
        return
    try:
        ray.init(address=address, runtime_env=env, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LearnerError(
            f"no Ray cluster at {address!r}: {error}", remedy="start one with `ray start --head`, or leave it out"
        ) from None


def stop_ray() -> None:
    """Leaves the cluster; a local one ends."""
    ray.shutdown()


class _Learner:
    """Runs in the actor process: the loop on a thread, its progress for whoever asks."""

    def __init__(self, run_path: str, tables: Mapping[str, Any]) -> None:
        self._run, self._tables = RunFolder.open(Path(run_path)), tables
        self._stop, self._done = threading.Event(), False
        self._progress = Progress()
        self._error: dict[str, str] = {}
        self._thread = threading.Thread(target=self._work, name="learner", daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "done": self._done, "error": self._error, "progress": dataclasses.asdict(self._progress)}

    def stop(self, timeout_s: float) -> dict[str, Any]:
        """Asks the loop to end; returns when what was learnt is on disk."""
        self._stop.set()
        self._thread.join(timeout_s)
        return self.status()

    def _work(self) -> None:
        from learner.train import train

        def report(progress: Progress) -> None:
            self._progress = progress

        try:
            train(self._run, self._tables, stop=self._stop.is_set, report=report)
        except FleetError as error:
            self._error = error.to_fields()
        except BaseException as error:  # shown by the handle, which decides what happens next
            log.exception("the learner failed")
            self._error = {
                "code": "error",
                "what": f"{type(error).__name__}: {error}",
                "rule": "",
                "remedy": "see the learner's log",
            }
        self._done = True


@dataclasses.dataclass
class RestartRule:
    """When a learner that failed is started again. No I/O: times in, pauses out.

    Args:
        max_failures, window_s: So many failures within so many seconds are a crash loop.
        first_s, longest_s: The pause doubles from the one to the other, and starts over after a window without failure.
    """

    max_failures: int = 5
    window_s: float = 60.0
    first_s: float = 0.5
    longest_s: float = 10.0
    _failures: collections.deque[float] = dataclasses.field(default_factory=collections.deque)

    def failed(self, now_s: float) -> float | None:
        """The pause in seconds before the next start; None when there is to be none."""
        self._failures.append(now_s)
        while self._failures[0] <= now_s - self.window_s:
            self._failures.popleft()
        if len(self._failures) >= self.max_failures:
            return None
        return float(min(self.first_s * 2 ** (len(self._failures) - 1), self.longest_s))


@dataclasses.dataclass
class LearnerStatus:
    """What is known of the learner. ``pid`` 0: it is not running (yet, or again). ``last_error``: of the newest failure."""

    pid: int = 0
    done: bool = False
    restarts: int = 0
    last_error: str = ""
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)


class LearnerHandle:
    """Starts the learner of a run as a Ray actor and keeps it running.

    Args:
        tables: ``learner.main.LEARNER_TABLES``, loaded.
        num_cpus, num_gpus: What Ray reserves for it.
    """

    def __init__(
        self,
        run: RunFolder,
        tables: Mapping[str, Any],
        *,
        num_cpus: float = 1,
        num_gpus: float = 0,
        rule: RestartRule | None = None,
    ) -> None:
        self._run, self._tables, self._rule = (
            run,
            {n: tables[n] for n in ("learner", "engine", "policy", "algorithm", "start")},
            rule or RestartRule(),
        )
        # Two threads: one answers while the other waits in stop(). Ray itself never restarts it, so the rule is in one place.
        options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_concurrency": 2}
        self._class = ray.remote(_Learner).options(**options)
        self._actor: Any = None
        self._asked: Any = None
        self._start_at = 0.0
        self.status = LearnerStatus()

    def poll(self) -> LearnerStatus:
        """The newest status; starts what is due. Never waits for the learner.

        Raises:
            FleetError: The learner cannot run: its own error, or that of a crash loop.
        """
        if self.status.done:
            return self.status
        if self._actor is None:
            if time.monotonic() >= self._start_at:
                self._actor = self._class.remote(str(self._run.path), self._tables)
                self._asked = self._actor.status.remote()
            return self.status
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return self.status
        try:
            answer = ray.get(self._asked)
            self._asked = self._actor.status.remote()
        except RayError as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self._failed(LearnerError(f"the learner's process ended: {type(error).__name__} {first}"))
            return self.status
        self._take(answer)
        return self.status

    def stop(self, timeout_s: float = 30.0) -> LearnerStatus:
        """Lets the learner write its checkpoint and ends its process."""
        if self._actor is not None:
            try:
                answer = ray.get(self._actor.stop.remote(timeout_s), timeout=timeout_s + 5)
                self.status.progress = answer["progress"]
                self.status.last_error = answer["error"].get("what", "")
            except RayError as error:
                self.status.last_error = str(error).splitlines()[0]
            self._drop()
        self.status.done = True
        return self.status

    def _take(self, answer: dict[str, Any]) -> None:
        self.status.pid, self.status.progress = answer["pid"], answer["progress"]
        if answer["error"]:
            error = _error_of(answer["error"])
            if error.code in FINAL:
                self._drop()
                self.status.last_error, self.status.done = str(error), True
                raise error
            self._failed(error)
        elif answer["done"]:
            self._drop()
            self.status.done = True

    def _failed(self, error: FleetError) -> None:
        self._drop()
        now = time.monotonic()
        pause_s = self._rule.failed(now)
        self.status.last_error = str(error)
        if pause_s is None:
            self.status.done = True
            raise LearnerError(
                f"the learner failed {self._rule.max_failures} times within {self._rule.window_s:.0f} s, last: {error.what}",
                rule=error.rule or "a learner that cannot run is not started for ever",
                remedy=error.remedy or f"see {self._run.logs}",
            )
        log.warning("the learner failed and is started again in %.1f s: %s", pause_s, error)
        self.status.restarts += 1
        self._start_at = now + pause_s

    def _drop(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._asked = None
        self.status.pid = 0


def _error_of(fields: Mapping[str, str]) -> FleetError:
    """The error that ``to_fields`` was called on."""
    classes = [c for c in vars(fleet.errors).values() if isinstance(c, type) and issubclass(c, FleetError)]
    cls = next((c for c in classes if c.code == fields["code"]), LearnerError)
    return cls(fields["what"], rule=fields["rule"], remedy=fields["remedy"])
