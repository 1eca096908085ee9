"""Child processes that must run: started, watched, started again with a growing pause, given up in a crash loop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import time
from pathlib import Path

from fleet.errors import FleetError
from fleet.journal import Journal

log = logging.getLogger("fleet.supervisor")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
CRASH_LOOP = (5, 60.0)  # this many ends within this many seconds


class CrashLoop(FleetError):
    """A process ends again and again; starting it once more would not help."""

    code = "crash_loop"


@dataclasses.dataclass
class Child:
    """One supervised process.

    Args:
        once: True for work that ends by itself: exit code 0 is its end, not a failure.
        optional: True where the rest can do without it: in a crash loop it is tried again now and then, and said so.
    """

    name: str
    command: list[str]
    log: Path
    once: bool = False
    optional: bool = False
    process: subprocess.Popen[bytes] | None = None
    ends: collections.deque[float] = dataclasses.field(default_factory=collections.deque)
    start_at: float = 0.0
    num_restarts: int = 0
    done: bool = False

    @property
    def pid_file(self) -> Path:
        return self.log.with_suffix(".pid")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Keeps children running. Call ``poll`` a few times a second.

    Children are in a process group of their own, so that Ctrl-C in the terminal reaches the supervisor alone, which
    then ends them in order.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self.children: dict[str, Child] = {}
        self._journal = journal

    def add(self, child: Child) -> None:
        """Starts a child at once. One that a supervisor which died left behind is ended first."""
        end_earlier(child)
        self.children[child.name] = child
        self._start(child)

    def poll(self) -> None:
        """Notices ends and starts again what is due.

        Raises:
            CrashLoop: A child ended too often; it says the last lines of its log.
        """
        now = time.monotonic()
        for child in self.children.values():
            if child.done or child.running:
                continue
            if child.process is not None:
                self._ended(child, now)
            if not child.done and child.process is None and now >= child.start_at:
                child.num_restarts += 1
                self._start(child)

    def stop(self, names: list[str] | None = None, timeout_s: float = 15.0) -> None:
        """Asks children to end (SIGTERM), in the order of ``names``, and kills what does not within ``timeout_s``."""
        for name in names or list(reversed(self.children)):
            child = self.children[name]
            child.done = True
            if child.running and child.process is not None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for name in names or list(reversed(self.children)):
            process = self.children[name].process
            if process is None:
                continue
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, child: Child) -> None:
        child.log.parent.mkdir(parents=True, exist_ok=True)
        with child.log.open("ab") as output:
            child.process = subprocess.Popen(
                child.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        child.pid_file.write_text(f"{child.process.pid} {_start_of(child.process.pid)}")
        if self._journal is not None:
            self._journal.write("process", name=child.name, pid=child.process.pid, restarts=child.num_restarts)

    def _ended(self, child: Child, now: float) -> None:
        assert child.process is not None
        code, child.process = child.process.returncode, None
        if child.once and code == 0:
            child.done = True
            return
        child.ends.append(now)
        while child.ends and child.ends[0] < now - CRASH_LOOP[1]:
            child.ends.popleft()
        pause_s = min(FIRST_PAUSE_S * 2 ** (len(child.ends) - 1), LONGEST_PAUSE_S)
        if len(child.ends) >= CRASH_LOOP[0]:
            error = CrashLoop(
                f"{child.name} ended {len(child.ends)} times within {CRASH_LOOP[1]:.0f} s, last with exit code {code}",
                rule="a process that cannot run is not started for ever",
                remedy=f"its last words, from {child.log}:\n{last_lines(child.log)}",
            )
            if not child.optional:
                raise error
            log.error("%s", error)
            child.ends.clear()
            pause_s = CRASH_LOOP[1]
        child.start_at = now + pause_s


def end_earlier(child: Child, timeout_s: float = 10.0) -> None:
    """Ends the process that an earlier supervisor started for this child, if it still runs."""
    try:
        number, _, started = child.pid_file.read_text().partition(" ")
        pid = int(number)
    except (OSError, ValueError):
        return
    deadline, request = time.monotonic() + timeout_s, signal.SIGTERM
    while started and _start_of(pid) == started:  # a number can be given anew to somebody else's process
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, request)
        if time.monotonic() > deadline:
            request = signal.SIGKILL
        time.sleep(0.05)


def _start_of(pid: int) -> str:
    """When a live process began, as the system writes it; "" if there is none."""
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = shown.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()


def last_lines(path: Path, num: int = 12) -> str:
    """The last ``num`` lines of a log file, "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - 8192, 0))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-num:])
    except OSError:
        return ""
