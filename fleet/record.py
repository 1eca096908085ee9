"""One record of the log's segments and of the spool's files: a checked header, a msgpack key, a payload.

    offset  size  field (little-endian)
    0       4     magic b"FLR1"
    4       1     kind
    5       1     checksum: 2 = CRC-32C (Castagnoli)
    6       2     0
    8       4     header length: the payload starts that far after the record's start
    12      4     key length
    16      4     payload length
    20      4     checksum of the payload
    24      8     how many bytes of this file were fsynced when the record was written
    32      8     salt of the file
    40      4     checksum of bytes 0..40 and of the key
    44      ..    key (msgpack map), zeros up to the payload

Records and payloads start at multiples of 64 bytes, so that Arrow buffers in a mapped file are aligned. The salt is
random for each file and stands in its name: bytes inside of a payload cannot pass for a record when a reader looks for
the next one after damage. CRC-32C by fastcrc, which uses the processor's instructions: it costs a few
percent of the copy of the same bytes, so every payload is checked whenever it is read.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
from fastcrc import crc32

from fleet.errors import StorageError

crc32c = crc32.iscsi  # Castagnoli's polynomial; crc32c(data, crc32c(before)) goes on from a part

ALIGNMENT = 64
MAX_KEY_BYTES = 1024 * 1024
SALT_BYTES = 8
_MAGIC = b"FLR1"
_CRC32C = 2
_HEAD = struct.Struct("<4sBBHIIIIQ8s")
_CHECK = struct.Struct("<I")
_KEY_AT = _HEAD.size + _CHECK.size
_ZEROS = bytes(ALIGNMENT)


@dataclasses.dataclass(frozen=True)
class Record:
    """A record whose header is intact. Offsets count from the start of the file; ``end`` is where the next one starts."""

    at: int
    kind: int
    key: dict[str, Any]
    payload_at: int
    payload_length: int
    payload_crc: int
    fsynced: int
    end: int


@dataclasses.dataclass(frozen=True)
class Damage:
    """Bytes ``at`` to ``end`` are no valid record. ``key`` where the header could still be read."""

    at: int
    end: int
    key: dict[str, Any] | None = None


def pack(kind: int, key: Mapping[str, Any], payload: bytes | memoryview, salt: bytes, fsynced: int) -> list[bytes | memoryview]:
    """The record as buffers to be written one after the other; its length is a multiple of 64.

    Raises:
        StorageError: The key is larger than a reader takes.
    """
    packed = msgpack.packb(key, use_bin_type=True)
    if len(packed) > MAX_KEY_BYTES:
        raise StorageError(f"a record's key has {len(packed)} bytes", rule=f"at most {MAX_KEY_BYTES} bytes")
    header_length = _KEY_AT + len(packed) + -(_KEY_AT + len(packed)) % ALIGNMENT
    head = _HEAD.pack(_MAGIC, kind, _CRC32C, 0, header_length, len(packed), len(payload), crc32c(payload), fsynced, salt)
    check = _CHECK.pack(crc32c(packed, crc32c(head)))
    header = b"".join((head, check, packed)).ljust(header_length, b"\0")
    return [header, payload, _ZEROS[: -len(payload) % ALIGNMENT]]


def packed_size(key_bytes: int, payload_length: int) -> int:
    """An upper bound of a record's length."""
    return _KEY_AT + key_bytes + payload_length + 2 * ALIGNMENT


def parse(data: Any, at: int, end: int, salt: bytes) -> Record | None:
    """The record at ``at`` if its header is intact and all of it lies before ``end``, else None. Reads no payload."""
    if at + _KEY_AT > end:
        return None
    head = bytes(data[at : at + _KEY_AT])
    magic, kind, checksum, _, header_length, key_length, length, crc, fsynced, own_salt = _HEAD.unpack_from(head)
    if magic != _MAGIC or own_salt != salt or checksum != _CRC32C:
        return None
    payload_at = at + header_length
    stop = payload_at + length + -length % ALIGNMENT
    if key_length > MAX_KEY_BYTES or header_length < _KEY_AT + key_length or header_length % ALIGNMENT or stop > end:
        return None
    packed = bytes(data[at + _KEY_AT : at + _KEY_AT + key_length])
    if crc32c(packed, crc32c(head[: _HEAD.size])) != _CHECK.unpack_from(head, _HEAD.size)[0]:
        return None
    key = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    return Record(at, kind, key, payload_at, length, crc, fsynced, stop)


def payload_intact(data: Any, record: Record) -> bool:
    """Whether the payload's checksum holds."""
    view = memoryview(data)[record.payload_at : record.payload_at + record.payload_length]
    return crc32c(view) == record.payload_crc


def scan(data: Any, start: int, end: int, salt: bytes, *, verify: bool = True) -> Iterator[Record | Damage]:
    """All records between two offsets in order, and what lies between them that is none.

    Args:
        data: A bytes-like object with ``find``: bytes or a memory map.
        verify: Also check payloads.
    """
    at = start
    while at < end:
        record = parse(data, at, end, salt)
        if record is None:
            found = _next_record(data, at + ALIGNMENT, end, salt)
            yield Damage(at, found)
            at = found
            continue
        if verify and not payload_intact(data, record):
            yield Damage(at, record.end, record.key)
        else:
            yield record
        at = record.end


def _next_record(data: Any, at: int, end: int, salt: bytes) -> int:
    """Offset of the next intact header, or ``end``."""
    while True:
        at = data.find(_MAGIC, at, end)
        if at < 0:
            return end
        if at % ALIGNMENT == 0 and parse(data, at, end, salt) is not None:
            return at
        at += 1
