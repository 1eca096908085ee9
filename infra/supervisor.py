"""Child processes that must run: started, watched, started again with a growing pause, given up in a crash loop."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import os
import signal
import subprocess
import time
from pathlib import Path

from fleet.errors import FleetError
from fleet.journal import Journal

log = logging.getLogger("fleet.supervisor")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
CRASH_LOOP_ENDS, CRASH_LOOP_PAUSE_S = 5, 60.0
KILL_S = 10.0  # what the system may take to end a process that was killed


class CrashLoop(FleetError):
    """A process ends again and again; starting it once more would not help. ``name``: of the child."""

    code = "crash_loop"

    def __init__(self, name: str, what: str, *, rule: str = "", remedy: str = "") -> None:
        super().__init__(what, rule=rule, remedy=remedy)
        self.name = name


@dataclasses.dataclass
class Child:
    """One supervised process.

    Args:
        once: True for work that ends by itself: exit code 0 is its end, not a failure.
        optional: True where the rest can do without it: in a crash loop it is tried again now and then, and said so.
        gives_up: Exit code by which it says that starting it again cannot help; 0: none.
        waits: Exit code by which it says that what it needs is not there now: it is tried again for ever; 0: none.
        window_s: So far back its ends are counted: ``CRASH_LOOP_ENDS`` of them are a crash loop. With math.inf, whoever sees
            that it does its work forgets them (``ends.clear()``).
        stop_s: Between SIGTERM and SIGKILL.
    """

    name: str
    command: list[str]
    log: Path
    once: bool = False
    optional: bool = False
    gives_up: int = 0
    waits: int = 0
    window_s: float = 60.0
    stop_s: float = 15.0
    process: subprocess.Popen[bytes] | None = None
    ends: collections.deque[float] = dataclasses.field(default_factory=collections.deque)
    start_at: float = 0.0
    num_restarts: int = 0
    done: bool = False
    exit_code: int | None = None
    last_pid: int = 0

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
        end_recorded(child.pid_file, child.stop_s)
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
                try:
                    self._start(child)
                except OSError as error:  # no memory or no disk for a process now: what runs goes on
                    log.error("%s cannot be started: %s", child.name, error)
                    child.start_at = now + LONGEST_PAUSE_S

    def stop(self, names: list[str] | None = None, timeout_s: float | None = None) -> None:
        """Asks children to end (SIGTERM), in the order of ``names``, and kills what does not within ``timeout_s``, or
        within the longest ``stop_s`` among them."""
        for name in names or list(reversed(self.children)):
            child = self.children[name]
            child.done = True
            if child.running and child.process is not None:
                child.process.send_signal(signal.SIGTERM)
        if timeout_s is None:
            timeout_s = max((self.children[name].stop_s for name in names or self.children), default=0.0)
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
        child.last_pid = child.process.pid
        record(child.pid_file, child.process.pid)
        if self._journal is not None:
            self._journal.write("process", name=child.name, pid=child.process.pid, restarts=child.num_restarts)

    def _ended(self, child: Child, now: float) -> None:
        assert child.process is not None
        code, child.process = child.process.returncode, None
        child.exit_code = code
        if (child.once and code == 0) or (child.gives_up and code == child.gives_up):
            child.done = True
            return
        if child.waits and code == child.waits:
            child.start_at = now + LONGEST_PAUSE_S
            return
        child.ends.append(now)
        while child.ends and child.ends[0] < now - child.window_s:
            child.ends.popleft()
        pause_s = min(FIRST_PAUSE_S * 2 ** (len(child.ends) - 1), LONGEST_PAUSE_S)
        if len(child.ends) >= CRASH_LOOP_ENDS:
            error = CrashLoop(
                child.name,
                f"{child.name} ended {len(child.ends)} times {_within(child.window_s)}, last with exit code {code}",
                rule="a process that cannot run is not started for ever",
                remedy=f"its last words, from {child.log}:\n{last_lines(child.log)}",
            )
            if not child.optional:
                raise error
            log.error("%s", error)
            child.ends.clear()
            pause_s = CRASH_LOOP_PAUSE_S
        child.start_at = now + pause_s


def _within(window_s: float) -> str:
    return "without having done anything" if math.isinf(window_s) else f"within {window_s:.0f} s"


def record(pid_file: Path, pid: int) -> None:
    """Writes down a process so that whoever comes later can tell it from others that are given its number. A full disk is
    logged and ends nobody."""
    partial = pid_file.with_suffix(".partial")
    try:
        partial.write_text(f"{pid} {start_of(pid)}")
        os.replace(partial, pid_file)
    except OSError as error:
        log.error("%s is not written: %s", pid_file, error)


def recorded(pid_file: Path) -> int:
    """The process that was written down, 0 where there is none or it has ended."""
    try:
        number, _, started = pid_file.read_text().partition("\n")[0].partition(" ")
        pid = int(number)
    except (OSError, ValueError):
        return 0
    return pid if started and start_of(pid) == started else 0


def end_recorded(pid_file: Path, timeout_s: float = 10.0) -> None:
    """Ends the process that was written down, for example by a supervisor that was killed, if it still runs: SIGTERM, and
    SIGKILL after ``timeout_s``.

    Raises:
        FleetError: It is another user's, or does not end even so.
    """
    deadline, request = time.monotonic() + timeout_s, signal.SIGTERM
    while pid := recorded(pid_file):
        try:
            os.kill(pid, request)
        except ProcessLookupError:
            return
        except PermissionError:
            raise FleetError(
                f"process {pid} ({pid_file.stem}) is another user's", rule="one user serves a run", remedy=f"kill {pid}"
            ) from None
        if time.monotonic() > deadline + KILL_S:
            raise FleetError(
                f"process {pid} ({pid_file.stem}) does not end, not even by SIGKILL",
                rule="what an earlier start left behind ends first",
                remedy="it hangs in a call into the system, as on a disk or mounted folder that does not answer: look there",
            )
        if time.monotonic() > deadline:
            request = signal.SIGKILL
        time.sleep(0.1)


def start_of(pid: int) -> str:
    """When a live process began, as the system writes it, the same text at every call; "" if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else _start_by_ps(pid)
    return "" if fields[0] in "ZX" else f"{fields[19]} {boot}"


def _start_by_ps(pid: int) -> str:
    """Where there is no /proc."""
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
