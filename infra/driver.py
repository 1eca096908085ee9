"""The one process of a run that talks to Ray: ``python -m infra.driver RUN_FOLDER [--address RAY]``.

A child of `fleet up`, so that the supervisor, and with it the gateway and the registry, outlive Ray. It starts Ray or
joins a cluster, keeps the learner running there and says four times a second how it goes in learner-status.json. SIGTERM:
the learner writes a checkpoint and the driver ends with exit code 0. Exit code ``CANNOT_GO_ON``: starting it again would
end the same way. ``NO_CLUSTER``: the cluster on which the run trained before does not answer; it may come back, so this is
tried for ever. All that the driver needs is on disk, so after any other end it is simply started again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from infra.enroll import enroll_here
from infra.run_config import load_plain_tables
from infra.supervisor import end_recorded, record

log = logging.getLogger("fleet.driver")
CANNOT_GO_ON, NO_CLUSTER = 3, 4
POLL_S = 0.25
JOINING_S = 30.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EVALUATOR, SIMULATOR = "evaluator", "sim-ray"
HELD = "the learner waits: it was told to wait for the demonstrations"


def hold_file(run: RunFolder) -> Path:
    """While it is there Ray is started, but no learner."""
    return run.path / "learner.hold"


class NoCluster(Exception):
    """Ray could not be started or joined. ``code``: for the end of this process."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class Driver:
    """The learner of a run in Ray, and what else Ray places for it. ``stop``: set from a signal handler."""

    def __init__(self, run: RunFolder, tables: dict[str, Any], address: str, stop: threading.Event) -> None:
        self._run, self._tables, self._address, self._stop = run, tables, address, stop
        # Numbers of an earlier driver are shown until there are new ones; what ran under it does no longer.
        before = {key: value for key, value in read_status(run).items() if key in ("step", "steps", "phase", "release")}
        self._status: dict[str, Any] = {"state": "starting", **before, "waiting": "", "restarts": 0, "last_error": "", "pid": 0}
        self._recorded: dict[str, int] = {}
        self._here = ""

    def work(self) -> None:
        """Until ``stop``.

        Raises:
            NoCluster: Ray cannot be started or joined now.
            FleetError: The learner cannot go on.
        """
        from learner.cluster import start_ray, stop_ray

        self._tell()
        for pid_file in self._run.logs.glob("learner-rank*.pid"):
            with contextlib.suppress(FleetError):  # one that cannot be ended holds the run's lock, and the learner says so
                end_recorded(pid_file, timeout_s=2.0)  # of a driver that was killed
        try:
            start_ray(self._address, self._run.keys / "ray.token")
        except FleetError as error:  # a cluster may come back: this driver ends, another one tries again
            known = bool(self._address and self._status.get("step"))
            waiting = {"state": "waiting", "waiting": f"the learner waits for Ray: {error.what}"} if known else {}
            self._tell(last_error=str(error), **waiting)
            raise NoCluster(NO_CLUSTER if known else 1) from error
        try:
            while hold_file(self._run).exists() and not self._stop.is_set():
                self._tell(state="waiting", waiting=HELD)
                self._stop.wait(POLL_S)
            self._train()
        finally:
            stop_ray()

    def _train(self) -> None:
        from infra.driver_nodes import NodeKeeper
        from learner.cluster import LearnerHandle, nodes

        self._here = next(node.name for node in nodes() if node.here)
        keeper = NodeKeeper(self._run, self._tables, JOINING_S if self._address else 0.0)
        handle = LearnerHandle(self._tables, keeper.plan, keeper.folders)
        placed: list[Any] = []
        while not self._stop.is_set():
            self._tell(**describe(handle.poll()), **describe_placed([one.poll() for one in placed]))
            keeper.watch()
            if not placed and handle.status.pid:  # from here on all gateways are there
                placed = place_others(self._run, self._tables)
            self._stop.wait(POLL_S)
        done = handle.status.done
        final = describe(handle.stop())
        self._tell(**final | {"state": "finished" if done else "stopped", "pid": 0, "ranks": []})

    def take_signals(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, lambda signum, frame: self._stop.set())

    def _tell(self, **changes: Any) -> None:
        self._status |= changes
        for rank in self._status.get("ranks", []):
            name = f"learner-rank{rank['rank']}"
            if rank["node"] == self._here and rank["pid"] and self._recorded.get(name) != rank["pid"]:
                record(self._run.logs / f"{name}.pid", rank["pid"])
                self._recorded[name] = rank["pid"]
        write_status(self._run, {"time_ns": time.time_ns(), "driver": os.getpid(), **self._status})


def place_others(run: RunFolder, tables: dict[str, Any]) -> list[Any]:
    """Starts the evaluator and the simulators that the run asks for."""
    from infra.sim import sim_settings
    from learner.cluster import Placed, nodes

    placed = []
    if tables["evaluator"].every:
        arguments, num_cpus = {"run_path": str(run.path)}, tables["evaluator"].num_cpus
        here = next(node for node in nodes() if node.here)
        output = run.logs / "evaluator.log"
        placed.append(Placed(EVALUATOR, "infra.evaluator:serve", arguments, num_cpus, node=here, output=output))
    for robot_id, changes in sim_settings(run, tables["cluster"].simulators, prefix=SIMULATOR).items():
        text = enroll_here(run, robot_id, changes).read_text()
        folder = f"~/.fleet-rl/{run.run_id}-{robot_id}"
        placed.append(Placed(robot_id, "infra.simulator:serve", {"credentials": text, "folder": folder}))
    return placed


def describe(status: Any) -> dict[str, Any]:
    """What people want to know of a ``learner.cluster.LearnerStatus``, as plain data."""
    progress = status.progress
    waiting = status.waiting or progress.get("waiting", "")
    state = "finished" if status.done else "waiting" if waiting else "training" if status.pid else "starting"
    facts: dict[str, Any] = {"state": state}
    if progress:
        facts |= {key: progress[key] for key in ("step", "steps", "phase", "release", "pace", "advice") if key in progress}
        facts |= {"updates_per_s": round(progress["updates_per_s"], 1), "loss": progress["stats"].get("loss")}
    return facts | {
        "waiting": waiting,
        "restarts": status.restarts,
        "last_error": status.last_error,
        "pid": status.pid,
        "ranks": status.ranks,
        "wanted": status.wanted,
    }


def describe_placed(statuses: list[Any]) -> dict[str, Any]:
    """The same for each ``learner.cluster.PlacedStatus``."""
    rows = [dataclasses.asdict(status) for status in statuses]
    evaluators = [row | row.pop("report") for row in rows if row["name"] == EVALUATOR]
    return {"evaluators": evaluators, "simulators": sum(row["pid"] != 0 for row in rows if row["name"] != EVALUATOR)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps the learner of a run going in Ray.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--address", default="", help="of a Ray cluster to join; empty: a local one")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    run, stop = RunFolder.open(args.run), threading.Event()
    try:
        driver = Driver(run, load_plain_tables(run.config, []), args.address, stop)
        driver.take_signals()
        driver.work()
    except NoCluster as error:
        log.error("%s", error.__cause__)
        sys.exit(error.code)
    except FleetError as error:
        log.error("the learner cannot go on: %s", error)
        gone = {"driver": os.getpid(), "time_ns": time.time_ns(), "waiting": "", "pid": 0, "ranks": []}
        write_status(run, read_status(run) | gone | {"state": "failed", "last_error": str(error), "error": error.to_fields()})
        sys.exit(CANNOT_GO_ON)


if __name__ == "__main__":
    main()
