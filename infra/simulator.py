"""A simulated robot on whichever node has room for it: Ray places ``serve``, which keeps one `fleet join` running there.

To the run it is a robot like any other: its own keys, its own spool, dialling in over the wire.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet.files import FolderLock
from fleet.identity import Credential
from infra.command import clear_errors
from infra.supervisor import Child, Supervisor

POLL_S = 0.25


def serve(*, credentials: str, folder: str, stop: Callable[[], bool], report: Callable[[dict[str, Any]], None]) -> None:
    """Drives one simulated robot until ``stop`` says so; a robot that ends is started again.

    Args:
        credentials: Text of the robot's file, as `fleet enroll` writes it.
        folder: Where on this node file, spool and log of the robot are kept, ``~`` is the user's home. What a robot that was
            killed had not sent yet is sent when it comes back to this folder.
        report: Is told the robot's name, process and restarts.

    Raises:
        IdentityError: The text is no robot's file.
        CrashLoop: The robot ends again and again; its last words are in the error.
        RunFolderError: Another process drives a robot from this folder.
    """
    home = Path(folder).expanduser()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = home / "robot.yaml"
    _write_private(file, credentials)
    robot = Credential.load(file).robot_id
    lock = FolderLock(home, "simulated robot's folder")
    supervisor = Supervisor()
    try:
        command = [sys.executable, "-m", "infra.simulator", str(os.getpid()), str(file)]
        child = Child(robot, command, home / f"{robot}.log")
        supervisor.add(child)
        while not stop():
            supervisor.poll()
            report({"robot": robot, "pid": child.process.pid if child.process else 0, "restarts": child.num_restarts})
            time.sleep(POLL_S)
    finally:
        supervisor.stop()
        lock.release()


def _write_private(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def _leave_with(parent: int) -> None:
    """Takes leave when the supervising process is gone: Ray may start the robot on another node, and one of two must go."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """``python -m infra.simulator PARENT_PID FILE``: `fleet join FILE` that ends with its parent."""
    import logging

    from actors.main import join

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    threading.Thread(target=_leave_with, args=(int(sys.argv[1]),), name="parent", daemon=True).start()
    with clear_errors():
        join(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
