"""The one process of a run that talks to Ray: ``python -m infra.driver RUN_FOLDER [--address RAY]``.

A child of `fleet up`, so that the supervisor, and with it the gateway and the registry, outlive Ray. It starts Ray or
joins a cluster, keeps the learner running there and says four times a second how it goes in learner-status.json. SIGTERM:
the learner writes a checkpoint and the driver ends with exit code 0. Exit code ``CANNOT_GO_ON``: starting it again would
end the same way. All it needs is on disk, so after any other end it is simply started again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fleet.errors import FleetError
from fleet.runfolder import RunFolder
from infra.driver_status import read_status, write_status
from infra.run_config import load_tables
from infra.supervisor import end_recorded, record

log = logging.getLogger("fleet.driver")
CANNOT_GO_ON = 3
POLL_S = 0.25
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HELD = "the learner waits: it was told to wait for the demonstrations"


def hold_file(run: RunFolder) -> Path:
    """While it is there Ray is started, but no learner."""
    return run.path / "learner.hold"


class NoCluster(Exception):
    """Ray could not be started or joined."""


class Driver:
    """The learner of a run in Ray. ``stop``: set from a signal handler."""

    def __init__(self, run: RunFolder, tables: dict[str, Any], address: str, stop: threading.Event) -> None:
        self._run, self._tables, self._address, self._stop = run, tables, address, stop
        # Numbers of an earlier driver are shown until there are new ones; what ran under it does no longer.
        before = {key: value for key, value in read_status(run).items() if key in ("step", "steps", "phase", "release")}
        self._status: dict[str, Any] = {"state": "starting", **before, "waiting": "", "restarts": 0, "last_error": "", "pid": 0}
        self._written: dict[str, int] = {}

    def work(self) -> None:
        """Until ``stop``.

        Raises:
            FleetError: The learner cannot go on.
        """
        from learner.cluster import LearnerHandle, start_ray, stop_ray

        self._tell()
        for pid_file in self._run.logs.glob("learner-rank*.pid"):
            end_recorded(pid_file, timeout_s=2.0)  # of a driver that was killed; it would hold the run's lock
        try:
            start_ray(self._address or None)
        except FleetError as error:  # a cluster may come back: this driver ends, another one tries again
            self._tell(last_error=str(error))
            raise NoCluster from error
        self.take_signals()  # Ray sets its own handlers, which would end this process without a checkpoint
        try:
            while hold_file(self._run).exists() and not self._stop.is_set():
                self._tell(state="waiting", waiting=HELD)
                self._stop.wait(POLL_S)
            num_gpus = 1 if self._tables["learner"].device == "cuda" else 0
            handle = LearnerHandle(self._run, self._tables, num_gpus=num_gpus)
            while not self._stop.is_set():
                self._tell(**describe(handle.poll()))
                self._stop.wait(POLL_S)
            done = handle.status.done
            final = describe(handle.stop(self._tables["learner"].stop_within_s))
            self._tell(**final | {"state": "finished" if done else "stopped", "pid": 0, "ranks": []})
        finally:
            stop_ray()

    def take_signals(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda signum, frame: self._stop.set())

    def _tell(self, **changes: Any) -> None:
        self._status |= changes
        for rank in self._status.get("ranks", []):
            name = f"learner-rank{rank['rank']}"
            if rank["pid"] and self._written.get(name) != rank["pid"]:
                record(self._run.logs / f"{name}.pid", rank["pid"])
                self._written[name] = rank["pid"]
        write_status(self._run, {"time_ns": time.time_ns(), "driver": os.getpid(), **self._status})


def describe(status: Any) -> dict[str, Any]:
    """What people want to know of a ``learner.cluster.LearnerStatus``, as plain data."""
    progress = status.progress
    if status.done:
        state = "finished"
    elif not status.pid:
        state = "starting"
    else:
        state = "waiting" if progress.get("waiting") else "training"
    facts: dict[str, Any] = {"state": state}
    if progress:
        facts |= {
            "step": progress.get("step", 0),
            "steps": progress.get("steps", 0),
            "phase": progress.get("phase", ""),
            "release": progress.get("release", 0),
            "updates_per_s": round(progress.get("updates_per_s", 0.0), 1),
            "loss": progress.get("stats", {}).get("loss"),
        }
    ranks = [{"rank": 0, "node": "", "shard": 0, "pid": status.pid}]
    return {
        **facts,
        "waiting": progress.get("waiting", ""),
        "restarts": status.restarts,
        "last_error": status.last_error,
        "pid": status.pid,
        "ranks": ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps the learner of a run going in Ray.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--address", default="", help="of a Ray cluster to join; empty: a local one")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    run, stop = RunFolder.open(args.run), threading.Event()
    try:
        driver = Driver(run, load_tables(run.config, []), args.address, stop)
        driver.take_signals()
        driver.work()
    except NoCluster as error:
        log.error("%s", error.__cause__)
        sys.exit(1)
    except FleetError as error:
        log.error("the learner cannot go on: %s", error)
        gone = {"driver": os.getpid(), "time_ns": time.time_ns(), "waiting": "", "pid": 0, "ranks": []}
        write_status(run, read_status(run) | gone | {"state": "failed", "last_error": str(error), "error": error.to_fields()})
        sys.exit(CANNOT_GO_ON)


if __name__ == "__main__":
    main()
