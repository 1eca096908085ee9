"""Starting, timing and ending the processes that the benchmark measures, ours and the peers' in the same way.

A client says ``ready``, is told to go, says ``done`` when all that it sent is taken in, and lives on until its input is
closed, so that the CPU time of server and clients can be read from /proc over the same seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fleet.identity import create_run_keys, enroll
from fleet.runfolder import RunFolder

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall seconds, and CPU seconds of the clients and of the server over them."""

    wall_s: float
    client_s: float
    server_s: float


class Child:
    """A process that is driven by lines."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                env=ENV,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log, self._command = log, command

    def wait_for(self, word: str) -> str:
        """The rest of the next line that begins with ``word``; RuntimeError with the end of its log when it ends before."""
        stream: IO[str] = self.process.stdout  # type: ignore[assignment]
        for line in stream:
            if line.startswith(word):
                return line[len(word) :].strip()
        raise RuntimeError(f"{self._command} ended:\n{self._log.read_text(errors='replace')[-2000:]}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def cpu_s(self) -> float:
        return cpu_seconds(self.process.pid)

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads, also ended ones."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(server_pid: int, clients: Sequence[Child]) -> Timing:
    """From the word go until the last client is done. Ends the clients."""
    for client in clients:
        client.wait_for("ready")
    server, ours, start = cpu_seconds(server_pid), sum(c.cpu_s() for c in clients), time.perf_counter()
    for client in clients:
        client.go()
    for client in clients:
        client.wait_for("done")
    wall_s = time.perf_counter() - start
    timing = Timing(wall_s, sum(c.cpu_s() for c in clients) - ours, cpu_seconds(server_pid) - server)
    for client in clients:
        client.end()
    return timing


class Shard:
    """A run folder of one's own with its shard process, as ``fleet up`` starts it; no registry, no learner."""

    def __init__(self, path: Path, *, plain: bool = False) -> None:
        self.run, self._plain = RunFolder.create(path), plain
        self.run.config.write_text(
            "gateway: {bind: 'tcp://127.0.0.1:0'}\nregistry: {url: 'unix:///nonexistent/registry.sock'}\n"
        )
        create_run_keys(self.run.keys)
        (self.run.path / "tasks.json").write_text("{}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process; does not wait for it."""
        module = "benchmarks.buffer_plain" if self._plain else "buffer.main"
        with (self.run.logs / "gateway.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", module, str(self.run.path)], env=ENV, cwd=ROOT, stderr=log)

    def credential(self, robot_id: str) -> Path:
        """Enrols a robot; the gateway must have been started once, so that its address is known."""
        facts, deadline = self.run.path / "gateway.json", time.monotonic() + 30
        while not facts.exists():
            if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                raise RuntimeError((self.run.logs / "gateway.log").read_text()[-2000:])
            time.sleep(0.01)
        import json

        path = self.run.robots / f"{robot_id}.yaml"
        enroll(self.run.keys, robot_id, json.loads(facts.read_text())["endpoint"], self.run.run_id).save(path)
        return path

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


@contextlib.contextmanager
def shard(path: Path, *, plain: bool = False) -> Iterator[Shard]:
    """A running shard; its folder is removed afterwards."""
    running = Shard(path, plain=plain)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(path)
