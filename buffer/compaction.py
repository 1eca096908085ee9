"""A part of a sealed segment as a new file with the same number: the fragments of some episodes, byte for byte."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from buffer.manifest import Entry, facts_of, source_bits
from buffer.segment import (
    KIND_FRAGMENT,
    KIND_HEADER,
    EpisodeKey,
    SegmentName,
    SegmentState,
    mapped,
    pack_header,
    segment_name,
    store_state,
)
from fleet.files import Files, storage_errors
from fleet.record import SALT_BYTES, Damage, Record, pack, payload_intact, scan

_READ_BYTES = 1 << 20


def compact(
    files: Files, folder: Path, entry: Entry, protect: tuple[str, ...], protected_bits: int, guarded: Collection[EpisodeKey]
) -> Entry:
    """Writes the fragments of ``guarded`` episodes, and of those with a protected step in this segment, to a new file,
    with the segment's marks; fragments with labels too. The old file stays as it is.

    Args:
        protect: Names of the protected sources, to be noted with the segment.
        protected_bits: The same as bits ``1 << Source``.

    Returns:
        Facts of what is left: of the new file; of the old one where nothing could be left out; of the old one as damaged
        where something in it that is to be kept cannot be read.

    Raises:
        DiskFull, StorageError: Nothing of a new file is left.
    """
    name = segment_name(folder / entry.file)
    with storage_errors(f"compacting {name.path}"):
        _read_ahead(name, entry.length)
        data = mapped(name, entry.length)
        items = list(scan(data, 0, len(data), name.salt, verify=False))
        kept = _kept(items, protected_bits, guarded)
        damaged = sum(isinstance(item, Damage) for item in items) + sum(not payload_intact(data, r) for r in kept)
        if damaged or not kept or kept[0].kind != KIND_HEADER:
            return dataclasses.replace(entry, num_damaged=max(damaged, 1))
        if len(kept) == len(items):
            return dataclasses.replace(entry, kept_for=protect)
        new, length = _write(files, folder, entry, data, kept, protect)
    return facts_of(new, length)


def _kept(items: list[Record | Damage], protected_bits: int, guarded: Collection[EpisodeKey]) -> list[Record]:
    records = [item for item in items if isinstance(item, Record)]
    fragments = [record for record in records if record.kind == KIND_FRAGMENT]
    wanted = {_episode(record) for record in fragments if source_bits(record.key) & protected_bits}
    wanted.update(guarded)
    return [r for r in records if r.kind == KIND_HEADER or _episode(r) in wanted or "labels" in r.key["tables"]]


def _episode(record: Record) -> EpisodeKey:
    return record.key["robot"], record.key["boot"], record.key["episode"]


def _write(
    files: Files, folder: Path, entry: Entry, data: Any, kept: list[Record], protect: tuple[str, ...]
) -> tuple[SegmentName, int]:
    salt = secrets.token_bytes(SALT_BYTES)
    new = SegmentName(entry.number, folder / f"{entry.number:08d}-{salt.hex()}.seg", salt)
    partial = new.path.with_suffix(".partial")
    view, length = memoryview(data), 0
    try:
        fd = files.open_new(partial)
        try:
            for record in kept:
                payload = view[record.payload_at : record.payload_at + record.payload_length]
                buffers = (
                    pack_header(entry.number, payload, salt, generation=entry.generation + 1, kept_for=protect)
                    if record.kind == KIND_HEADER
                    else pack(record.kind, record.key, payload, salt, 0)
                )
                files.write(fd, buffers)
                length += sum(len(part) for part in buffers)
            files.fsync(fd)
        finally:
            files.close(fd)
        store_state(files, new, SegmentState(length, True))
        files.replace(partial, new.path)  # from here on it is whole, and counts where there is no manifest
        files.fsync_dir(folder)
    except OSError:
        for path in (partial, new.path, new.state_path):
            with contextlib.suppress(OSError):
                files.unlink(path)
        raise
    return new, length


def _read_ahead(name: SegmentName, length: int) -> None:
    """Brings the file into the page cache by calls that let other threads run, which page faults do not."""
    fd = os.open(name.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        scratch = memoryview(bytearray(_READ_BYTES))
        for at in range(0, length, _READ_BYTES):
            os.preadv(fd, [scratch], at)
    finally:
        os.close(fd)
