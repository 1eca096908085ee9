"""`fleet down`: ends a run from another terminal, and what a run that was killed left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fleet.errors import FleetError, RunFolderError
from fleet.runfolder import RunFolder
from infra.driver_status import read_status
from infra.nodes import read_nodes, stop_nodes
from infra.sim import lock_fleet
from infra.supervisor import end_recorded, recorded
from infra.up import lock_file, lock_run

POLL_S = 0.2
SAY_S = 2.0
SERVERS = ("driver", "gateway", "registry")  # in this order: the learner's last checkpoint comes first
BEYOND_S = 60.0  # what all of an end may take beside the learner's checkpoint


def down(run_path: Path, say: Callable[[str], None]) -> None:
    """Ends all processes of a run but the robots: with a checkpoint, in order, and on all nodes.

    Args:
        say: Is told what is waited for.

    Raises:
        RunFolderError: The folder is no run, or an import of data works on it.
        FleetError: Something did not end in time.
    """
    run = RunFolder.open(run_path)
    timeout_s = stop_within_s(run) + BEYOND_S
    _end_server(run, timeout_s, say)
    with contextlib.closing(lock_run(run, "fleet down")):
        for pid_file in _left_behind(run):
            say(f"ending {pid_file.stem}, which was left behind")
            end_recorded(pid_file, timeout_s)
        if names := [node.name for node in read_nodes(run).values() if node.alive]:
            say(f"ending the nodes {', '.join(names)}")
            if late := stop_nodes(run):
                raise FleetError(
                    f"the nodes {', '.join(late)} did not end", remedy=f"see {run.nodes}; they end when they can read it again"
                )
    say(f"{run.run_id} is down. Go on with: fleet up {run.path} --resume")


def _end_server(run: RunFolder, timeout_s: float, say: Callable[[str], None]) -> None:
    pid, who = recorded(lock_file(run)), _who(run)
    if not pid or _free(run):
        return
    if who != "fleet up":
        raise RunFolderError(
            f"{who or 'something'} (process {pid}) works on {run.path}",
            rule="fleet down ends what `fleet up` started, on all nodes, and is given its folder",
            remedy="wait for it, or name the folder of `fleet up`",
        )
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline, said = time.monotonic() + timeout_s, 0.0
    while recorded(lock_file(run)) == pid:
        if time.monotonic() > deadline:
            raise FleetError(
                f"process {pid} did not end within {timeout_s:.0f} s; it waits for {_awaited(run)}",
                remedy=f"see fleet logs {run.path}; kill {pid}, then fleet down again ends what is left",
            )
        if time.monotonic() - said > SAY_S:
            said = time.monotonic()
            say(f"waiting for {_awaited(run)}")
        time.sleep(POLL_S)


def stop_within_s(run: RunFolder) -> float:
    """The time that the learner has for its last checkpoint."""
    from fleet.config import load_run
    from learner.main import LearnerConfig

    return float(load_run(run.config, {"learner": LearnerConfig})["learner"].stop_within_s)


def _who(run: RunFolder) -> str:
    try:
        return lock_file(run).read_text().splitlines()[1]
    except (OSError, IndexError):
        return ""


def _free(run: RunFolder) -> bool:
    import fcntl

    with lock_file(run).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _awaited(run: RunFolder) -> str:
    names = [name for name in SERVERS if recorded(run.logs / f"{name}.pid")]
    if "driver" in names:
        return f"the learner's checkpoint (step {read_status(run).get('step', 0)}), then {', '.join(names[1:])}"
    return ", ".join(names) or "the supervisor"


def _left_behind(run: RunFolder) -> Iterator[Path]:
    """Pid files of processes that live on without a supervisor."""
    files = [run.logs / f"{name}.pid" for name in SERVERS]
    files[1:1] = sorted(run.logs.glob("learner-rank*.pid"))
    with contextlib.suppress(RunFolderError):  # held: the robots belong to a `fleet sim` that lives
        lock_fleet(run).release()
        files += sorted(set(run.logs.glob("*.pid")) - set(files))
    yield from (path for path in files if recorded(path))
