"""Checkpoints: everything that a resumed run needs, as safetensors and JSON, never a pickle.

    checkpoints/<step>/tensors.safetensors   parameters, averages and optimizer state, by name
    checkpoints/<step>/meta.json             numbers and names; where a tensor belongs, its key
    checkpoints/<step>/SHA256SUMS            both files, in the form of ``sha256sum --check``

A folder is written under another name, synced, and renamed: there is a whole checkpoint or none. A newest one that is
damaged all the same is left where it is, told, and the one before it is taken. Files are hashed while they are written
and while they are read, so neither takes a second copy in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fleet.errors import LearnerError
from fleet.files import Files, storage_errors
from learner.tensor_file import (
    MAX_HEADER_BYTES,
    PIECE_BYTES,
    bytes_of,
    layout,
    put_tensors,
    read_tensors,
    take_tensors,
)

log = logging.getLogger("fleet.learner")
FORMAT = 1
_NAME = re.compile(r"[0-9]{10}")
_TENSORS, _META, _SUMS = "tensors.safetensors", "meta.json", "SHA256SUMS"
_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")


@dataclasses.dataclass
class Checkpoint:
    """``state``: nested maps and lists of tensors and plain data. ``meta``: plain data about the run. ``time_ns``: wall
    clock when it was taken."""

    step: int
    meta: dict[str, Any]
    state: dict[str, Any]
    time_ns: int = dataclasses.field(default_factory=time.time_ns)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: ``checkpoints`` of the run folder.
        keep: How many of the newest stay.
        keep_every_h: Of older ones, one in so many hours stays as well; 0: none.
    """

    def __init__(self, folder: Path, *, keep: int = 3, keep_every_h: float = 0.0, files: Files | None = None) -> None:
        self._folder, self._keep, self._keep_every_h, self._files = folder, keep, keep_every_h, files or Files()
        self._times_ns: dict[int, int] = {}
        self.refused: list[str] = []  # why newer checkpoints than the one loaded were not taken

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint and deletes those that need not stay. Nobody may change the tensors meanwhile.

        Raises:
            LearnerError: The state holds what cannot be read back; nothing was written.
            StorageError: The disk failed or is full; earlier checkpoints are untouched.
        """
        skeleton, tensors = take_tensors(checkpoint.state)
        head, ordered = layout(tensors)
        meta = {
            "format": FORMAT,
            "step": checkpoint.step,
            "time_ns": checkpoint.time_ns,
            "meta": checkpoint.meta,
            "state": skeleton,
        }
        target = self._path(checkpoint.step)
        part = target.with_suffix(".part")
        with storage_errors(f"checkpoint {target.name}"):
            self._files.make_folders(self._folder)
            self._sweep()
            self._files.mkdir(part)
            try:
                self._write_all(part, itertools.chain([head], map(bytes_of, ordered)), json.dumps(meta, indent=1).encode())
            except OSError:
                with contextlib.suppress(OSError):  # of a full disk robots need the rest
                    self._sweep()
                raise
            if target.exists():  # a damaged one that was passed over: the run came by here again
                self._files.replace(target, target.with_suffix(".gone"))
            self._files.replace(part, target)
            self._files.fsync_dir(self._folder)
            self._times_ns[checkpoint.step] = checkpoint.time_ns
            self._prune()
        return target

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None when there is none at all. ``refused`` says what was passed over.

        Raises:
            LearnerError: There are checkpoints, and all of them are damaged.
        """
        self.refused = []
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except LearnerError as error:
                self.refused.append(str(error))
                log.warning("%s", error)
        if self.refused:
            raise LearnerError(
                f"all {len(self.refused)} checkpoints in {self._folder} are damaged, the newest: {self.refused[0]}",
                rule="a run goes on from a whole checkpoint",
                remedy=f"look at the disk; to begin again on the same data, move {self._folder} away",
            )
        return None

    def load(self, step: int) -> Checkpoint:
        """One checkpoint, its checksums verified while it is read.

        Raises:
            LearnerError: It is missing or damaged, or of another version of this software.
        """
        folder = self._path(step)
        try:
            sums = _sums_in(_read(folder / _SUMS).decode())
            if set(sums) != {_TENSORS, _META}:
                raise ValueError(f"{_SUMS} names {', '.join(sorted(sums)) or 'nothing'}"[:200])
            meta = _parse_meta(_read(folder / _META), sums[_META])
            hasher = hashlib.sha256()
            with open(folder / _TENSORS, "rb", buffering=0) as file:
                tensors, _ = read_tensors(file, os.fstat(file.fileno()).st_size, hasher.update)
            if hasher.hexdigest() != sums[_TENSORS]:
                raise ValueError(f"{_TENSORS} does not fit its checksum")
            return Checkpoint(int(meta["step"]), meta["meta"], put_tensors(meta["state"], tensors), int(meta["time_ns"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise LearnerError(
                f"checkpoint {folder} is damaged: {error}"[:1000], rule=f"its files are whole and fit {_SUMS}"
            ) from None

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:010d}"

    def _write_all(self, folder: Path, tensors: Iterable[bytes | memoryview], meta: bytes) -> None:
        """The three files of a checkpoint, durably."""
        sums = {_TENSORS: self._write(folder / _TENSORS, tensors), _META: self._write(folder / _META, [meta])}
        self._write(folder / _SUMS, ["".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()])
        self._files.fsync_dir(folder)

    def _write(self, path: Path, pieces: Iterable[bytes | memoryview]) -> str:
        """Writes a file durably, and returns its sha256."""
        hasher, at, handle = hashlib.sha256(), 0, self._files.open_new(path)
        try:
            for whole in pieces:
                for begin in range(0, len(whole), PIECE_BYTES):
                    piece = whole[begin : begin + PIECE_BYTES]
                    hasher.update(piece)
                    self._files.write(handle, [piece])
                    self._files.start_writing(handle, at, len(piece))
                    at += len(piece)
            self._files.fsync(handle)
        finally:
            self._files.close(handle)
        return hasher.hexdigest()

    def _prune(self) -> None:
        """Deletes what need not stay: first by name and durably, so that no half checkpoint carries a whole one's name."""
        steps = self.steps()
        stay = {*steps[-self._keep :], *self._one_in_so_many_hours(steps[: -self._keep])}
        gone = [step for step in steps if step not in stay]
        for step in gone:
            self._files.replace(self._path(step), self._path(step).with_suffix(".gone"))
            self._times_ns.pop(step, None)
        if gone:
            self._files.fsync_dir(self._folder)
        self._sweep()

    def _one_in_so_many_hours(self, steps: list[int]) -> list[int]:
        """Those that lie at least the stated time after the one that stays before them; before it too, as a clock that was
        set back makes them."""
        stay: list[int] = []
        for step in steps if self._keep_every_h else []:
            time_ns = self._time_ns(step)
            if time_ns is not None and (
                not stay or abs(time_ns - (self._time_ns(stay[-1]) or 0)) >= self._keep_every_h * 3.6e12
            ):
                stay.append(step)
        return stay

    def _time_ns(self, step: int) -> int | None:
        """When a checkpoint was taken; None where it is damaged."""
        if step not in self._times_ns:
            try:
                self._times_ns[step] = int(_parse_meta(_read(self._path(step) / _META))["time_ns"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                return None
        return self._times_ns[step]

    def _sweep(self) -> None:
        """Removes what a killed ``save`` left behind, and what no longer counts."""
        for path in [path for suffix in ("part", "gone") for path in self._folder.glob(f"[0-9]*.{suffix}")]:
            for file in list(path.iterdir()):
                self._files.unlink(file)
            self._files.rmdir(path)


def _read(path: Path) -> bytes:
    """A small file; one that is huge is refused before it is in memory."""
    size = path.stat().st_size
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"{path.name} has {size} bytes")
    return path.read_bytes()


def _sums_in(text: str) -> dict[str, str]:
    """Digests by file name."""
    *lines, rest = text.split("\n")
    found = [_SUM.fullmatch(line) for line in lines]
    if rest or not all(found):
        raise ValueError(f"{_SUMS} is {text[:200]!r}")
    return {match[2]: match[1] for match in found if match}


def _parse_meta(data: bytes, digest: str | None = None) -> dict[str, Any]:
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{_META} ({len(data)} bytes) does not fit its checksum")
    meta = json.loads(data)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{_META} has another format than {FORMAT}, which this software reads")
    return meta
