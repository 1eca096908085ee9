"""The server side of a run on this machine: registry and gateway as child processes, the learner in Ray.

The only truth is on disk: each of these may be killed at any time, is started again, and goes on from there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from buffer.main import endpoint_file
from fleet.config import dump
from fleet.errors import FleetError, GatewayUnreachable, RunFolderError
from fleet.identity import create_run_keys
from fleet.journal import Journal
from fleet.runfolder import RunFolder
from fleet.server.registry import Registry, registry_url, server_command
from infra.run_config import load_tables, write_catalogue
from infra.supervisor import Child, Supervisor, last_lines

log = logging.getLogger("fleet.up")
START_TIMEOUT_S = 30.0


def open_run(source: Path, overrides: list[str], *, resume: bool, runs: Path) -> tuple[RunFolder, dict[str, Any]]:
    """A new run from a run file, or an existing one; its tables are checked before anything starts.

    Raises:
        ConfigError: The run file or an override.
        RunFolderError: The folder holds another run, or none although ``resume`` says so.
    """
    if source.is_dir() or (resume and not source.suffix):
        run = RunFolder.open(source)
        if not resume:
            raise RunFolderError(f"{source} holds a run", rule="a run is gone on with on purpose", remedy="add --resume")
        return run, load_tables(run.config, overrides)
    tables = load_tables(source, overrides)
    path = runs / source.stem
    return (RunFolder.open(path) if resume else RunFolder.create(path)), tables


def write_run_file(run: RunFolder, tables: dict[str, Any]) -> None:
    """The run's configuration with all overrides and defaults, as it was started."""
    dump(run.config, {name: dataclasses.asdict(table) for name, table in tables.items()})


class LocalRun:
    """Everything of a run but its robots.

    Raises:
        RunFolderError: Another process serves this run.
    """

    def __init__(self, run: RunFolder, tables: dict[str, Any]) -> None:
        self.run, self.tables = run, tables
        self._lock = lock_run(run)
        write_run_file(run, tables)  # all processes read it, so what was overridden or edited counts for each of them
        create_run_keys(run.keys)
        write_catalogue(run, tables["run"])
        self.journal = Journal(run.logs / "supervisor.jsonl")
        self.supervisor = Supervisor(self.journal)
        self.registry: Registry | None = None
        self.learner: Any = None
        self.failure: FleetError | None = None

    def start(self) -> None:
        """Starts registry and gateway and waits until robots can connect.

        Raises:
            GatewayUnreachable: The gateway did not come up; its last words are in the error.
        """
        config = self.tables["registry"]
        if not config.url:
            command = server_command(self.run.registry)
            self.supervisor.add(Child("registry", command, self.run.logs / "registry.log", optional=True))
        self.registry = Registry(registry_url(self.run.registry, self.run.config), config.prefix)
        start_gateway(self.run, self.supervisor)

    def start_cluster(self, address: str = "") -> None:
        """Starts a local Ray, or joins the cluster at ``address``. Takes about eight seconds.

        Call it on a thread that lives as long as the run: the system ends Ray's processes with the thread that made them.
        """
        from learner.cluster import start_ray

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        start_ray(address or None)
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray sets its own, which would end this process without a checkpoint

    def start_learner(self) -> None:
        """Starts the learner in Ray, after ``start_cluster``."""
        from learner.cluster import LearnerHandle

        num_gpus = 1 if self.tables["learner"].device == "cuda" else 0
        self.learner = LearnerHandle(self.run, self.tables, num_gpus=num_gpus)

    def poll(self) -> dict[str, Any]:
        """Keeps everything running and returns the learner's status, {} before its start.

        A learner that cannot go on ends nobody else: robots stay connected and their data is taken in; its state is "failed".

        Raises:
            CrashLoop: The gateway cannot be kept running.
        """
        self.supervisor.poll()
        if self.learner is None:
            return {}
        try:
            status = describe_learner(self.learner.poll())
        except FleetError as error:
            log.error("the learner cannot go on: %s", error)
            self.failure = error
            status = describe_learner(self.learner.status)
        if self.failure is not None:
            status |= {"state": "failed", "last_error": str(self.failure)}
        if self.registry is not None:
            self.registry.put_learner(status)
        return status

    @property
    def endpoint(self) -> str:
        return str(json.loads(endpoint_file(self.run).read_text())["endpoint"])

    def stop(self) -> None:
        """Ends the robots started here, the learner (after a checkpoint), gateway and registry, in this order."""
        self.supervisor.stop([name for name in self.supervisor.children if name not in ("gateway", "registry")])
        if self.learner is not None:
            from learner.cluster import stop_ray

            self.learner.stop()
            stop_ray()
        if self.registry is not None:
            self.registry.close()
        self.supervisor.stop()
        self.journal.close()
        self._lock.close()


