"""A release as a robot sees it: a signed manifest over content-addressed chunks of a safetensors file.

A release is immutable and content-addressed, so a robot asks only for chunks that it lacks: from any release to any
other, what did not change is never sent. Nothing here needs torch; what comes out is the bytes of a safetensors file.
Manifest and chunks come from a network: sizes are bounded before parsing, the signature covers all that is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Container, Mapping
from typing import Any

from fleet.errors import FleetError, ReleaseError

MAX_MANIFEST_BYTES = 8 * 1024 * 1024
MAX_CHUNK_BYTES = 4 * 1024 * 1024
MAX_RELEASE_BYTES = 256 * 1024**3
OWN_CHUNK_BYTES = 64 * 1024  # a tensor of this size or more does not share its chunks
CHUNK_ID = re.compile(r"[0-9a-f]{64}")
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}


def chunk_id(data: bytes | memoryview) -> str:
    """The name of a chunk: sha256 of its bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


@dataclasses.dataclass(frozen=True)
class ChunkRef:
    """One chunk of a release: its id and its length in bytes."""

    id: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one release is.

    Args:
        version: 1 and up, never given twice in a run.
        parent: The release before it, None for the first.
        algorithm: Name of the algorithm that trained it.
        step: Updates done when it was published.
        created_ns: Wall clock of the publishing machine.
        metrics: Finite numbers of the learner at that step.
        policy: ``family``, ``config`` and ``spec`` of the policy, plain data.
        header: Tensor name -> dtype, shape, data_offsets, as in a safetensors file.
        chunks: The data region in order.
        signature: Hex Ed25519 signature of the run's release key over everything else.
    """

    version: int
    parent: int | None
    algorithm: str
    step: int
    created_ns: int
    metrics: Mapping[str, float]
    policy: Mapping[str, Any]
    header: Mapping[str, Mapping[str, Any]]
    chunks: tuple[ChunkRef, ...]
    signature: str = ""

    @property
    def num_bytes(self) -> int:
        """Length of the data region."""
        return sum(chunk.bytes for chunk in self.chunks)

    def signed_bytes(self) -> bytes:
        """The bytes that the signature covers."""
        fields = self._fields()
        del fields["signature"]
        return _canonical(fields)

    def to_bytes(self) -> bytes:
        """Canonical JSON, what is stored and sent."""
        return _canonical(self._fields())

    def missing(self, have: Container[str]) -> list[str]:
        """Ids of the chunks that are not in ``have``, each once, in the order of the data."""
        return [i for i in dict.fromkeys(chunk.id for chunk in self.chunks) if i not in have]

    def _fields(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["chunks"] = [{"id": c.id, "bytes": c.bytes} for c in self.chunks]
        return fields


def read_manifest(data: bytes | memoryview) -> Manifest:
    """Reads untrusted bytes without checking who signed them; robots use ``parse_manifest``.

    Raises:
        ReleaseError: The bytes are not a manifest in the canonical form, or contradict themselves.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ReleaseError(f"a manifest of {len(data)} bytes", rule=f"at most {MAX_MANIFEST_BYTES}")
    try:
        fields = json.loads(bytes(data))
        fields["chunks"] = tuple(ChunkRef(**chunk) for chunk in fields["chunks"])
        manifest = Manifest(**fields)
        problem = _problem(manifest)
        # One form only: a second spelling of the same content (or a key given twice) would be another file.
        if problem is None and manifest.to_bytes() != bytes(data):
            problem = "its JSON is not in the canonical form"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise ReleaseError(f"a manifest cannot be read: {problem}", rule="the form that Manifest.to_bytes writes")
    return manifest


def parse_manifest(data: bytes | memoryview, release_public: str | bytes) -> Manifest:
    """Reads a manifest and verifies that the run's release key signed it.

    Raises:
        ReleaseError: The bytes are not a manifest, were altered, or were signed by another key.
    """
    from fleet.identity import verify

    manifest = read_manifest(data)
    try:
        good = verify(release_public, manifest.signed_bytes(), bytes.fromhex(manifest.signature))
    except (FleetError, ValueError):
        good = False
    if good is False:
        raise ReleaseError(
            f"the signature of release {manifest.version} does not fit",
            rule="a release is signed by the release key of the run in which the robot is enrolled",
            remedy="enrol the robot again if the run's keys were made anew; otherwise somebody altered the release",
        )
    return manifest


def assemble(manifest: Manifest, chunks: Mapping[str, bytes]) -> bytes:
    """The safetensors file of a release. Every chunk is checked against its id.

    Raises:
        ReleaseError: A chunk is missing or altered.
    """
    text = _canonical({name: dict(entry) for name, entry in manifest.header.items()})
    text += b" " * (-len(text) % 8)  # safetensors aligns its data to 8 bytes with spaces
    parts = [len(text).to_bytes(8, "little"), text]
    good: set[str] = set()
    for number, ref in enumerate(manifest.chunks):
        data = chunks.get(ref.id)
        if data is None:
            raise ReleaseError(
                f"chunk {number} of release {manifest.version} is missing", remedy="pull Manifest.missing() first"
            )
        if len(data) != ref.bytes or (ref.id not in good and chunk_id(data) != ref.id):
            raise ReleaseError(
                f"chunk {number} of release {manifest.version} is altered ({len(data)} bytes, {ref.bytes} expected)",
                rule="the id of a chunk is the sha256 of its bytes",
                remedy="delete it and pull it again",
            )
        good.add(ref.id)
        parts.append(data)
    return b"".join(parts)


