"""What of a log is given up, by age and by bytes, and how: a kill at any instant loses nothing that is to be kept.

A segment past a limit is dropped whole if it has no episode with a protected step, else compacted: the fragments of
these episodes go to a new file with the same number, a new salt and a higher generation. The new file is whole and
fsynced before its name appears; the manifest, replaced atomically, is what makes it count in place of the old one; the
old one is unlinked after a grace, in which readers notice. The newest segment whose header holds the high-water marks
is never touched, nor what comes after it, so the marks outlive all data.

A segment with damage in what would be kept stays as it is. An episode that gets its first protected step when its
beginning was given up already is kept from there on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from buffer.compaction import compact
from buffer.manifest import (
    FILE_NAME,
    Entry,
    Manifest,
    Retired,
    border_episodes,
    facts_of,
    load_manifest,
    pick_live,
    store_manifest,
)
from buffer.segment import EpisodeKey, SegmentName, list_segments, read_header, read_state_file
from fleet.errors import StorageError
from fleet.files import Files, FolderLock, storage_errors
from fleet.robot import SOURCE_NAMES

PROTECTED = ("demo", "operator")
DROP, COMPACT = "drop", "compact"
_COMPACTIONS = 4  # in one call


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a log may hold.

    Args:
        max_bytes: Of all segments; 0: no limit.
        max_age_ns: Since the newest fragment of a segment was received; 0: no limit.
        protect: Sources (their names) whose episodes are kept whatever the limits say.
    """

    max_bytes: int = 0
    max_age_ns: int = 0
    protect: tuple[str, ...] = PROTECTED

    @property
    def source_bits(self) -> int:
        return sum(1 << SOURCE_NAMES.index(name) for name in self.protect)


@dataclasses.dataclass(frozen=True)
class Action:
    """What is to be done with one segment.

    Attributes:
        kind: "drop" or "compact".
        why: "age" or "bytes".
        frees: Bytes; of a compaction at most so many.
    """

    kind: str
    entry: Entry
    why: str
    frees: int


def plan(
    entries: Sequence[Entry],
    limits: Limits,
    now_ns: int,
    used_bytes: int,
    guarded: Callable[[], Collection[EpisodeKey]] = tuple,
) -> list[Action]:
    """What the limits ask for, oldest segment first.

    Args:
        entries: Segments that may be touched, in order.
        used_bytes: Of all segments, also those that may not be touched.
        guarded: Episodes that are known to have a protected step in some segment; asked only when it matters.
    """
    actions: list[Action] = []
    left, keys = used_bytes, functools.cache(guarded)
    for entry in entries:
        why = _why(entry, limits, now_ns, left)
        if why is None or entry.num_damaged or entry.kept_for == limits.protect:
            continue
        protected = sum(entry.by_source.get(name, 0) for name in limits.protect)
        holds = protected or entry.num_labels or any(key in keys() for key, _ in border_episodes([entry]))
        share = (entry.num_steps - protected) / max(entry.num_steps, 1) if holds else 1
        actions.append(Action(COMPACT if holds else DROP, entry, why, int(entry.length * share)))
        left -= actions[-1].frees
    return actions


def _why(entry: Entry, limits: Limits, now_ns: int, used_bytes: int) -> str | None:
    if limits.max_age_ns and entry.last_recv_ns < now_ns - limits.max_age_ns:
        return "age"
    return "bytes" if limits.max_bytes and used_bytes > limits.max_bytes else None


