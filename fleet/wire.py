"""The messages between a robot and its gateway: kinds, fields, sizes, and their encoding.

A message is two frames: a msgpack header ``[protocol, kind, fields]`` and a payload of raw bytes. msgpack and
not pickle, because a header comes from the network: decoding it can build numbers, strings, lists and maps only.
``FIELDS`` is the whole contract: which fields a kind must carry, and their types.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import msgpack

from fleet.errors import ProtocolError

PROTOCOL = 1  # the version this software speaks
PROTOCOLS = (1, 1)  # the oldest and newest version it understands
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 32 * 1024 * 1024


class Kind(enum.IntEnum):
    """What a message is. Robot -> gateway (R), gateway -> robot (G)."""

    HELLO = 1  # R: who I am, which versions and which spec; opens (robot, boot)
    WELCOME = 2  # G: you are admitted; the high-water mark of this boot
    FRAGMENT = 3  # R: a run of steps, in the payload
    ACK = 4  # G: everything of this boot up to seq is durable
    HEARTBEAT = 5  # both: robot's clock and metrics; answered with the gateway's clock and newest release
    PULL = 6  # R: send me this manifest or chunk
    CHUNK = 7  # G: a manifest or a chunk, in the payload
    COMMAND = 8  # G: do this (reserved for assignments)
    EVENT = 9  # R: something happened (a release was loaded); G: something happened (a release is out)
    BYE = 10  # both: the end of this connection, with the reason


FIELDS: dict[Kind, dict[str, type | tuple[type, ...]]] = {
    Kind.HELLO: {"protocols": list, "software": str, "boot_id": str, "spec": dict, "spec_hash": str},
    Kind.WELCOME: {"run_id": str, "boot_id": str, "seq": int, "time_ns": int, "tasks": dict, "settings": dict},
    Kind.FRAGMENT: {"boot_id": str, "seq": int, "spec_hash": str, "tables": dict},
    Kind.ACK: {"boot_id": str, "seq": int},
    Kind.HEARTBEAT: {"time_ns": int, "mono_ns": int, "metrics": dict},
    Kind.PULL: {"what": str, "id": str},
    Kind.CHUNK: {"what": str, "id": str},
    Kind.COMMAND: {"command": str},
    Kind.EVENT: {"event": str},
    Kind.BYE: {"error": dict},
}


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. ``payload`` is any buffer; receivers may get a view that they must not keep writing to."""

    kind: Kind
    fields: dict[str, Any]
    payload: bytes | memoryview = b""


def encode(message: Message) -> tuple[bytes, bytes | memoryview]:
    """Header and payload frames.

    Raises:
        ProtocolError: A field is missing or mistyped, or a frame is larger than the receiver takes.
    """
    _check_fields(message.kind, message.fields)
    header = msgpack.packb([PROTOCOL, int(message.kind), message.fields], use_bin_type=True)
    if len(header) > MAX_HEADER_BYTES or len(message.payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"{message.kind.name} has a header of {len(header)} and a payload of {len(message.payload)} bytes",
            rule=f"at most {MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES} bytes",
            remedy="send fragments more often, or fewer fields",
        )
    return header, message.payload


def decode(header: bytes | memoryview, payload: bytes | memoryview = b"") -> Message:
    """Reads untrusted frames.

    Raises:
        ProtocolError: The header is not msgpack, not of a protocol we understand, or not of the stated form.
    """
    if len(header) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"frames of {len(header)} and {len(payload)} bytes", rule="within the stated sizes")
    try:
        parts = msgpack.unpackb(header, raw=False, strict_map_key=True, use_list=True)
        version, kind_number, fields = parts
        kind = Kind(kind_number)
    except Exception as error:  # msgpack raises many types on hostile bytes; all mean the same to the peer
        raise ProtocolError(f"header cannot be read: {type(error).__name__}", rule="msgpack [protocol, kind, fields]") from None
    if not isinstance(version, int) or not PROTOCOLS[0] <= version <= PROTOCOLS[1]:
        raise ProtocolError(
            f"message of protocol {version!r}", rule=f"this side understands {PROTOCOLS}", remedy="update the older side"
        )
    if not isinstance(fields, dict):
        raise ProtocolError(f"fields are a {type(fields).__name__}", rule="fields are a map")
    _check_fields(kind, fields)
    return Message(kind, fields, payload)


def _check_fields(kind: Kind, fields: dict[str, Any]) -> None:
    for name, expected in FIELDS[kind].items():
        value = fields.get(name)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise ProtocolError(
                f"{kind.name}.{name} is a {type(value).__name__}", rule=f"{kind.name} carries {name} of type {expected}"
            )
