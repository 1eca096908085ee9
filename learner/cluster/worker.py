"""The process of an actor: one function on a thread, and its newest report for whoever asks. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
import faulthandler
import fcntl
import importlib
import logging
import os
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleet.errors import FleetError
from fleet.runfolder import RunFolder

log = logging.getLogger("fleet.worker")
LEASH_S = 120.0  # a process that nobody asked for so long has lost its driver, and ends rather than hold the run's lock


class Worker:
    """Runs ``function(stop=..., report=..., **arguments)``.

    Args:
        output: File that gets what the process writes to stdout and stderr, added at its end; "" leaves it to Ray.
    """

    def __init__(self, output: str = "") -> None:
        if output:
            _redirect(Path(output))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
        self._stop, self._done = threading.Event(), False
        self._report: Any = {}
        self._error: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._asked = time.monotonic()
        threading.Thread(target=self._watch, name="leash", daemon=True).start()

    def rendezvous(self, address: str) -> str:
        """tcp://HOST:PORT on which the first rank can listen."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"

    def begin(self, function: str, arguments: Mapping[str, Any], address: str = "") -> None:
        """Starts ``function``, named as module:function, and returns. ``address``: of this node, for what ranks exchange."""
        if address and (interface := _interface(address)):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, interface)  # else gloo asks what the host's name means, often 127.0.1.1
        self._thread = threading.Thread(target=self._work, args=(function, arguments), name="work", daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        self._asked = time.monotonic()
        newest = self._report
        report = newest if isinstance(newest, dict) else dataclasses.asdict(newest)
        return {"pid": os.getpid(), "done": self._done, "error": self._error, "report": report}

    def stop(self) -> None:
        """Asks the function to end."""
        self._stop.set()

    def _work(self, function: str, arguments: Mapping[str, Any]) -> None:
        def report(newest: Any) -> None:
            self._report = newest

        try:
            module, _, name = function.partition(":")
            call: Callable[..., Any] = getattr(importlib.import_module(module), name)
            call(stop=self._stop.is_set, report=report, **arguments)
        except FleetError as error:
            log.error("%s", error)
            self._error = {**error.to_fields(), "time_s": time.time()}
        except BaseException as error:  # shown by the driver, which decides what happens next
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            self._error = {"code": "error", "what": what, "rule": "", "remedy": "", "time_s": time.time()}
        self._done = True

    def _watch(self) -> None:
        while time.monotonic() - self._asked < LEASH_S:
            time.sleep(0.5)
        os._exit(1)


def run_rank(
    function: str, run: str, arguments: Mapping[str, Any], stop: Callable[[], bool], report: Callable[[Any], None]
) -> None:
    """What a rank's worker runs: ``function(run, stop=, report=, **arguments)`` on the run folder of its node."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(RunFolder.open(Path(run)), stop=stop, report=report, **arguments)


def _redirect(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()


def _interface(address: str) -> str:
    """The network interface that has an IPv4 address; "" if none is found."""
    request = 0x8915  # SIOCGIFADDR, Linux
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, request, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
