"""Index sidecars: the index part of a sealed segment in a file beside it, so that a reader need not look into the segment.

    00000001-<salt>.index    one record: a key with the segment's length, and the part's columns as Arrow streams

A sidecar is only ever a quicker way to what the segment says: it counts when its checksum holds and it was made of this
segment at this length, and may be deleted at any time. The payloads' checksums are verified when it is made.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from buffer.parts import IndexPart, PartBuilder
from buffer.reader import LogRecord, SegmentMap, log_record, map_segment
from buffer.segment import KIND_FRAGMENT, SegmentName, read_state_file
from fleet.files import Files, storage_errors
from fleet.record import Record, pack, parse, payload_intact, scan

KIND_INDEX = 3
_VERSION = 1
_NAMES = ("fragments", "steps", "chunks", "places", "offsets")
_ROWS = ("episodes", "labels")


def write(files: Files, folder: Any, name: SegmentName) -> bool:
    """Makes the sidecar of a sealed segment, durably.

    Returns:
        False where there is none to make: the segment is not sealed, or empty.

    Raises:
        DiskFull, StorageError: It could not be stored, or the segment could not be read.
    """
    with storage_errors(f"making the index of {name.path}"):
        state, segment = read_state_file(name.state_path), map_segment(name)
    if state is None or not state.sealed or segment is None:
        return False
    with storage_errors(f"writing {name.index_path}"):
        files.write_atomic(name.index_path, to_bytes(make(segment, state.length), name, state.length))
    return True


def load(name: SegmentName, length: int) -> IndexPart | None:
    """The index part of a sealed segment of this length; None where the sidecar is missing, damaged or another's."""
    try:
        data = name.index_path.read_bytes()
    except OSError:
        return None
    record = parse(data, 0, len(data), name.salt)
    if record is None or record.kind != KIND_INDEX or not payload_intact(data, record):
        return None
    if (record.key.get("version"), record.key.get("number"), record.key.get("length")) != (_VERSION, name.number, length):
        return None
    return _from_payload(pa.py_buffer(data).slice(record.payload_at, record.payload_length), record.key)


def make(segment: SegmentMap, length: int) -> IndexPart:
    """The index part of a segment, from the segment itself."""
    records, num_damaged = records_of(segment, length)
    builder = PartBuilder(segment.address, len(segment.bytes))
    for record in records:
        builder.add(record)
    part = builder.build()
    part.num_damaged = num_damaged
    return part


def records_of(segment: SegmentMap, length: int) -> tuple[list[LogRecord], int]:
    """All intact fragments of a segment up to its length, and the number of places in it that could not be read."""
    records, num_damaged = [], 0
    for item in scan(segment.data, 0, min(length, len(segment.data)), segment.name.salt):
        if not isinstance(item, Record):
            num_damaged += 1
        elif item.kind == KIND_FRAGMENT:
            records.append(log_record(item, segment))
    return records, num_damaged


def to_bytes(part: IndexPart, name: SegmentName, length: int) -> bytes:
    """The sidecar of a part."""
    tables = [pa.table(getattr(part, columns)) for columns in _NAMES] + [getattr(part, rows) for rows in _ROWS]
    names = {"boots": part.boots, "specs": part.specs, "tasks": part.tasks}
    streams = [json.dumps(names).encode(), *(_stream(table) for table in tables)]
    key = {
        "version": _VERSION,
        "number": name.number,
        "length": length,
        "lengths": [len(stream) for stream in streams],
        "num_records": part.num_records,
        "num_damaged": part.num_damaged,
        "refused": part.refused,
    }
    return b"".join(pack(KIND_INDEX, key, b"".join(streams), name.salt, 0))


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_payload(payload: pa.Buffer, key: dict[str, Any]) -> IndexPart:
    streams, at = [], 0
    for length in key["lengths"]:
        streams.append(payload.slice(at, length))
        at += length
    names = json.loads(streams[0].to_pybytes())
    tables = [pa.ipc.open_stream(stream).read_all() for stream in streams[1:]]
    columns: list[Any] = [{n: table.column(n).to_numpy() for n in table.column_names} for table in tables[: len(_NAMES)]]
    boots = [(robot, boot) for robot, boot in names["boots"]]
    return IndexPart(
        boots,
        names["specs"],
        names["tasks"],
        **dict(zip(_NAMES, columns, strict=True)),
        **dict(zip(_ROWS, tables[len(_NAMES) :], strict=True)),
        num_records=key["num_records"],
        refused=key["refused"],
        num_damaged=key["num_damaged"],
    )
