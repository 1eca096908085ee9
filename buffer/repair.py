"""Makes anew what can be made anew: lengths of segments, the manifest, index sidecars. No byte of a segment is changed.

What is damaged inside of a segment stays as it is: readers pass over it, and ``verify`` names it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from buffer import sidecar
from buffer.labels import labels_folder
from buffer.log import Log
from buffer.manifest import FILE_NAME as MANIFEST
from buffer.manifest import Manifest, facts_of, load_manifest, pick_live
from buffer.reader import SegmentMap, map_segment
from buffer.retention import Upkeep
from buffer.segment import SegmentName, list_segments, read_state_file
from fleet.files import Files, storage_errors

Add = Callable[[str, str], None]  # file, what
Show = Callable[[int, int], None]  # bytes done, bytes in all


@dataclasses.dataclass(frozen=True)
class Repair:
    """One thing that is to be done, or was. ``file``: what is made anew, from the buffer folder."""

    file: str
    what: str


def repair(
    buffer: Path, *, dry_run: bool = True, files: Files | None = None, progress: Show = lambda done, total: None
) -> list[Repair]:
    """Looks for what can be made anew, and makes it unless ``dry_run``; returns what was found. Reads all of the log.

    Args:
        buffer: The run's buffer folder.
        progress: Called with (bytes done, bytes in all).

    Raises:
        RunFolderError: A process writes to this log: a gateway repairs its own states, and its keeper the rest.
        DiskFull, StorageError: What was done until then stays done.
    """
    seam = _ReadOnly() if dry_run else files or Files()
    done: list[Repair] = []

    def add(file: str, what: str) -> None:
        done.append(Repair(file, what))

    for folder in [folder for folder in (buffer, labels_folder(buffer)) if folder.is_dir()]:
        prefix = "" if folder == buffer else f"{folder.name}/"
        log = Log(folder, files=seam)  # holds the log's lock, and ends what a killed writer left
        try:
            for found in log.recovered:
                damage = f", {len(found.damaged)} damaged places before that" if found.damaged else ""
                what = f"its end is its last valid record, at byte {found.length:,}: {found.num_fragments} fragments{damage}"
                add(prefix + found.name.state_path.name, what)
            if folder == buffer:
                sealed = {found.name.path.name: found.length for found in log.recovered}
                _repair_manifest(seam, folder, sealed, add)
                _repair_sidecars(seam, folder, sealed, add, progress)
        finally:
            log.close()
    return done


def _repair_manifest(files: Files, folder: Path, sealed: dict[str, int], add: Add) -> None:
    """One that is lost, damaged, or says of a segment what is not so.

    Args:
        sealed: Lengths of segments that were sealed just now, or would have been.
    """
    stored = load_manifest(folder)
    known = stored or Manifest()
    with storage_errors(f"listing {folder}"):
        live = pick_live(list_segments(folder), known)
    entries = {entry.file: entry for entry in known.segments}
    wrong, missing = [], []
    for name in live:
        length = _sealed_length(name, sealed)
        entry = entries.pop(name.path.name, None)
        if length is None:
            continue
        if entry is None:
            missing.append(name.path.name)
        elif not entry.agrees_with(facts_of(name, length)):
            wrong.append(name.path.name)
    if stored is not None and not (wrong or missing or entries):
        return
    if stored is None:
        is_there = (folder / MANIFEST).exists()
        why = f"it is {'damaged' if is_there else 'not there'}: made anew from {len(missing)} segments"
    else:
        why = f"{len(missing)} segments entered, {len(wrong)} corrected, {len(entries)} that are gone forgotten"
    upkeep = Upkeep(files, folder)
    upkeep.manifest = Manifest(tuple(e for e in known.segments if e.file not in wrong), known.retired)
    upkeep.sync(time.time_ns())
    if upkeep.errors:
        raise upkeep.errors[0]
    add(MANIFEST, why)


def _sealed_length(name: SegmentName, sealed: dict[str, int]) -> int | None:
    if name.path.name in sealed:
        return sealed[name.path.name]
    state = read_state_file(name.state_path)
    return state.length if state is not None and state.sealed else None


def _repair_sidecars(files: Files, folder: Path, sealed: dict[str, int], add: Add, progress: Show) -> None:
    """Those that are lost, damaged, or were made before their segment was damaged: samplers go by them."""
    with storage_errors(f"reading {folder}"):
        live = pick_live(list_segments(folder), load_manifest(folder) or Manifest())
        lengths = {name: length for name in live if (length := _sealed_length(name, sealed)) is not None}
        done = 0
        for name, length in lengths.items():
            segment = map_segment(name)
            if segment is not None:
                stored = name.index_path.read_bytes() if name.index_path.exists() else None
                right = _sidecar_of(segment, length)
                if stored != right:
                    files.write_atomic(name.index_path, right)
                    add(
                        name.index_path.name,
                        f"it is {'not there' if stored is None else 'not what the segment says'}: made anew",
                    )
            done += length
            progress(done, sum(lengths.values()))


def _sidecar_of(segment: SegmentMap, length: int) -> bytes:
    return sidecar.to_bytes(sidecar.make(segment, length), segment.name, length)


class _ReadOnly(Files):
    """For a look at what would be done: nothing is changed, and what is to be written goes nowhere."""

    def open_new(self, path: Path) -> int:
        return super().open_existing(Path("/dev/null"))

    def open_existing(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        pass

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, folder: Path) -> None:
        pass

    def make_folders(self, path: Path) -> None:
        pass

    def write_atomic(self, path: Path, data: bytes) -> None:
        pass
