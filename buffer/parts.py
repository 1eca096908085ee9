"""What the index needs to know of a run of fragments, as plain columns: made from their Arrow bytes, or from a sidecar.

Every row value of an index part can be computed from the fragments alone. All offsets count in bytes from the start of
the segment, so that a part is the same in each process and can be stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fleet.errors import FragmentRefused
from fleet.schema import EPISODES, LABELS, decode_fragment

ABSENT = -1  # instead of an offset
TERMINATED, TRUNCATED, INTERVENTION = 1, 2, 4  # bits of a step's flags

FRAGMENT_DTYPES: dict[str, Any] = {
    "boot": np.int32,  # index into boots
    "seq": np.int64,
    "spec": np.int32,  # index into specs
    "task": np.int32,  # index into tasks, -1 without steps
    "episode_id": np.int64,  # of the steps, -1 without
    "first_frame": np.int32,
    "num_steps": np.int32,
    "steps_at": np.int64,  # the table's Arrow stream, ABSENT where there is none
    "steps_length": np.int64,
    "chunks_at": np.int64,
    "chunks_length": np.int64,
}
STEP_DTYPES: dict[str, Any] = {
    "source": np.uint8,
    "chunk_id": np.int64,
    "chunk_index": np.int16,
    "reward": np.float32,
    "flags": np.uint8,
    "time_ns": np.int64,
}
CHUNK_DTYPES: dict[str, Any] = {
    "fragment": np.int32,  # index into the part's fragments
    "row": np.int32,
    "chunk_id": np.int64,
    "version": np.int64,
    "latency_ms": np.float32,
}
EPISODES_OF = pa.schema([("fragment", pa.int32()), *EPISODES])
LABELS_OF = pa.schema([("fragment", pa.int32()), *LABELS])
_CHUNK_COLUMNS = {"chunk_id": "chunk_id", "version": "policy_version", "latency_ms": "latency_ms"}


@dataclasses.dataclass
class IndexPart:
    """Index columns of fragments of one segment, in the order of the log.

    Attributes:
        boots: (robot_id, boot_id). specs: hashes. tasks: names. Fragments have indices into them.
        fragments, steps, chunks: Columns by the names above; the steps and chunks of all fragments one after the other.
        places: Feature -> offset of its first value, by fragment; of the encoded bytes for an encoded feature.
        offsets: Encoded feature -> where its int32 offsets lie, by fragment.
        episodes, labels: Rows of these tables with the index of their fragment.
        num_records: Fragments read, refused ones included. num_damaged: Places in the segment that could not be read.
        refused: Fragments that could not be read, by the error's code.
    """

    boots: list[tuple[str, str]]
    specs: list[str]
    tasks: list[str]
    fragments: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]
    chunks: dict[str, np.ndarray]
    places: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    episodes: pa.Table
    labels: pa.Table
    num_records: int
    refused: dict[str, int]
    num_damaged: int = 0

    @property
    def num_fragments(self) -> int:
        return len(self.fragments["seq"])

    @property
    def num_steps(self) -> int:
        return len(self.steps["source"])


class Fragmentary(Protocol):
    """A committed fragment: ``buffer.reader.LogRecord``."""

    @property
    def robot_id(self) -> str: ...
    @property
    def boot_id(self) -> str: ...
    @property
    def seq(self) -> int: ...
    @property
    def spec_hash(self) -> str: ...
    @property
    def tables(self) -> dict[str, int]: ...
    @property
    def payload_at(self) -> int: ...
    @property
    def payload(self) -> pa.Buffer: ...


class PartBuilder:
    """Collects the columns of fragments.

    Args:
        address: Where the segment starts in this process.
        length: Bytes of it.
    """

    def __init__(self, address: int, length: int) -> None:
        self._address, self._length = address, length
        self._boots: dict[tuple[str, str], int] = {}
        self._specs: dict[str, int] = {}
        self._tasks: dict[str, int] = {}
        self._fragments: dict[str, list[int]] = {name: [] for name in FRAGMENT_DTYPES}
        self._steps: dict[str, list[np.ndarray]] = {name: [] for name in STEP_DTYPES}
        self._chunks: dict[str, list[np.ndarray]] = {name: [] for name in CHUNK_DTYPES}
        self._places: dict[str, list[int]] = {}
        self._offsets: dict[str, list[int]] = {}
        self._episodes: list[pa.RecordBatch] = []
        self._labels: list[pa.RecordBatch] = []
        self._num_records = 0
        self._refused: dict[str, int] = {}

    def add(self, record: Fragmentary) -> None:
        """Takes one more fragment; one that cannot be read where it lies is counted."""
        self._num_records += 1
        try:
            tables = decode_fragment(record.tables, record.payload).tables
            steps = _step_columns(tables["steps"]) if "steps" in tables else None
            places = self._locate(tables["steps"]) if "steps" in tables else {}
        except (FragmentRefused, KeyError, pa.ArrowException) as error:  # checked at ingest: only a damaged disk does this
            code = error.code if isinstance(error, FragmentRefused) else FragmentRefused.code
            self._refused[code] = self._refused.get(code, 0) + 1
            return
        number = len(self._fragments["seq"])
        self._add_fragment(record, tables.get("steps"))
        self._add_places(number, places)
        if steps is not None:
            for name, values in steps.items():
                self._steps[name].append(values)
        if "chunks" in tables:
            self._add_chunks(number, tables["chunks"])
        for name, found, schema in (("episodes", self._episodes, EPISODES_OF), ("labels", self._labels, LABELS_OF)):
            if name in tables:
                rows = tables[name]
                column = pa.array(np.full(rows.num_rows, number, np.int32))
                found.append(pa.RecordBatch.from_arrays([column, *(rows.column(n) for n in schema.names[1:])], schema=schema))

    def build(self) -> IndexPart:
        num_fragments = len(self._fragments["seq"])
        for columns in (self._places, self._offsets):
            for values in columns.values():
                values.extend([ABSENT] * (num_fragments - len(values)))
        return IndexPart(
            list(self._boots),
            list(self._specs),
            list(self._tasks),
            {name: np.array(self._fragments[name], dtype) for name, dtype in FRAGMENT_DTYPES.items()},
            {name: _concatenate(self._steps[name], dtype) for name, dtype in STEP_DTYPES.items()},
            {name: _concatenate(self._chunks[name], dtype) for name, dtype in CHUNK_DTYPES.items()},
            {name: np.array(values, np.int64) for name, values in self._places.items()},
            {name: np.array(values, np.int64) for name, values in self._offsets.items()},
            pa.Table.from_batches(self._episodes, EPISODES_OF),
            pa.Table.from_batches(self._labels, LABELS_OF),
            self._num_records,
            self._refused,
        )

    def _add_fragment(self, record: Fragmentary, steps: pa.RecordBatch | None) -> None:
        at, spans = record.payload_at, {}
        for name, length in record.tables.items():
            spans[name] = (at, length)
            at += length
        values: dict[str, int] = {
            "boot": self._boots.setdefault((record.robot_id, record.boot_id), len(self._boots)),
            "seq": record.seq,
            "spec": self._specs.setdefault(record.spec_hash, len(self._specs)),
            "task": -1,
            "episode_id": -1,
            "first_frame": 0,
            "num_steps": 0,
        }
        if steps is not None:
            values["task"] = self._tasks.setdefault(steps.column("task")[0].as_py(), len(self._tasks))
            values["episode_id"] = steps.column("episode_id")[0].as_py()
            values["first_frame"] = steps.column("frame_index")[0].as_py()
            values["num_steps"] = steps.num_rows
        for table in ("steps", "chunks"):
            values[f"{table}_at"], values[f"{table}_length"] = spans.get(table, (ABSENT, 0))
        for name, column in self._fragments.items():
            column.append(values[name])

    def _add_chunks(self, number: int, chunks: pa.RecordBatch) -> None:
        self._chunks["fragment"].append(np.full(chunks.num_rows, number, np.int32))
        self._chunks["row"].append(np.arange(chunks.num_rows, dtype=np.int32))
        for name, column in _CHUNK_COLUMNS.items():
            self._chunks[name].append(chunks.column(column).to_numpy())

    def _add_places(self, number: int, places: Mapping[str, tuple[int, int]]) -> None:
        for name, (at, offsets_at) in places.items():
            for columns, value in ((self._places, at), (self._offsets, offsets_at)):
                if value != ABSENT:
                    column = columns.setdefault(name, [])
                    column.extend([ABSENT] * (number - len(column)))
                    column.append(value)

    def _locate(self, steps: pa.RecordBatch) -> dict[str, tuple[int, int]]:
        """Where each feature's values lie, and an encoded feature's offsets."""
        found = {}
        for field, column in zip(steps.schema, steps.columns, strict=True):
            if isinstance(column, pa.FixedSizeListArray):
                values = column.values
                size = values.type.bit_width // 8
                start = values.offset + column.offset * field.type.list_size
                found[field.name] = (self._place(field.name, values.buffers()[1], start * size, size), ABSENT)
            elif pa.types.is_binary(field.type):
                _, offsets, data = column.buffers()
                at = self._place(field.name, data, 0, 1)
                found[field.name] = (at, self._place(field.name, offsets, column.offset * 4, 4))
        return found

    def _place(self, name: str, data: pa.Buffer, start: int, alignment: int) -> int:
        at: int = data.address - self._address
        if at < 0 or at + data.size > self._length or (at + start) % alignment:
            raise FragmentRefused(f"column {name!r} lies at byte {at}", rule="columns are aligned, inside of the segment")
        return at + start


def _step_columns(steps: pa.RecordBatch) -> dict[str, np.ndarray]:
    flags = np.zeros(steps.num_rows, np.uint8)
    for bit, name in ((TERMINATED, "next.terminated"), (TRUNCATED, "next.truncated"), (INTERVENTION, "intervention")):
        column = steps.column(name)
        if column.true_count:
            flags |= column.to_numpy(zero_copy_only=False).astype(np.uint8) * np.uint8(bit)
    names = {"source": "source", "chunk_id": "chunk_id", "chunk_index": "chunk_index", "reward": "next.reward"}
    found = {name: steps.column(column).to_numpy() for name, column in names.items()}
    return {**found, "flags": flags, "time_ns": steps.column("time_ns").to_numpy()}


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
