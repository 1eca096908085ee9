"""What lies in a spool's folder: boots, their files, and what of them can still be read after a kill or a power loss."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import mmap
import os
import re
import secrets
import time
from pathlib import Path

import pyarrow as pa

from fleet.errors import FragmentRefused
from fleet.files import Files
from fleet.record import SALT_BYTES, Damage, Record, parse, payload_intact, scan
from fleet.schema import EPISODES, Fragment, decode_fragment, encode_fragment

FRAGMENT, DROPPED = 1, 2  # a DROPPED record stands for the numbers seq to last_seq
BOOT_NAME = re.compile(r"^(\d{8})-([0-9a-f]{16})$")
_FILE_NAME = re.compile(r"^\d{10}-([0-9a-f]{16})\.spool$")


@dataclasses.dataclass
class SpoolFile:
    """One file: records of one episode. ``pending``: numbers in it that are not acknowledged."""

    path: Path
    salt: bytes
    size: int = 0
    pending: int = 0

    @classmethod
    def create(cls, files: Files, folder: Path, first_seq: int) -> tuple[SpoolFile, int]:
        """A new file and its descriptor."""
        salt = secrets.token_bytes(SALT_BYTES)
        path = folder / f"{first_seq:010d}-{salt.hex()}.spool"
        return cls(path, salt), files.open_new(path)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One number of a boot and where its record lies; a dropped one has the place of its DROPPED record, or none."""

    seq: int
    episode: int
    spec_hash: str
    dropped: bool = False
    file: SpoolFile | None = None
    at: int = 0
    end: int = 0

    @property
    def size(self) -> int:
        return self.end - self.at

    def read(self) -> tuple[dict[str, int], memoryview] | None:
        """Table directory and payload; None where the file is damaged."""
        if self.dropped or self.file is None:
            return dropped_fragment(self.episode)
        with self.file.path.open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.at)
        record = parse(data, 0, len(data), self.file.salt)
        if record is None or not payload_intact(data, record):
            return None
        return record.key["tables"], memoryview(data)[record.payload_at : record.payload_at + record.payload_length]

    def decode(self) -> Fragment | None:
        """The tables; None where the file is damaged."""
        found = self.read()
        try:
            return None if found is None else decode_fragment(*found)
        except FragmentRefused:
            return None


@dataclasses.dataclass
class Boot:
    """One start of the actor. ``entries`` are the unacknowledged numbers up to ``last``, without a gap."""

    boot_id: str
    folder: Path
    entries: collections.deque[Entry] = dataclasses.field(default_factory=collections.deque)
    sent: int = 0
    last: int = 0
    full_episode: int | None = None  # its rest is refused: without the part that found no room it cannot go on


def dropped_fragment(episode: int) -> tuple[dict[str, int], memoryview]:
    """The tiny fragment that stands for a number whose data is gone."""
    row = {
        "episode_id": episode,
        "event": "dropped",
        "time_ns": time.time_ns(),
        "task": "",
        "instruction": "",
        "seed": -1,
        "reset_state_id": "",
        "group_id": "",
        "outcome": "aborted",
        "judge": "spool",
        "length": -1,
        "first_version": -1,
        "last_version": -1,
    }
    columns = {field.name: pa.array([row[field.name]], field.type) for field in EPISODES}
    return encode_fragment({"episodes": pa.RecordBatch.from_pydict(columns, schema=EPISODES)})


def read_boot(files: Files, boot_id: str, folder: Path) -> tuple[Boot, list[Damage]]:
    """What a boot of an earlier process left, and what could not be read.

    A file's torn tail is cut off. A hole between two numbers stays a hole for the caller to fill.
    """
    fragments: dict[int, Entry] = {}
    dropped: dict[int, Entry] = {}
    damage: list[Damage] = []
    spool_files: list[SpoolFile] = []
    for name in sorted(os.listdir(folder)):
        match = _FILE_NAME.match(name)
        if match is None:
            continue
        spool_file = SpoolFile(folder / name, bytes.fromhex(match[1]))
        spool_files.append(spool_file)
        for item in _scan_file(spool_file):
            if isinstance(item, Damage):
                damage.append(item)
                continue
            key, place = item.key, (spool_file, item.at, item.end)
            if item.kind == FRAGMENT:
                fragments[key["seq"]] = Entry(key["seq"], key["episode"], key["spec_hash"], False, *place)
            for seq in range(key["seq"], key["last_seq"] + 1) if item.kind == DROPPED else ():
                dropped[seq] = Entry(seq, key["episode"], key["spec_hash"], True, *place)
    entries = {**fragments, **dropped}
    boot = Boot(boot_id, folder, collections.deque(entries[seq] for seq in sorted(entries)))
    boot.last = boot.entries[-1].seq if boot.entries else 0
    boot.sent = boot.entries[0].seq - 1 if boot.entries else 0
    for entry in boot.entries:
        if entry.file is not None:
            entry.file.pending += 1
    for spool_file in [f for f in spool_files if not f.pending]:
        files.unlink(spool_file.path)
    if not boot.entries:
        with contextlib.suppress(OSError):
            files.rmdir(folder)
    return boot, damage


def _scan_file(spool_file: SpoolFile) -> list[Record | Damage]:
    """Records of a file, and damage between them; what follows the last record is only a torn tail."""
    with spool_file.path.open("rb") as file:
        spool_file.size = os.fstat(file.fileno()).st_size
        if spool_file.size == 0:
            return []
        with mmap.mmap(file.fileno(), spool_file.size, access=mmap.ACCESS_READ) as data:
            items = list(scan(data, 0, spool_file.size, spool_file.salt))
    while items and isinstance(items[-1], Damage) and items[-1].key is None:
        items.pop()
    return items


def fill_holes(boot: Boot, first: int) -> tuple[int, list[list[Entry]]]:
    """Gives each missing number from ``first`` on a dropped entry.

    Returns:
        Numbers that were missing; what cannot stand without them and is to be dropped by the caller: the rest of each
        episode that lost a fragment, for its frames would no longer follow each other.
    """
    expected, missing = first, 0
    broken: list[list[Entry]] = []
    is_broken = False
    filled: list[Entry] = []
    for entry in boot.entries:
        if entry.seq > expected:
            starts = not entry.dropped and _starts_episode(entry)
            # The gateway may have a part of the hole already: what is not below its episode is only known from here.
            episode = entry.episode - int(starts)
            filled += [Entry(seq, episode, entry.spec_hash, True) for seq in range(expected, entry.seq)]
            missing += entry.seq - expected
            is_broken = not starts and not entry.dropped
            if is_broken:
                broken.append([])
        elif is_broken and entry.episode != filled[-1].episode:
            is_broken = False
        if is_broken and not entry.dropped:
            broken[-1].append(entry)
        filled.append(entry)
        expected = entry.seq + 1
    if missing:
        boot.entries = collections.deque(filled)
    return missing, broken


def num_steps(entry: Entry) -> int:
    """Steps of a fragment, 0 where it cannot be read."""
    fragment = entry.decode()
    return 0 if fragment is None else fragment.num_steps


def _starts_episode(entry: Entry) -> bool:
    fragment = entry.decode()
    return (
        fragment is not None and "steps" in fragment.tables and fragment.tables["steps"].column("frame_index")[0].as_py() == 0
    )
