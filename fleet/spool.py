"""The robot's disk queue: every fragment lies here from the moment it is recorded until the gateway has stored it.

    00000003-<boot>/0000000017-<salt>.spool      records of one episode, from seq 17 on

Each start of the actor is a boot with numbers of its own, from 1 without a gap. Fragments of earlier boots are sent
before the current one's. A file goes when all of it is acknowledged. When the queue is full, whole closed episodes of
which nothing was sent are dropped, those without an intervention first; each of their numbers then carries a tiny
fragment that says so, because the gateway takes no gap.

What was acknowledged is not written down: after a restart the gateway's high-water mark (``rewind``) tells.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleet.errors import DiskFull, StorageError
from fleet.files import Files, FolderLock, storage_errors
from fleet.record import pack
from fleet.robot import Source
from fleet.schema import Fragment
from fleet.spool_files import BOOT_NAME, DROPPED, FRAGMENT, Boot, Entry, SpoolFile, fill_holes, num_steps, read_boot

FILE_BYTES = 4 * 1024 * 1024  # a file ends when it is larger, also within an episode
KEEP_BYTES = 256 * 1024  # an acknowledged file that may still grow is kept up to this size


@dataclasses.dataclass(frozen=True)
class SpooledFragment:
    """What a FRAGMENT message needs."""

    boot_id: str
    seq: int
    spec_hash: str
    tables: Mapping[str, int]
    payload: memoryview


@dataclasses.dataclass
class _Writing:
    """The file that is written, and the episode that it holds."""

    file: SpoolFile
    fd: int
    episode: int
    dirty: bool = False


class Spool:
    """One process and one thread at a time.

    Args:
        folder: Where the queue lies.
        max_bytes: Room for what is not acknowledged.
        files: The seam for file calls.

    Attributes:
        boot_id: Of this start, 16 hex digits.
        num_pending, bytes_pending: Fragments that are not acknowledged, and their size.
        dropped_steps: Steps given up for want of room, or because a fragment before them in their episode was damaged.
        damaged: Fragments that could not be read back.

    Raises:
        RunFolderError: Another process uses the folder.
        DiskFull, StorageError: The folder cannot be written or read.
    """

    def __init__(self, folder: Path, *, max_bytes: int, files: Files | None = None) -> None:
        self._files, self._max_bytes = files or Files(), max_bytes
        self.num_pending = self.bytes_pending = self.dropped_steps = self.damaged = 0
        self._writing: _Writing | None = None
        self._examined: dict[tuple[str, int], tuple[bool, bool]] = {}
        self.boot_id = secrets.token_hex(8)
        with storage_errors(f"opening the spool in {folder}"):
            self._files.make_folders(folder)
            self._lock = FolderLock(folder, "spool")
            found = sorted(match[0] for match in map(BOOT_NAME.match, os.listdir(folder)) if match)
            self._boots = [boot for name in found if (boot := self._recover(folder / name)).entries]
            number = int(found[-1][:8]) + 1 if found else 1
            self._current = Boot(self.boot_id, folder / f"{number:08d}-{self.boot_id}")
            self._files.mkdir(self._current.folder)
            self._files.fsync_dir(folder)
        self._boots.append(self._current)

    def append(self, spec_hash: str, directory: Mapping[str, int], payload: bytes | memoryview, episode_id: int) -> int:
        """Hands one fragment to the operating system, where it survives this process; ``flush`` makes it survive a power loss.

        Args:
            episode_id: Of its steps; an episode is closed once a fragment of another one follows.

        Returns:
            Its seq.

        Raises:
            DiskFull: No room, and nothing to drop. So is all that follows in the same episode, because it would have
                a gap. The caller counts the steps.
            StorageError: The disk failed.
        """
        boot = self._current
        if episode_id == boot.full_episode:
            raise DiskFull(
                f"episode {episode_id} has lost a part", rule="an episode has no gaps", remedy="the next one is taken again"
            )
        key = {"seq": boot.last + 1, "spec_hash": spec_hash, "tables": dict(directory), "episode": episode_id}
        try:
            self._make_room(len(payload), episode_id)
            file, at = self._write(episode_id, key, payload)
        except StorageError:
            boot.full_episode = episode_id
            raise
        boot.last += 1
        boot.entries.append(Entry(boot.last, episode_id, spec_hash, False, file, at, file.size))
        file.pending += 1
        self._count(boot.entries[-1], 1)
        return boot.last

    def flush(self) -> None:
        """Makes everything appended durable.

        Raises:
            DiskFull, StorageError: It may not survive a power loss. It is sent nevertheless.
        """
        writing = self._writing
        if writing is None or not writing.dirty:
            return
        try:
            with storage_errors(f"fsync of {writing.file.path}"):
                self._files.fsync(writing.fd)
                self._files.fsync_dir(writing.file.path.parent)
        except StorageError:
            self._end_file()  # what a failed fsync left is unknown: nothing more goes into this file
            raise
        writing.dirty = False

    def next_unsent(self) -> SpooledFragment | None:
        """The next fragment to send, oldest boot first, each boot in order; None when all are sent."""
        for boot in self._boots:
            if boot.entries and boot.sent < boot.last:
                at = max(boot.sent + 1 - boot.entries[0].seq, 0)
                found = boot.entries[at].read()
                if found is None:
                    self._give_up(boot, at)
                    found = boot.entries[at].read()
                entry = boot.entries[at]
                if found is not None:
                    boot.sent = entry.seq
                    return SpooledFragment(boot.boot_id, entry.seq, entry.spec_hash, *found)
        return None

    def unsend(self, boot_id: str, seq: int) -> None:
        """Puts ``seq`` and what follows back: it could not be handed to the link. Acknowledges nothing."""
        for boot in self._boots:
            if boot.boot_id == boot_id:
                boot.sent = min(boot.sent, seq - 1)

    def acknowledge(self, boot_id: str, seq: int) -> None:
        """Removes everything of this boot up to ``seq``: the gateway has stored it."""
        for boot in [b for b in self._boots if b.boot_id == boot_id]:
            seq = min(seq, boot.last)
            while boot.entries and boot.entries[0].seq <= seq:
                entry = boot.entries.popleft()
                self._count(entry, -1)
                self._release(entry.file)
            boot.sent = max(boot.sent, seq)
            if not boot.entries and boot is not self._current:
                self._boots.remove(boot)
                with contextlib.suppress(OSError):
                    self._files.rmdir(boot.folder)

    def rewind(self, boot_id: str, high_water: int) -> None:
        """A connection begins: up to ``high_water`` all is stored, what follows is to be sent again."""
        self.acknowledge(boot_id, high_water)
        for boot in self._boots:
            if boot.boot_id == boot_id:
                boot.sent = min(high_water, boot.last)
                self._fill(boot, boot.sent + 1)

    def boots(self) -> list[str]:
        """Boots with unacknowledged fragments, oldest first, and the current one."""
        return [boot.boot_id for boot in self._boots]

    def close(self) -> None:
        """Everything unacknowledged stays for the next start."""
        with contextlib.suppress(StorageError):
            self.flush()
        self._end_file()
        with contextlib.suppress(OSError):  # not empty: stays
            self._files.rmdir(self._current.folder)
        self._lock.release()

    def _recover(self, folder: Path) -> Boot:
        boot, damage = read_boot(self._files, folder.name[9:], folder)
        self.damaged += len(damage)
        for entry in boot.entries:
            self._count(entry, 1)
        if boot.entries:
            self._fill(boot, boot.entries[0].seq)
        return boot

    def _fill(self, boot: Boot, first: int) -> None:
        missing, broken = fill_holes(boot, first)
        self.num_pending += missing
        for entries in broken:
            self._lose(boot, entries)

    def _count(self, entry: Entry, sign: int) -> None:
        self.num_pending += sign
        self.bytes_pending += sign * (0 if entry.dropped else entry.size)

    def _give_up(self, boot: Boot, at: int) -> None:
        """A fragment that can no longer be read, and the rest of its episode, become dropped ones."""
        self.damaged += 1
        lost = boot.entries[at]
        rest = [e for e in itertools.islice(boot.entries, at, None) if e.episode == lost.episode and not e.dropped]
        self._lose(boot, rest)
        if boot is self._current and boot.entries[-1].episode == lost.episode:
            boot.full_episode = lost.episode

    def _lose(self, boot: Boot, entries: list[Entry]) -> None:
        """Drops what cannot stand without a fragment that is gone. Noted, because once the gateway has a part of it
        nothing else tells a later start why the rest must not be sent."""
        self.dropped_steps += sum(map(num_steps, entries))
        try:
            self._drop_noted(boot, entries)
        except StorageError:  # without the note only a restart at this very place is stuck
            self._drop(boot, entries)

    def _drop(self, boot: Boot, entries: list[Entry]) -> None:
        """Replaces entries by dropped ones without a place on disk, and lets go of their files."""
        gone = {entry.seq for entry in entries}
        boot.entries = collections.deque(
            Entry(e.seq, e.episode, e.spec_hash, True) if e.seq in gone else e for e in boot.entries
        )
        for entry in entries:
            self.bytes_pending -= entry.size
            self._release(entry.file)

    def _write(self, episode: int, key: dict[str, Any], payload: bytes | memoryview) -> tuple[SpoolFile, int]:
        """Appends a record; returns where. One episode a file, so that dropping an episode frees files."""
        folder = self._current.folder
        if self._writing is not None and (self._writing.episode != episode or self._writing.file.size >= FILE_BYTES):
            self.flush()
            self._end_file()
        with storage_errors(f"spooling into {folder}"):
            if self._writing is None:
                self._writing = _Writing(*SpoolFile.create(self._files, folder, key["seq"]), episode)
            writing = self._writing
            parts = pack(FRAGMENT, key, payload, writing.file.salt, 0)
            # After an error it may end in half a record. The rest of its episode is refused, so nothing follows there.
            self._files.write(writing.fd, parts)
        at = writing.file.size
        writing.file.size += sum(len(part) for part in parts)
        writing.dirty = True
        return writing.file, at

    def _end_file(self) -> None:
        if self._writing is not None:
            self._files.close(self._writing.fd)
            file, self._writing = self._writing.file, None
            self._release(file, 0)

    def _release(self, file: SpoolFile | None, count: int = 1) -> None:
        """Forgets numbers of a file; removes it once none is left."""
        if file is None:
            return
        file.pending -= count
        if self._writing is not None and self._writing.file is file:
            if file.pending == 0 and file.size > KEEP_BYTES:
                self._end_file()
            return
        if file.pending == 0:
            with contextlib.suppress(OSError):  # a file that stays is found, and sent again, at the next start
                self._files.unlink(file.path)

    def _make_room(self, num_bytes: int, episode_id: int) -> None:
        while self.bytes_pending + num_bytes > self._max_bytes:
            chosen = self._choose_drop(episode_id)
            if chosen is None:
                raise DiskFull(
                    f"{self.bytes_pending} bytes wait in the spool and nothing of them can be dropped",
                    rule=f"at most {self._max_bytes} bytes",
                    remedy="the gateway must be reached, or the spool needs more room",
                )
            self._drop_episode(*chosen)

    def _choose_drop(self, open_episode: int) -> tuple[Boot, list[Entry]] | None:
        """The oldest whole closed episode of which nothing was sent; one in which no person acted comes first."""
        fallback = None
        for boot in self._boots:
            for episode, group in itertools.groupby(boot.entries, key=lambda entry: entry.episode):
                entries = list(group)
                still_open = boot is self._current and episode == open_episode
                if still_open or entries[0].dropped or entries[0].seq <= boot.sent:
                    continue
                droppable, person = self._examine(boot, entries)
                if droppable and not person:
                    return boot, entries
                fallback = fallback or ((boot, entries) if droppable else None)
        return fallback

    def _examine(self, boot: Boot, entries: list[Entry]) -> tuple[bool, bool]:
        """Whether an episode is here from its start, and whether a person acted in it. Read once."""
        key = (boot.boot_id, entries[0].episode)
        if key not in self._examined:
            fragments = [entry.decode() for entry in entries]
            self._examined[key] = (_is_opening(fragments[0]), any(map(_has_person, fragments)))
        return self._examined[key]

    def _drop_episode(self, boot: Boot, entries: list[Entry]) -> None:
        num_dropped = sum(map(num_steps, entries))
        self._drop_noted(boot, entries)
        self.dropped_steps += num_dropped

    def _drop_noted(self, boot: Boot, entries: list[Entry]) -> None:
        """First the note that the numbers are dropped, durably, then the files: a kill in between costs nothing."""
        first, last = entries[0], entries[-1]
        with storage_errors(f"dropping episode {first.episode} of {boot.folder}"):
            file, fd = SpoolFile.create(self._files, boot.folder, first.seq)
            try:
                key = {"seq": first.seq, "last_seq": last.seq, "spec_hash": first.spec_hash, "episode": first.episode}
                self._files.write(fd, pack(DROPPED, key, b"", file.salt, 0))
                self._files.fsync(fd)
            finally:
                self._files.close(fd)
            self._files.fsync_dir(boot.folder)
        self._drop(boot, entries)
        gone = range(first.seq, last.seq + 1)
        boot.entries = collections.deque(dataclasses.replace(e, file=file) if e.seq in gone else e for e in boot.entries)
        file.pending = len(gone)
        self._examined.pop((boot.boot_id, first.episode), None)


def _is_opening(fragment: Fragment | None) -> bool:
    episodes = fragment.tables.get("episodes") if fragment is not None else None
    return episodes is not None and "opened" in episodes.column("event").to_pylist()


def _has_person(fragment: Fragment | None) -> bool:
    steps = fragment.tables.get("steps") if fragment is not None else None
    if steps is None:
        return False
    sources = set(steps.column("source").to_numpy().tolist())
    return bool(sources & {Source.OPERATOR, Source.DEMO}) or bool(
        steps.column("intervention").to_numpy(zero_copy_only=False).any()
    )
