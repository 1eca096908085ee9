"""Checkpoints: everything that a resumed run needs, as safetensors and JSON, never a pickle.

    checkpoints/<step>/tensors.safetensors   parameters, averages and optimizer state, by name
    checkpoints/<step>/meta.json             numbers and names; where a tensor belongs, its key
    checkpoints/<step>/SHA256SUMS            both files, in the form of ``sha256sum --check``

A folder is written under another name, synced, and renamed: there is a whole checkpoint or none. A newest one that is
damaged all the same is left where it is, told, and the one before it is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fleet.errors import LearnerError
from fleet.files import Files, storage_errors
from learner.tensor_file import pack, put_tensors, take_tensors, to_arrays, unpack

__all__ = ["Checkpoint", "Checkpoints", "freeze", "pack", "to_arrays", "unpack"]
log = logging.getLogger("fleet.learner")
_NAME = re.compile(r"[0-9]{10}")
_FILES = ("tensors.safetensors", "meta.json")


@dataclasses.dataclass
class Checkpoint:
    """``state``: nested maps and lists of tensors and plain data. ``meta``: plain data about the run."""

    step: int
    meta: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: ``checkpoints`` of the run folder.
        keep: How many stay.
    """

    def __init__(self, folder: Path, *, keep: int = 3, files: Files | None = None) -> None:
        self._folder, self._keep, self._files = folder, keep, files or Files()
        self.refused: list[str] = []  # why newer checkpoints than the one loaded were not taken

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint and deletes those beyond ``keep``. The tensors must be copies, see ``freeze``.

        Raises:
            StorageError: The disk failed or is full; earlier checkpoints are untouched.
        """
        skeleton, tensors = take_tensors(checkpoint.state)
        meta = {"step": checkpoint.step, "meta": checkpoint.meta, "state": skeleton}
        contents = dict(zip(_FILES, (save(tensors), json.dumps(meta, indent=1).encode()), strict=True))
        sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
        target = self._folder / f"{checkpoint.step:010d}"
        part, old = target.with_suffix(".part"), target.with_suffix(".old")
        with storage_errors(f"checkpoint {target.name}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            part.mkdir()
            for name, data in {**contents, "SHA256SUMS": sums.encode()}.items():
                self._write(part / name, data)
            self._files.fsync_dir(part)
            if target.exists():  # a damaged one that was passed over: the run came by here again
                self._files.replace(target, old)
            self._files.replace(part, target)
            self._files.fsync_dir(self._folder)
            self._sweep()
            for step in self.steps()[: -self._keep]:
                shutil.rmtree(self._folder / f"{step:010d}")
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
        """One checkpoint, its checksums verified.

        Raises:
            LearnerError: It is missing or damaged.
        """
        folder = self._folder / f"{step:010d}"
        try:
            lines = (folder / "SHA256SUMS").read_text().splitlines()
            sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
            data = {name: (folder / name).read_bytes() for name in _FILES}
            for name in _FILES:
                if hashlib.sha256(data[name]).hexdigest() != sums.get(name):
                    raise ValueError(f"{name} ({len(data[name])} bytes) does not fit its checksum")
            meta, tensors = json.loads(data["meta.json"]), load(data["tensors.safetensors"])
            return Checkpoint(int(meta["step"]), meta["meta"], put_tensors(meta["state"], tensors))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise LearnerError(f"checkpoint {folder} is damaged: {error}", rule="its files fit SHA256SUMS") from None

    def _write(self, path: Path, data: bytes) -> None:
        handle = self._files.open_new(path)
        try:
            self._files.write(handle, [data])
            self._files.fsync(handle)
        finally:
            self._files.close(handle)

    def _sweep(self) -> None:
        """Removes what a killed ``save`` left behind; an ``.old`` without its new one is put back."""
        for path in list(self._folder.glob("[0-9]*.old")):
            if path.with_suffix("").exists():
                shutil.rmtree(path)
            else:
                self._files.replace(path, path.with_suffix(""))
        for path in list(self._folder.glob("[0-9]*.part")):
            shutil.rmtree(path)


def freeze(state: Any) -> Any:
    """A copy of a nested state whose tensors lie on the CPU and do not change any more. Arrays become tensors."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, Mapping):
        return {key: freeze(value) for key, value in state.items()}
    return [freeze(value) for value in state] if isinstance(state, (list, tuple)) else state