def split(safetensors: bytes | memoryview) -> tuple[dict[str, dict[str, Any]], list[tuple[str, bytes]]]:
    """Cuts a safetensors file into chunks at tensor boundaries.

    Tensors are laid out anew: by item size, the large ones last among their size. So everything stays aligned, and
    small tensors share a few chunks instead of standing alone between large ones.

    Returns:
        The header of the new layout, and (id, bytes) of its chunks in order.

    Raises:
        ReleaseError: The bytes are not a safetensors file.
    """
    source, data = _read_header(memoryview(safetensors))
    small: dict[str, bool] = {n: e["data_offsets"][1] - e["data_offsets"][0] < OWN_CHUNK_BYTES for n, e in source.items()}
    order = sorted(source, key=lambda name: (-ITEM_BYTES[source[name]["dtype"]], not small[name], name))
    header: dict[str, dict[str, Any]] = {}
    pieces: list[bytes] = []
    pack: list[memoryview] = []
    offset = packed = 0
    for name in order:
        begin, end = source[name]["data_offsets"]
        size = end - begin
        header[name] = {**source[name], "data_offsets": [offset, offset + size]}
        offset += size
        if packed and (not small[name] or packed + size > MAX_CHUNK_BYTES):
            pieces.append(b"".join(pack))
            pack, packed = [], 0
        if small[name]:
            pack.append(data[begin:end])
            packed += size
        else:
            pieces += [bytes(data[i : min(i + MAX_CHUNK_BYTES, end)]) for i in range(begin, end, MAX_CHUNK_BYTES)]
    if packed:
        pieces.append(b"".join(pack))
    return header, [(chunk_id(piece), piece) for piece in pieces]


def _read_header(file: memoryview) -> tuple[dict[str, dict[str, Any]], memoryview]:
    size = int.from_bytes(file[:8], "little")
    if not 2 <= size <= min(len(file) - 8, MAX_MANIFEST_BYTES):
        raise ReleaseError(
            f"a safetensors file of {len(file)} bytes says its header has {size}", rule="8 bytes of length, a header, data"
        )
    try:
        header = json.loads(bytes(file[8 : 8 + size]))
        header.pop("__metadata__", None)
        problem = _header_problem(header, len(file) - 8 - size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise ReleaseError(f"a safetensors header cannot be used: {problem}", rule="tensors lie gapless in the data region")
    return header, file[8 + size :]


def _header_problem(header: Mapping[str, Mapping[str, Any]], num_bytes: int) -> str | None:
    """Why a header does not describe ``num_bytes`` of data, or None."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        shape, item = entry["shape"], ITEM_BYTES.get(entry["dtype"])
        if item is None:
            return f"{name!r} has dtype {entry['dtype']!r}, known are {sorted(ITEM_BYTES)}"
        if set(entry) != {"dtype", "shape", "data_offsets"} or not all(_is_count(n) for n in (begin, end, *shape)):
            return f"{name!r} is {dict(entry)}"
        if begin != at or end - begin != item * math.prod(shape):
            return f"{name!r} of {entry['dtype']}{shape} lies at {begin}..{end}, {at} is next"
        at = end
    return None if at == num_bytes else f"its tensors have {at} bytes, its data {num_bytes}"


def _problem(manifest: Manifest) -> str | None:
    """Why a manifest contradicts itself, or None."""
    for name in ("version", "step", "created_ns"):
        if not _is_count(getattr(manifest, name)):
            return f"{name} is {getattr(manifest, name)!r}"
    parent = manifest.parent
    if manifest.version < 1 or not (parent is None or (_is_count(parent) and 1 <= parent < manifest.version)):
        return f"version {manifest.version} with parent {parent!r}"
    texts: tuple[Any, ...] = (manifest.algorithm, manifest.signature)
    if not all(isinstance(text, str) for text in texts):
        return "algorithm and signature are text"
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in manifest.metrics.values()):
        return f"metrics are finite numbers, not {dict(manifest.metrics)}"
    if not {"family", "config", "spec"} <= set(manifest.policy):
        return f"policy has {sorted(manifest.policy)}, needed are family, config and spec"
    for chunk in manifest.chunks:
        if not CHUNK_ID.fullmatch(chunk.id):
            return f"chunk id {chunk.id!r}"
        if not _is_count(chunk.bytes) or not 0 < chunk.bytes <= MAX_CHUNK_BYTES:
            return f"a chunk of {chunk.bytes!r} bytes, at most {MAX_CHUNK_BYTES}"
    if manifest.num_bytes > MAX_RELEASE_BYTES:
        return f"{manifest.num_bytes} bytes of data, at most {MAX_RELEASE_BYTES}"
    return _header_problem(manifest.header, manifest.num_bytes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _canonical(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()