class Upkeep:
    """Writes the manifest and does what it says. Only for the process that holds the log's lock.

    Every step leaves a log that is whole; what was left undone is done by the next call.

    Args:
        folder: The log's folder.

    Attributes:
        manifest: As it is stored.
        errors: What went wrong with single segments; they are left as they are.
    """

    def __init__(self, files: Files, folder: Path) -> None:
        self._files, self._folder = files, folder
        self.errors: list[StorageError] = []
        self.manifest = load_manifest(folder) or Manifest()

    def sync(self, now_ns: int) -> None:
        """Enters sealed segments that the manifest does not know; forgets those that are gone; retires files that another
        one of a higher generation, or an earlier manifest, has taken the place of.

        Raises:
            DiskFull, StorageError: The manifest is as before.
        """
        with storage_errors(f"listing {self._folder}"):
            names = list_segments(self._folder)
        live = pick_live(names, self.manifest)
        known = {entry.file: entry for entry in self.manifest.segments}
        entries = [entry for name in live if (entry := known.get(name.path.name) or self._sealed(name)) is not None]
        spare = {name.path.name for name in names} - {name.path.name for name in live}
        spare -= {item.file for item in self.manifest.retired}
        retired = [Retired(n.number, n.path.name, 0, now_ns, "superseded") for n in names if n.path.name in spare]
        self._store(Manifest(tuple(entries), (*self.manifest.retired, *retired)))

    def _sealed(self, name: SegmentName) -> Entry | None:
        state = read_state_file(name.state_path)
        if state is None or not state.sealed:
            return None
        try:
            return facts_of(name, state.length)
        except StorageError as error:
            self.errors.append(error)
            return None

    def plan(self, limits: Limits, now_ns: int) -> list[Action]:
        """What the limits ask for now.

        Raises:
            StorageError: The folder cannot be read.
        """
        with storage_errors(f"reading {self._folder}"):
            open_names = self._unsealed()
            used = sum(entry.length for entry in self.manifest.segments)
            used += sum(state.length for name, _ in open_names if (state := read_state_file(name.state_path)))
            marks = [entry.number for entry in self.manifest.segments if entry.has_marks]
            marks += [name.number for name, has_marks in open_names if has_marks]
        entries = [entry for entry in self.manifest.segments if entry.number < max(marks, default=0)]
        return plan(entries, limits, now_ns, used, lambda: self._guarded(limits))

    def _unsealed(self) -> list[tuple[SegmentName, bool]]:
        """Segments that count and that the manifest does not know, and whether their headers are intact."""
        known = {entry.number for entry in self.manifest.segments}
        live = pick_live(list_segments(self._folder), self.manifest)
        return [(name, read_header(name) is not None) for name in live if name.number not in known]

    def _guarded(self, limits: Limits) -> set[EpisodeKey]:
        """Episodes that may lie in several segments and have a protected step in one of them."""
        entries = list(self.manifest.segments)
        for name, _ in self._unsealed():
            state = read_state_file(name.state_path)
            if state is not None:
                entries.append(facts_of(name, state.length))
        return {key for key, bits in border_episodes(entries) if bits & limits.source_bits}

    def retire(self, limits: Limits, now_ns: int) -> list[Action]:
        """Does what the limits ask for, a few compactions at a time, so that what they replace can be unlinked in between;
        returns what was done. To be called again until that is nothing.

        Raises:
            DiskFull, StorageError: What was done until then counts.
        """
        actions = self.plan(limits, now_ns)
        drops = [action for action in actions if action.kind == DROP]
        if drops:
            self._swap({action.entry.number: None for action in drops}, {a.entry.number: a.why for a in drops}, now_ns)
        compactions = [action for action in actions if action.kind == COMPACT][:_COMPACTIONS]
        guarded = self._guarded(limits) if compactions else set()
        done = []
        for action in compactions:
            left = compact(self._files, self._folder, action.entry, limits.protect, limits.source_bits, guarded)
            self._swap({left.number: left}, {left.number: action.why}, now_ns)
            done.append(dataclasses.replace(action, frees=action.entry.length - left.length))
        return [*drops, *done]

    def _swap(self, changes: dict[int, Entry | None], why: dict[int, str], now_ns: int) -> None:
        """Stores a manifest in which other entries, or none, stand for some numbers; files that are named no more are
        retired."""
        segments, retired = [], list(self.manifest.retired)
        for entry in self.manifest.segments:
            changed = changes.get(entry.number, entry)
            if changed is not None:
                segments.append(changed)
            if changed is None or changed.file != entry.file:
                retired.append(Retired(entry.number, entry.file, entry.length, now_ns, why[entry.number]))
        self._store(Manifest(tuple(segments), tuple(retired)))

    def sweep(self, grace_ns: int, now_ns: int) -> None:
        """Unlinks files that were retired longer ago than the grace, then forgets them.

        Raises:
            StorageError: Some are left; they are tried again.
        """
        due = [item for item in self.manifest.retired if now_ns - item.retired_ns >= grace_ns]
        if not due:
            return
        with storage_errors(f"unlinking retired segments in {self._folder}"):
            for item in due:
                path = self._folder / item.file
                for victim in (path, path.with_suffix(".index"), path.with_suffix(".state")):
                    with contextlib.suppress(FileNotFoundError):
                        self._files.unlink(victim)
            # Before the manifest forgets them: after a power loss a file that is back would count again.
            self._files.fsync_dir(self._folder)
        left = tuple(item for item in self.manifest.retired if item not in due)
        self._store(Manifest(self.manifest.segments, left))

    def sweep_strays(self) -> None:
        """Unlinks what a killed process left half done: parts of files, and states and sidecars without a segment.

        Raises:
            StorageError: The folder cannot be read or changed.
        """
        with storage_errors(f"tidying {self._folder}"), os.scandir(self._folder) as found:
            for path in [Path(entry.path) for entry in found if entry.is_file()]:
                lone = path.suffix in (".state", ".index") and not path.with_suffix(".seg").exists()
                if path.suffix == ".partial" or lone:
                    self._files.unlink(path)

    def _store(self, manifest: Manifest) -> None:
        if manifest != self.manifest or not (self._folder / FILE_NAME).exists():
            store_manifest(self._files, self._folder, manifest)
            self.manifest = manifest


def prune(folder: Path, limits: Limits, *, dry_run: bool = True, files: Files | None = None) -> list[Action]:
    """Retention by hand, while no gateway runs: all that the limits ask for, without a grace.

    Args:
        dry_run: Only say what would be done; takes no lock and changes nothing.

    Raises:
        RunFolderError: A process writes to this log.
        DiskFull, StorageError: What was done until then counts.
    """
    if dry_run:
        upkeep = Upkeep(_ReadOnly(), folder)
        upkeep.sync(time.time_ns())
        return upkeep.plan(limits, time.time_ns())
    lock = FolderLock(folder, "log")
    try:
        upkeep = Upkeep(files or Files(), folder)
        upkeep.sweep_strays()
        upkeep.sync(time.time_ns())
        done: list[Action] = []
        upkeep.sweep(0, time.time_ns())
        while more := upkeep.retire(limits, time.time_ns()):
            done += more
            upkeep.sweep(0, time.time_ns())
        return done
    finally:
        lock.release()


class _ReadOnly(Files):
    """For a look at what would be done."""

    def write_atomic(self, path: Path, data: bytes) -> None:
        pass
