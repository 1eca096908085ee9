"""The server side of a run on this machine: registry, gateway and the driver of the learner as child processes.

The only truth is on disk: each of these may be killed at any time, is started again, and goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from buffer.main import endpoint_file
from fleet.config import dump
from fleet.errors import ConfigError, FleetError, GatewayUnreachable, RunFolderError
from fleet.files import storage_errors
from fleet.identity import create_run_keys
from fleet.journal import Journal
from fleet.runfolder import RunFolder
from fleet.server.registry import Registry, registry_url, server_command
from infra.driver import CANNOT_GO_ON, NO_CLUSTER, hold_file
from infra.driver_status import one_line, read_status
from infra.nodes import HEAD, Presence, read_nodes, stop_file, stop_nodes
from infra.run_config import load_tables, settle_pretrained, write_catalogue
from infra.supervisor import Child, CrashLoop, Supervisor, last_lines, start_of
from infra.targets import write_targets

log = logging.getLogger("fleet.up")
START_TIMEOUT_S = 30.0
DRIVER = "driver"
STOP_MARGIN_S = 15.0  # beyond the learner's own time to stop: for Ray's end
SILENT_S = 120.0  # a driver that says nothing for so long hangs; starting Ray may take long on a busy machine


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
        tables = load_tables(run.config, overrides)
        return run, _with_shared(tables, _shared_of(tables, run.path), run)
    tables = load_tables(source, overrides)
    path = runs / source.stem
    shared = _shared_of(tables, path)
    if not resume:
        tables = settle_pretrained(tables)
        run = RunFolder.create(path, shared)
    elif shared is not None and shared.exists() and not RunFolder(path).mark.exists():
        run = RunFolder.attach(path, shared)  # the run goes on from another machine, or `create` was killed on its way
    else:
        run = RunFolder.open(path)
    return run, _with_shared(tables, shared, run)


def _shared_of(tables: dict[str, Any], path: Path) -> Path | None:
    """Where the part of the run in ``path`` lies that its nodes share."""
    mounted = tables["run"].shared_path()
    if mounted is None:
        return None
    if not mounted.is_dir():
        raise ConfigError(
            f"run.shared = {str(mounted)!r} is no folder",
            rule="it is there and mounted by all nodes",
            remedy="mount or make it",
        )
    return Path(mounted) / path.resolve().name


def _with_shared(tables: dict[str, Any], shared: Path | None, run: RunFolder) -> dict[str, Any]:
    """The tables, with a path that other processes and nodes understand."""
    if run.shared != (shared and shared.resolve()):
        raise RunFolderError(
            f"{run.path} shares {run.shared or 'nothing'}, and run.shared names {shared or 'nothing'}",
            rule="where a run is shared is settled at its start",
            remedy="put run.shared back, or start a new run",
        )
    return tables | {"run": dataclasses.replace(tables["run"], shared=str(shared.parent) if shared else "")}


def write_run_file(run: RunFolder, tables: dict[str, Any]) -> None:
    """The run's configuration with all overrides and defaults, as it was started."""
    with storage_errors(f"writing {run.config}"):
        dump(run.config, {name: dataclasses.asdict(table) for name, table in tables.items()})


