"""What this machine can do at most: memcpy, TCP over loopback, and a disk that is synced after every group.

``python -m benchmarks.buffer_limits HOST PORT`` is the far end of the loopback measurement.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.buffer_data import ACTION, FRAGMENT_STEPS, STATE, STEP_BYTES
from benchmarks.buffer_process import ENV, ROOT

GROUP_FRAGMENTS = 8  # one fsync for so many fragments, as the gateway groups them under load


def memcpy_bytes_per_s(num_bytes: int = 256 << 20) -> float:
    """One thread, between two arrays that are larger than the caches."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    start = time.perf_counter()
    for _ in range(4):
        np.copyto(target, source)
    return 4 * num_bytes / (time.perf_counter() - start)


def tcp_bytes_per_s(num_bytes: int = 2 << 30) -> float:
    """From this process to another one over loopback, in pieces of 1 MiB."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        far = subprocess.Popen([sys.executable, "-m", "benchmarks.buffer_limits", "127.0.0.1", str(port)], env=ENV, cwd=ROOT)
        connection, _ = server.accept()
        with connection:
            piece = memoryview(bytes(1 << 20))
            start = time.perf_counter()
            for _ in range(num_bytes // len(piece)):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # the far end has read all of it
            elapsed = time.perf_counter() - start
        far.wait(10)
    return num_bytes / elapsed


def disk_bytes_per_s(folder: Path, num_bytes: int = 1 << 30) -> float:
    """A new file, written in fragments, fdatasync after every ``GROUP_FRAGMENTS`` of them."""
    fragment, path = os.urandom(FRAGMENT_STEPS * STEP_BYTES), folder / "disk-limit"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        start = time.perf_counter()
        for i in range(num_bytes // len(fragment)):
            os.write(fd, fragment)
            if (i + 1) % GROUP_FRAGMENTS == 0:
                os.fdatasync(fd)
        os.fdatasync(fd)
        return num_bytes // len(fragment) * len(fragment) / (time.perf_counter() - start)
    finally:
        os.close(fd)
        path.unlink()


def _assign(array: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
    out[:] = array[at]


def _take(array: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
    np.take(array, at, axis=0, out=out, mode="clip")  # in its default mode np.take copies twice


GATHERS = {"out[:] = array[t]": _assign, "np.take in clip mode, numpy's fastest": _take}


def gather_per_s(how: str, num_steps: int, num_batches: int, *, horizon: int = 16) -> tuple[float, float]:
    """Batches a second, and CPU-ms a batch, of the sample benchmark's batch gathered with numpy from arrays in memory
    into preallocated arrays, in one of the ways of ``GATHERS``."""
    rng, gather = np.random.default_rng(0), GATHERS[how]
    frames = [rng.integers(0, 256, (num_steps, 128 * 128 * 3), dtype=np.uint8) for _ in range(2)]
    states, actions = np.ones((num_steps, STATE), np.float32), np.ones((num_steps, ACTION), np.float32)
    into = [np.empty((256, 128 * 128 * 3), np.uint8) for _ in range(4)]
    into_state = [np.empty((256, STATE), np.float32) for _ in range(2)]
    into_actions = np.empty((256, horizon, ACTION), np.float32)
    for warm in (True, False):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(5 if warm else num_batches):
            t = rng.integers(0, num_steps - horizon, 256)
            for i, at in enumerate((t, t + horizon)):
                for k in range(2):
                    gather(frames[k], at, into[2 * i + k])
                gather(states, at, into_state[i])
            gather(actions, t[:, None] + np.arange(horizon), into_actions)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return num_batches / wall_s, 1000 * cpu_s / num_batches


def _drain(host: str, port: int) -> None:
    into = bytearray(1 << 20)
    with socket.create_connection((host, port)) as connection:
        while connection.recv_into(into):
            pass
        connection.sendall(b".")


if __name__ == "__main__":
    _drain(sys.argv[1], int(sys.argv[2]))
