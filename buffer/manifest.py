"""What a log consists of: ``manifest.json``, and the one way to list the segments that count.

The manifest holds facts of sealed segments and names the retired ones. It is a convenience that is never needed:
segments that it does not know are found by listing the folder, and a manifest that is lost or damaged is made anew from
the headers of the records. One process writes it, the one that holds the log's lock: fsynced, replaced atomically.

A number of a segment may stand on two files for a while: retention writes what it keeps of a segment to a new file with
a higher generation. The one that the manifest names counts; where it names none, the higher generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from buffer.segment import (
    KIND_FRAGMENT,
    KIND_HEADER,
    EpisodeKey,
    SegmentName,
    list_segments,
    mapped,
    read_header,
)
from fleet.files import Files, storage_errors
from fleet.record import Damage, Record, crc32c, payload_intact, scan
from fleet.robot import SOURCE_NAMES

FILE_NAME = "manifest.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class BootPart:
    """What a segment holds of one (robot, boot). Only its first and its last episode may go on in other segments.

    Attributes:
        first_sources, last_sources: Who acted in those episodes, within this segment: bit ``1 << Source``.
    """

    robot_id: str
    boot_id: str
    first_seq: int
    last_seq: int
    first_episode: int
    first_sources: int
    last_episode: int
    last_sources: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """Facts of one segment, read from the headers of its records.

    Attributes:
        file: Name of the segment's file in the log's folder.
        length: Committed bytes.
        generation: 0 as it was written, one more each time retention left a part of it.
        by_source: Steps by the name of their source.
        num_labels: Fragments with a ``labels`` table.
        num_damaged: Places that are no record; payloads are not looked at.
        has_marks: Whether its header, which holds the high-water marks at its start, is intact.
        kept_for: The protected sources for which retention has left this part of it; None before.
    """

    number: int
    file: str
    length: int
    generation: int
    num_fragments: int
    num_steps: int
    by_source: Mapping[str, int]
    num_labels: int
    first_recv_ns: int
    last_recv_ns: int
    num_damaged: int
    has_marks: bool
    kept_for: tuple[str, ...] | None = None
    boots: tuple[BootPart, ...] = ()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Entry:
        kept_for = None if fields["kept_for"] is None else tuple(fields["kept_for"])
        boots = tuple(BootPart(*part) for part in fields["boots"])
        return cls(**{**fields, "kept_for": kept_for, "boots": boots})

    @functools.cached_property
    def line(self) -> str:
        """As JSON; made once, because a manifest of thousands of entries is written whenever one is added."""
        return json.dumps(self.to_dict())

    def agrees_with(self, facts: Entry) -> bool:
        """Whether this is what the segment says, but for what retention notes down without a new file."""
        return dataclasses.replace(facts, kept_for=self.kept_for, num_damaged=self.num_damaged) == self

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "boots": [dataclasses.astuple(part) for part in self.boots]}


@dataclasses.dataclass(frozen=True)
class Retired:
    """A file that counts no more. It is unlinked when readers had time to notice.

    Attributes:
        why: "age", "bytes", or "superseded" by a file of a higher generation.
    """

    number: int
    file: str
    length: int
    retired_ns: int
    why: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Sealed segments that count, in order, and files that count no more."""

    segments: tuple[Entry, ...] = ()
    retired: tuple[Retired, ...] = ()

    def to_bytes(self) -> bytes:
        """A line with the checksum of all that follows, then JSON."""
        segments = ",\n".join(entry.line for entry in self.segments)
        retired = ",\n".join(json.dumps(dataclasses.asdict(item)) for item in self.retired)
        body = f'{{"version": {_VERSION}, "segments": [\n{segments}\n], "retired": [\n{retired}\n]}}\n'.encode()
        return f'{{"crc32c": "{crc32c(body):08x}"}}\n'.encode() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest | None:
        """None where the bytes are not what ``to_bytes`` of this version wrote."""
        check, newline, body = data.partition(b"\n")
        if not newline or check != f'{{"crc32c": "{crc32c(body):08x}"}}'.encode():
            return None
        content = json.loads(body)
        if content["version"] != _VERSION:
            return None
        segments = tuple(Entry.from_dict(fields) for fields in content["segments"])
        return cls(segments, tuple(Retired(**fields) for fields in content["retired"]))


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a log; None where it is missing, damaged or of another version.

    Raises:
        StorageError: It cannot be read.
    """
    with storage_errors(f"reading the manifest of {folder}"):
        try:
            data = (folder / FILE_NAME).read_bytes()
        except FileNotFoundError:
            return None
    return Manifest.from_bytes(data)


def store_manifest(files: Files, folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest, durably. Only for the process that holds the log's lock.

    Raises:
        DiskFull, StorageError: The old one still counts, or (after a power loss) either.
    """
    with storage_errors(f"storing the manifest of {folder}"):
        files.write_atomic(folder / FILE_NAME, manifest.to_bytes())