class LocalRun:
    """Everything of a run but its robots.

    Attributes:
        failure: Why the learner cannot go on; the rest does.

    Raises:
        RunFolderError: Another process serves this run.
    """

    def __init__(self, run: RunFolder, tables: dict[str, Any]) -> None:
        self.run, self.tables = run, tables
        self._lock = lock_run(run)
        self._presence = self._appear() if run.shared else None
        write_run_file(run, tables)  # all processes read it, so what was overridden or edited counts for each of them
        create_run_keys(run.keys)
        write_catalogue(run, tables["run"])
        self.journal = Journal(run.logs / "supervisor.jsonl")
        self.supervisor = Supervisor(self.journal)
        self.registry: Registry | None = None
        self.failure: FleetError | None = None
        self._status: dict[str, Any] = {}
        self._furthest = 0
        self._heard = (0, 0.0)  # the newest status of the driver, and when it came
        self._measured = ["gateway", "learner", *(["evaluator"] if tables["evaluator"].every else [])]

    def _appear(self) -> Presence:
        other = read_nodes(self.run).get(HEAD)
        if other is not None and other.alive and other.folder != str(self.run.path):
            age_s = (time.time_ns() - other.time_ns) / 1e9
            raise RunFolderError(
                f"the run in {self.run.shared} was served {age_s:.0f} s ago from {other.folder}",
                rule="one `fleet up` a run",
                remedy="stop that one, or wait ten seconds after its end",
            )
        stop_file(self.run).unlink(missing_ok=True)
        return Presence(self.run, HEAD)

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
        if self._presence is not None:
            self._presence.start()

    def start_learner(self, address: str = "", *, hold: bool = False) -> None:
        """Starts the driver, and with it Ray and the learner.

        Args:
            address: A Ray cluster to join; empty: a local one. It takes about eight seconds to start.
            hold: Ray is started now, the learner at ``let_learner_begin``.
        """
        hold_file(self.run).touch() if hold else hold_file(self.run).unlink(missing_ok=True)
        command = [sys.executable, "-m", "infra.driver", str(self.run.path), *(["--address", address] if address else [])]
        stop_s = self.tables["learner"].stop_within_s + STOP_MARGIN_S
        output = self.run.logs / f"{DRIVER}.log"
        # What counts as a crash loop is that the learner gets nowhere between the ends, however long a start takes.
        driver = Child(DRIVER, command, output, once=True, gives_up=CANNOT_GO_ON, waits=NO_CLUSTER, stop_s=stop_s)
        driver.window_s = math.inf
        self.supervisor.add(driver)

    def let_learner_begin(self) -> None:
        """Ends the hold of ``start_learner``."""
        hold_file(self.run).unlink(missing_ok=True)

    def poll(self) -> dict[str, Any]:
        """Keeps everything running and returns the learner's status, {} before its start.

        A learner that cannot go on ends nobody else: robots stay connected and their data is taken in; its state is "failed".

        Raises:
            CrashLoop: The gateway cannot be kept running.
        """
        try:
            self.supervisor.poll()
        except CrashLoop as error:
            if error.name != DRIVER:
                raise
            self.supervisor.children[DRIVER].done = True
            self._fail(error)
        write_targets(self.run, self._measured)
        driver = self.supervisor.children.get(DRIVER)
        if driver is None:
            return {}
        self._look_at(driver)
        if self.registry is not None:
            self.registry.put_learner(self._status)
        return self._status

    def _look_at(self, driver: Child) -> None:
        """Takes what the driver says; what an earlier one said counts only as long as there is nothing newer."""
        status = read_status(self.run)
        own = status.get("driver") == driver.last_pid
        if not own:
            status |= {"state": "starting", "waiting": "", "pid": 0, "ranks": []}
        elif status["time_ns"] != self._heard[0]:
            self._heard = status["time_ns"], time.monotonic()
        elif driver.running and time.monotonic() - self._heard[1] > SILENT_S:
            log.error("the driver says nothing any more: it is ended and started again")
            os.kill(driver.last_pid, signal.SIGKILL)
        if status.get("step", 0) > self._furthest:
            self._furthest = status["step"]
            driver.ends.clear()
        if own and driver.exit_code == CANNOT_GO_ON and self.failure is None:
            told = status.get("error") or {"what": last_lines(driver.log), "rule": "", "remedy": ""}
            self._fail(FleetError(told["what"], rule=told["rule"], remedy=told["remedy"]))
        if self.failure is not None:
            status |= {"state": "failed", "last_error": str(self.failure)}
        self._status = status | {"driver_restarts": driver.num_restarts}

    def _fail(self, error: FleetError) -> None:
        self.failure = error
        log.error("the learner cannot go on, robots are served further: %s", error)

    @property
    def endpoint(self) -> str:
        return str(json.loads(endpoint_file(self.run).read_text())["endpoint"])

    def stop(self) -> None:
        """Ends the robots started here, the learner (after a checkpoint), other nodes, gateway and registry, in this order."""
        with contextlib.ExitStack() as rest:  # in reverse; whatever fails on the way, the rest is ended
            for end in (self._lock.close, self.journal.close, self._leave, self.supervisor.stop):
                rest.callback(end)
            if self.registry is not None:
                rest.callback(self.registry.close)
            if self.run.shared:
                rest.callback(stop_nodes, self.run)
            if robots := [name for name in self.supervisor.children if name not in ("gateway", "registry", DRIVER)]:
                self.supervisor.stop(robots)
            if DRIVER in self.supervisor.children:
                self.supervisor.stop([DRIVER])
                self._look_at(self.supervisor.children[DRIVER])
                if self.registry is not None:
                    self.registry.put_learner(self._status)

    def _leave(self) -> None:
        if self._presence is not None:
            self._presence.leave()


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
        local.start_learner(address)
        said = 0.0
        while not stop.is_set():
            status = local.poll()
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(one_line(status), flush=True)
            stop.wait(0.2)
        print("stopping: checkpoint, then gateway and registry", flush=True)
    finally:
        local.stop()
    print(f"stopped. Go on with: fleet up {run.path} --resume", flush=True)


def lock_run(run: RunFolder, who: str = "fleet up") -> IO[str]:
    """Held while a process serves the run; to be closed. The file says who: its pid, its start and ``who``.

    Raises:
        RunFolderError: Another process holds it.
    """
    file = lock_file(run).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunFolderError(
            f"{run.path} is served by another process",
            rule="one `fleet up` a run",
            remedy=f"stop it (fleet down {run.path}), or start another run",
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()} {start_of(os.getpid())}\n{who}\n")
    file.flush()
    return file


def lock_file(run: RunFolder) -> Path:
    return run.path / "run.lock"