def start_gateway(run: RunFolder, supervisor: Supervisor) -> None:
    """Adds the gateway to the supervisor's children and waits until robots can connect.

    Raises:
        GatewayUnreachable: It did not come up; its last words are in the error. All children are stopped.
    """
    old = endpoint_file(run).stat().st_mtime_ns if endpoint_file(run).exists() else 0
    output = run.logs / "gateway.log"
    supervisor.add(Child("gateway", [sys.executable, "-m", "buffer.main", str(run.path)], output))
    deadline = time.monotonic() + START_TIMEOUT_S
    while not endpoint_file(run).exists() or endpoint_file(run).stat().st_mtime_ns == old:
        gateway = supervisor.children["gateway"]
        if not gateway.running or time.monotonic() > deadline:
            supervisor.stop()
            raise GatewayUnreachable(
                f"the gateway did not start:\n{last_lines(output)}", rule="it writes gateway.json when it listens"
            )
        time.sleep(0.02)


def describe_learner(status: Any) -> dict[str, Any]:
    """What people want to know of a ``learner.cluster.LearnerStatus``, as plain data."""
    progress = status.progress
    state = (
        "finished" if status.done else "starting" if not status.pid else "waiting" if progress.get("waiting") else "training"
    )
    return {
        "state": state,
        "step": progress.get("step", 0),
        "steps": progress.get("steps", 0),
        "phase": progress.get("phase", ""),
        "release": progress.get("release", 0),
        "updates_per_s": round(progress.get("updates_per_s", 0.0), 1),
        "loss": progress.get("stats", {}).get("loss"),
        "waiting": progress.get("waiting", ""),
        "restarts": status.restarts,
        "last_error": status.last_error,
        "pid": status.pid,
    }


def up(source: Path, overrides: list[str], *, resume: bool, runs: Path, address: str) -> None:
    """Serves a run until SIGINT, SIGTERM or SIGHUP; robots are served also after the learner has done its steps."""
    run, tables = open_run(source, overrides, resume=resume, runs=runs)
    stop = threading.Event()

    def ask_to_stop(number: int, frame: object) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    local = LocalRun(run, tables)
    try:
        local.start()
        print(f"run {run.run_id} in {run.path}: gateway at {local.endpoint}", flush=True)
        print(
            f"  register a robot:  fleet enroll arm-07 --run {run.path}    simulate: fleet sim {run.path} --num 4", flush=True
        )
        local.start_cluster(address)
        local.start_learner()
        said = 0.0
        while not stop.is_set():
            status = local.poll()
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print("learner " + ", ".join(f"{key} {value}" for key, value in status.items()), flush=True)
            stop.wait(0.2)
        print("stopping: checkpoint, then gateway and registry", flush=True)
    finally:
        local.stop()
    print(f"stopped. Go on with: fleet up {run.path} --resume", flush=True)


def lock_run(run: RunFolder) -> IO[str]:
    """Held while a process serves the run; to be closed.

    Raises:
        RunFolderError: Another process holds it.
    """
    file = (run.path / "run.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunFolderError(
            f"{run.path} is served by another process", rule="one `fleet up` a run", remedy="stop it, or start another run"
        ) from None
    return file