def live_segments(folder: Path, manifest: Manifest | None = None) -> list[SegmentName]:
    """The segments of a log that count, in order; the last ones may still be written.

    Args:
        manifest: As just loaded; None loads it. It must be older than the listing, which is made here.

    Raises:
        OSError, StorageError: The folder cannot be read.
    """
    manifest = manifest or load_manifest(folder) or Manifest()
    return pick_live(list_segments(folder), manifest)


def pick_live(names: Iterable[SegmentName], manifest: Manifest) -> list[SegmentName]:
    """Of the files in a folder those that count."""
    retired = {item.file for item in manifest.retired}
    files_of: dict[int, list[SegmentName]] = {}
    for name in names:
        if name.path.name not in retired:
            files_of.setdefault(name.number, []).append(name)
    named = {entry.file for entry in manifest.segments}
    return sorted(_pick_one(found, named) for found in files_of.values())


def _pick_one(found: list[SegmentName], named: set[str]) -> SegmentName:
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda name: (name.path.name in named, _generation(name)))


def _generation(name: SegmentName) -> int:
    try:
        header = read_header(name)
    except OSError:
        return -1
    return -1 if header is None else header.generation


def facts_of(name: SegmentName, length: int) -> Entry:
    """Facts of the first ``length`` bytes of a segment. Reads the headers of its records and no payload of a fragment.

    Raises:
        StorageError: The segment cannot be read.
    """
    with storage_errors(f"reading {name.path}"):
        data, facts = mapped(name, length), _Facts(name)
        for item in scan(data, 0, len(data), name.salt, verify=False):
            facts.add(item, data)
        return facts.entry(length)


class _Facts:
    """Adds up the records of one segment."""

    def __init__(self, name: SegmentName) -> None:
        self._name = name
        self._counts = [0] * len(SOURCE_NAMES)
        self._fragments = self._labels = self._damaged = self._generation = 0
        self._times: list[int] = []
        self._has_marks = False
        self._kept_for: tuple[str, ...] | None = None
        self._boots: dict[tuple[str, str], BootPart] = {}

    def add(self, item: Record | Damage, data: Any) -> None:
        if isinstance(item, Damage):
            self._damaged += 1
        elif item.kind == KIND_HEADER:
            self._has_marks = item.at == 0 and payload_intact(data, item)
            self._generation = item.key.get("generation", 0)
            self._kept_for = tuple(item.key["kept_for"]) if self._generation else None
        elif item.kind == KIND_FRAGMENT:
            self._add_fragment(item.key)

    def _add_fragment(self, key: dict[str, Any]) -> None:
        self._fragments += 1
        self._labels += "labels" in key["tables"]
        self._times = [self._times[0] if self._times else key["recv_ns"], key["recv_ns"]]
        for source, count in enumerate(key["steps"]):
            self._counts[source] += count
        bits, seq, episode = source_bits(key), key["seq"], key["episode"]
        boot = key["robot"], key["boot"]
        part = self._boots.get(boot)
        if part is None:
            self._boots[boot] = BootPart(*boot, seq, seq, episode, bits, episode, bits)
            return
        first = part.first_sources | bits if part.first_episode == episode else part.first_sources
        last = part.last_sources | bits if part.last_episode == episode else bits
        self._boots[boot] = dataclasses.replace(
            part, last_seq=seq, first_sources=first, last_episode=episode, last_sources=last
        )

    def entry(self, length: int) -> Entry:
        return Entry(
            number=self._name.number,
            file=self._name.path.name,
            length=length,
            generation=self._generation,
            num_fragments=self._fragments,
            num_steps=sum(self._counts),
            by_source={name: count for name, count in zip(SOURCE_NAMES, self._counts, strict=True) if count},
            num_labels=self._labels,
            first_recv_ns=self._times[0] if self._times else 0,
            last_recv_ns=self._times[-1] if self._times else 0,
            num_damaged=self._damaged + (not self._has_marks),
            has_marks=self._has_marks,
            kept_for=self._kept_for,
            boots=tuple(self._boots.values()),
        )


def source_bits(key: Mapping[str, Any]) -> int:
    """Who acted in a fragment, by its record's key: bit ``1 << Source``."""
    return sum(1 << source for source, count in enumerate(key["steps"]) if count)


def border_episodes(entries: Iterable[Entry]) -> Iterator[tuple[EpisodeKey, int]]:
    """The episodes at the borders of segments, with who acted in that part of them."""
    for entry in entries:
        for part in entry.boots:
            yield (part.robot_id, part.boot_id, part.first_episode), part.first_sources
            yield (part.robot_id, part.boot_id, part.last_episode), part.last_sources


class ManifestView:
    """The manifest as of the last change of the file; for readers, who look often.

    One that is lost or damaged leaves the last one in force.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._stamp = folder / FILE_NAME, (0, 0, 0)
        self.manifest = Manifest()

    def refresh(self) -> Manifest:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            facts = os.fstat(file.fileno())
            stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            if stamp != self._stamp:
                self.manifest, self._stamp = Manifest.from_bytes(file.read()) or self.manifest, stamp
        return self.manifest
