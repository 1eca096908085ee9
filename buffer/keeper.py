"""The keeper: what is done to sealed segments beside the gateway, in a thread of its own.

Each round it enters newly sealed segments in the manifest, writes index sidecars that are missing or damaged, does what
retention asks for, unlinks what was retired a grace ago, and looks at the room on the disk. It never touches the segment
that is being written. What goes wrong is counted, logged once and tried again in the next round; ingest goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from buffer import sidecar
from buffer.manifest import Entry
from buffer.retention import Limits, Upkeep
from buffer.segment import segment_name
from fleet.errors import DiskFull, FleetError, StorageError
from fleet.files import Files, storage_errors
from fleet.journal import Journal
from fleet.metrics import Metrics

log = logging.getLogger("fleet.buffer")

INTERVAL_S = 10.0
_BUSY_S = 1.0  # between rounds while retention has more to do
_SIDECARS_S = 2.0  # of each round, so that the gateway's thread is not kept waiting


class Keeper:
    """Started by the process that holds the log's lock, stopped before the log is closed.

    Args:
        folder: The log's folder.
        grace_s: Between a segment's retirement and the unlinking of its files.
        warn_free_bytes: With less room on the disk it warns.
        journal: Where ``retired`` and ``disk`` lines go.
        metrics: Of the gateway's catalogue.

    Attributes:
        num_errors: Steps of rounds that failed.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        *,
        grace_s: float = 60.0,
        warn_free_bytes: int = 0,
        interval_s: float = INTERVAL_S,
        files: Files | None = None,
        journal: Journal | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._folder, self._limits, self._files = folder, limits, files or Files()
        self._grace_ns, self._warn_free, self._interval_s = int(grace_s * 1e9), warn_free_bytes, interval_s
        self._journal, self._metrics = journal, metrics
        self._upkeep: Upkeep | None = None
        self._indexed: set[str] = set()
        self._said: dict[str, str] = {}
        self._is_low = self._is_over = self._has_more = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self.num_errors = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits until the round that is under way has ended its current step."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.round()
            self._stop.wait(min(self._interval_s, _BUSY_S) if self._has_more else self._interval_s)

    def round(self) -> None:
        """One round. Raises nothing."""
        for step in (self._open, self._enter, self._index, self._retire, self._sweep, self._look_at_disk):
            if self._stop.is_set() or (self._upkeep is None and step != self._open):
                return
            self._guarded(step.__name__.strip("_"), step)

    def _guarded(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # a defect in here must not end ingest, nor later rounds
            self._count(name, error)
        else:
            self._said.pop(name, None)

    def _count(self, name: str, error: Exception) -> None:
        self.num_errors += 1
        if self._metrics is not None:
            self._metrics.add("fleet_keeper_errors")
        if self._said.get(name) != str(error):
            self._said[name] = str(error)
            log.error("the buffer's keeper, %s: %s", name, error, exc_info=not isinstance(error, FleetError))

    def _open(self) -> None:
        if self._upkeep is None:
            upkeep = Upkeep(self._files, self._folder)
            upkeep.sweep_strays()
            self._upkeep = upkeep

    def _enter(self) -> None:
        assert self._upkeep is not None
        self._upkeep.sync(time.time_ns())
        errors, self._upkeep.errors = self._upkeep.errors, []
        for error in errors:
            self._count("enter", error)

    def _index(self) -> None:
        """Sidecars of sealed segments, each looked at until it is there, then never again in the life of this process."""
        until_s = time.monotonic() + _SIDECARS_S
        for entry in self._segments():
            if entry.file not in self._indexed and time.monotonic() < until_s and not self._stop.is_set():
                self._index_one(entry)

    def _index_one(self, entry: Entry) -> None:
        name, what = segment_name(self._folder / entry.file), f"index of {entry.file}"
        try:
            if sidecar.load(name, entry.length) is None:
                sidecar.write(self._files, self._folder, name)
        except DiskFull:
            raise  # making one costs more than seeing that there is no room
        except StorageError as error:
            self._count(what, error)
        else:
            self._said.pop(what, None)
            self._indexed.add(entry.file)

    def _retire(self) -> None:
        assert self._upkeep is not None
        self._has_more = False
        done = self._upkeep.retire(self._limits, time.time_ns())
        self._has_more = bool(done)
        for action in done:
            entry = action.entry
            log.info("retention by %s: %s of segment %d frees %d bytes", action.why, action.kind, entry.number, action.frees)
            if self._journal is not None:
                fields = {"action": action.kind, "why": action.why, "frees": action.frees, "steps": entry.num_steps}
                self._journal.write("retired", segment=entry.number, **fields)

    def _sweep(self) -> None:
        assert self._upkeep is not None
        self._upkeep.sweep(self._grace_ns, time.time_ns())

    def _look_at_disk(self) -> None:
        with storage_errors(f"looking at the disk of {self._folder}"):
            free = self._files.free_bytes(self._folder)
        stored = sum(entry.length for entry in self._segments())
        if self._metrics is not None:
            self._metrics.set("fleet_disk_free", free)
            self._metrics.set("fleet_buffer_stored", stored)
            self._metrics.set("fleet_buffer_damaged", sum(entry.num_damaged > 0 for entry in self._segments()))
        if (free < self._warn_free) != self._is_low:
            self._is_low = not self._is_low
            how = "nearly full" if self._is_low else "no longer nearly full"
            log.warning("the disk of %s is %s: %.2f GB free", self._folder, how, free / 1e9)
            if self._journal is not None:
                self._journal.write("disk", low=self._is_low, free_gb=round(free / 1e9, 3))
        is_over = 0 < self._limits.max_bytes < stored and not self._has_more
        if is_over != self._is_over:
            self._is_over = is_over
            if is_over:
                log.warning("%s holds %.2f GB, more than its limit: the rest is protected", self._folder, stored / 1e9)

    def _segments(self) -> tuple[Entry, ...]:
        return self._upkeep.manifest.segments if self._upkeep is not None else ()
