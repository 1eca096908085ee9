"""What is recorded: the Arrow schemas of a fragment's four tables, and its bytes.

A fragment's payload is one Arrow IPC stream a table, each starting at a multiple of 64 bytes, so that a reader
can map a segment file and use the columns where they lie. The stream carries its schema: data of an older spec
stays readable. The header of the FRAGMENT message names the tables and their lengths in order: ``{"steps": 4096}``.

Shape suffixes: A action dims, H chunk length, T decisions of a chunk.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from fleet.errors import FragmentRefused
from fleet.images import jpeg_shape
from fleet.spec import ACTION, Feature, RobotSpec

TABLES = ("steps", "chunks", "episodes", "labels")
ALIGNMENT = 64
MAX_ROWS = 100_000
MAX_TEXT_BYTES = 4096  # of one value
REPLAY_PREFIX = "replay."
OUTCOMES = ("success", "failure", "unknown", "aborted")  # of a closed episode
MAX_SCHEMAS = 256  # remembered, by spec

_STEP_HEAD: list[tuple[str, pa.DataType]] = [
    ("robot_id", pa.string()),
    ("boot_id", pa.string()),
    ("episode_id", pa.int64()),  # counts up within a boot
    ("frame_index", pa.int32()),  # counts up from 0 within an episode
    ("time_ns", pa.int64()),  # robot's wall clock when the action was sent
    ("mono_ns", pa.int64()),  # robot's monotonic clock at the same instant
    ("task", pa.string()),
    ("source", pa.uint8()),  # fleet.robot.Source
    ("operator_id", pa.string()),  # "" when nobody had taken over
    ("intervention", pa.bool_()),  # an operator acted inside a policy episode
    ("chunk_id", pa.int64()),  # the policy call that proposed this step, -1 for none
    ("chunk_index", pa.int16()),  # which of its H actions, -1 for none
    ("next.reward", pa.float32()),
    ("next.terminated", pa.bool_()),
    ("next.truncated", pa.bool_()),
]

_STEPS_SCHEMAS: dict[str, pa.Schema] = {}
CHUNKS = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("chunk_id", pa.int64()),
        ("frame_index", pa.int32()),  # of the observation that it was computed from
        ("policy_version", pa.int64()),
        ("latency_ms", pa.float32()),
        ("horizon", pa.int16()),
        ("actions_HA", pa.list_(pa.float32())),  # as proposed, row-major
        ("log_prob_T", pa.list_(pa.float32())),  # empty where the family has no density
    ]
)
EPISODES = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("event", pa.string()),  # "opened", "closed" or "dropped"
        ("time_ns", pa.int64()),
        ("task", pa.string()),
        ("instruction", pa.string()),
        ("seed", pa.int64()),  # of the reset, -1 for none
        ("reset_state_id", pa.string()),
        ("group_id", pa.string()),
        ("outcome", pa.string()),  # "" when opened; "success", "failure", "unknown" or "aborted" when closed
        ("judge", pa.string()),  # who said so
        ("length", pa.int32()),  # steps; -1 when opened
        ("first_version", pa.int64()),  # policy versions that acted, -1 for none
        ("last_version", pa.int64()),
    ]
)
LABELS = pa.schema(
    [
        ("robot_id", pa.string()),
        ("boot_id", pa.string()),
        ("episode_id", pa.int64()),
        ("field", pa.string()),
        ("value", pa.string()),
        ("judge", pa.string()),
        ("time_ns", pa.int64()),
    ]
)


def feature_type(feature: Feature) -> pa.DataType:
    """Arrow type of one value: encoded images are binary, all else a flat fixed-size list, row-major."""
    if feature.codec != "raw":
        return pa.binary()
    if feature.dtype == "bool":
        return pa.list_(pa.uint8(), feature.size)
    return pa.list_(pa.from_numpy_dtype(feature.np_dtype), feature.size)


def steps_schema(spec: RobotSpec) -> pa.Schema:
    """Schema of the steps table of a robot: the fixed head, the executed action, and all other features by name."""
    known = _STEPS_SCHEMAS.get(spec.hash)
    if known is None:
        if len(_STEPS_SCHEMAS) >= MAX_SCHEMAS:
            _STEPS_SCHEMAS.clear()
        known = _STEPS_SCHEMAS[spec.hash] = _make_steps_schema(spec)
    return known


def _make_steps_schema(spec: RobotSpec) -> pa.Schema:
    features = [(name, feature_type(f)) for name, f in sorted(spec.features.items()) if name != ACTION]
    return pa.schema([*_STEP_HEAD, (ACTION, feature_type(spec.action)), *features])


def table_schema(name: str, spec: RobotSpec) -> pa.Schema:
    """Schema of one of ``TABLES`` for this robot."""
    return {"steps": steps_schema(spec), "chunks": CHUNKS, "episodes": EPISODES, "labels": LABELS}[name]


def feature_column(feature: Feature, values: list[Any]) -> pa.Array:
    """Arrow column of one feature from per-step values: arrays, or encoded bytes for a codec other than raw."""
    if feature.codec != "raw":
        return pa.array(values, type=pa.binary())
    first = np.asarray(values[0])
    dtype = np.dtype(np.uint8) if feature.dtype == "bool" else first.dtype
    # From Arrow's pool, which keeps its memory: fresh pages from the system cost four times what the copy does.
    data = pa.allocate_buffer(len(values) * first.size * dtype.itemsize)
    np.stack(values, out=np.frombuffer(data, dtype).reshape(len(values), *first.shape))
    flat = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), len(values) * first.size, [None, data])
    return pa.FixedSizeListArray.from_arrays(flat, feature.size)


def build_table(name: str, spec: RobotSpec, rows: list[dict[str, Any]]) -> pa.RecordBatch:
    """Record batch of one of ``TABLES`` from rows; feature values are arrays, or encoded bytes for a codec other than raw.

    Columns beyond the schema (``replay.*`` of chunks) take their type from the values; rows without one, of a policy that
    does not have it, get an empty list.
    """
    schema = table_schema(name, spec)
    columns: dict[str, pa.Array] = {}
    for field in schema:
        values = [row[field.name] for row in rows]
        feature = spec.features.get(field.name)
        columns[field.name] = pa.array(values, type=field.type) if feature is None else feature_column(feature, values)
    for extra in sorted(set().union(*rows) - set(schema.names)):
        columns[extra] = pa.array([row.get(extra, ()) for row in rows])
    return pa.RecordBatch.from_pydict(columns)


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A run of steps sent together, decoded: record batches by table name."""

    tables: Mapping[str, pa.RecordBatch]

    @property
    def num_steps(self) -> int:
        return self.tables["steps"].num_rows if "steps" in self.tables else 0


def encode_fragment(tables: Mapping[str, pa.RecordBatch]) -> tuple[dict[str, int], memoryview]:
    """The table directory ``{name: bytes}`` (padded to ``ALIGNMENT``) and the payload."""
    batches = {name: batch for name in TABLES if (batch := tables.get(name)) is not None and batch.num_rows}
    directory = {name: _stream_bytes(batch) for name, batch in batches.items()}
    payload = pa.allocate_buffer(sum(directory.values()))  # written once: camera frames are most of what a robot copies
    end = 0
    with pa.FixedSizeBufferWriter(payload) as sink:
        for name, batch in batches.items():
            _write_stream(sink, batch)
            end += directory[name]
            sink.write(bytes(end - sink.tell()))
    return directory, memoryview(payload).cast("B")


def _write_stream(sink: pa.NativeFile, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _stream_bytes(batch: pa.RecordBatch) -> int:
    with pa.MockOutputStream() as sink:
        _write_stream(sink, batch)
        size = int(sink.size())
    return size + -size % ALIGNMENT


def decode_fragment(directory: Mapping[str, int], payload: bytes | memoryview | pa.Buffer) -> Fragment:
    """Opens a payload without copying it; the batches point into ``payload``. Safe on untrusted bytes.

    Every batch is fully validated: Arrow bytes that are read without it can make the process crash.

    Raises:
        FragmentRefused: The directory or the bytes are malformed.
    """
    buffer = payload if isinstance(payload, pa.Buffer) else pa.py_buffer(payload)
    tables: dict[str, pa.RecordBatch] = {}
    offset = 0
    for name, length in directory.items():
        if (
            name not in TABLES
            or not isinstance(length, int)
            or length <= 0
            or length % ALIGNMENT
            or offset + length > buffer.size
        ):
            raise FragmentRefused(
                f"table {name!r} of {length!r} bytes at {offset} in a payload of {buffer.size}",
                rule=f"tables are {TABLES}, padded to {ALIGNMENT} bytes, within the payload",
            )
        tables[name] = _decode_table(name, buffer.slice(offset, length))
        offset += length
    if offset != buffer.size or not tables:
        raise FragmentRefused(
            f"{buffer.size - offset} bytes after {len(tables)} tables", rule="the directory covers the payload"
        )
    return Fragment(tables)


def _decode_table(name: str, data: pa.Buffer) -> pa.RecordBatch:
    try:
        messages = pa.ipc.MessageReader.open_stream(data)
        schema = pa.ipc.read_schema(messages.read_next_message())
        message = messages.read_next_message()
        if message.type != "record batch" or _is_compressed(message.metadata):
            raise FragmentRefused(
                f"table {name!r} has a {message.type}, compressed or in place of its rows",
                rule="rows as they lie in memory: a few compressed bytes can fill all memory",
            )
        batch = pa.ipc.read_record_batch(message, schema)
        if not 0 < batch.num_rows <= MAX_ROWS:
            raise FragmentRefused(f"table {name!r} has {batch.num_rows} rows", rule=f"1 to {MAX_ROWS} rows")
        batch.validate(full=True)
        return batch
    except _ARROW_ERRORS as error:
        raise FragmentRefused(
            f"table {name!r} cannot be read: {error!r}"[:500], rule="one Arrow IPC stream with one batch"
        ) from None


_ARROW_ERRORS = (
    pa.ArrowException,
    StopIteration,
    OSError,
    ValueError,
    OverflowError,
    KeyError,
    TypeError,
    NotImplementedError,
    struct.error,
)


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether a record batch message names a compression. pyarrow says so only by decompressing."""
    data = memoryview(metadata)
    header = _flatbuffer_field(data, struct.unpack_from("<I", data)[0], 2)
    if header is None:
        return True
    record_batch: int = header + struct.unpack_from("<I", data, header)[0]
    return _flatbuffer_field(data, record_batch, 3) is not None


def _flatbuffer_field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer table lies (fields in the order of Arrow's Message.fbs); None where it is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + int(offset) if offset else None


def check_fragment(fragment: Fragment, spec: RobotSpec, robot_id: str, boot_id: str) -> None:
    """Checks a decoded fragment against its sender's spec and identity.

    Raises:
        FragmentRefused: Wrong columns, nulls, another robot's id, non-finite action or float observation, or
            frames that do not follow each other.
    """
    for name, batch in fragment.tables.items():
        try:
            _check_columns(name, batch, table_schema(name, spec))
        except UnicodeDecodeError as error:  # names are decoded when they are looked at
            raise FragmentRefused(f"a column's name in table {name!r}: {error}", rule="names are UTF-8") from None
    for name in ("steps", "labels"):
        batch = fragment.tables.get(name)
        if batch is not None:
            _check_owner(name, batch, robot_id, boot_id)
    steps = fragment.tables.get("steps")
    if steps is not None:
        _check_finite(steps, spec)
        _check_images(steps, spec)
        _check_order(steps)


def _check_columns(name: str, batch: pa.RecordBatch, expected: pa.Schema) -> None:
    if not batch.schema.equals(expected):
        _compare_columns(name, batch, expected)
    for field in batch.schema:
        column = batch.column(field.name)
        if column.null_count:
            raise FragmentRefused(f"column {field.name!r} of table {name!r} has nulls", rule="no nulls")
        if field.type == pa.string() and (longest := int(np.diff(_ends(column)).max())) > MAX_TEXT_BYTES:
            raise FragmentRefused(
                f"column {field.name!r} of table {name!r} has a text of {longest} bytes", rule=f"at most {MAX_TEXT_BYTES}"
            )


def _compare_columns(name: str, batch: pa.RecordBatch, expected: pa.Schema) -> None:
    columns = {field.name: field.type for field in batch.schema}
    if len(columns) != len(batch.schema):
        raise FragmentRefused(f"table {name!r} has a column twice", rule="column names are unique")
    for field in expected:
        seen = columns.pop(field.name, None)
        if seen != field.type:
            raise FragmentRefused(
                f"column {field.name!r} of table {name!r} is {seen or 'missing'}",
                rule=f"the spec says {field.type}",
                remedy="send a spec in HELLO that matches what is recorded",
            )
    for extra, seen in columns.items():
        if name != "chunks" or not extra.startswith(REPLAY_PREFIX):
            raise FragmentRefused(
                f"column {extra!r} of table {name!r} is not in the spec",
                rule="only chunks have extra columns, named 'replay.*'",
            )
        if not _is_numeric(seen):
            raise FragmentRefused(f"column {extra!r} of table {name!r} is {seen}", rule="numbers, or lists of numbers")


def _is_numeric(seen: pa.DataType) -> bool:
    """Numbers, or lists of them, also of lists that are not empty by their type."""
    while pa.types.is_list(seen) or (pa.types.is_fixed_size_list(seen) and seen.list_size > 0):
        seen = seen.value_type
    return bool(pa.types.is_integer(seen) or pa.types.is_floating(seen) or pa.types.is_boolean(seen))


def _check_owner(name: str, batch: pa.RecordBatch, robot_id: str, boot_id: str) -> None:
    for column, expected in (("robot_id", robot_id), ("boot_id", boot_id)):
        if batch.column(column).equals(pa.repeat(expected, batch.num_rows)):
            continue
        seen = sorted(set(batch.column(column).to_pylist()))[:3]
        if name == "steps":
            raise FragmentRefused(f"{column} of {name} is {seen}", rule=f"the connection belongs to {expected!r}")
        if column == "robot_id":
            raise FragmentRefused(f"{column} of {name} is {seen}", rule="a robot labels its own episodes only")


def _check_finite(steps: pa.RecordBatch, spec: RobotSpec) -> None:
    for name, feature in spec.features.items():
        if feature.codec != "raw":
            continue
        values = steps.column(name).flatten()
        if values.null_count or len(values) != steps.num_rows * feature.size:
            raise FragmentRefused(f"column {name!r} has nulls inside its lists", rule="no nulls")
        if feature.dtype.startswith("float") and not np.isfinite(values.to_numpy()).all():
            raise FragmentRefused(f"column {name!r} has NaN or infinity", rule="actions and observations are finite")
    if not np.isfinite(steps.column("next.reward").to_numpy()).all():
        raise FragmentRefused("column 'next.reward' has NaN or infinity", rule="rewards are finite")


def _check_images(steps: pa.RecordBatch, spec: RobotSpec) -> None:
    for name, feature in spec.features.items():
        if feature.codec != "jpeg":
            continue
        column = steps.column(name)
        ends = _ends(column).tolist()
        data = memoryview(column.buffers()[2] or b"").cast("B")
        for begin, end in itertools.pairwise(ends):
            seen = jpeg_shape(data[begin:end])
            if seen != feature.shape:
                raise FragmentRefused(f"column {name!r} has an image of shape {seen}", rule=f"jpeg of shape {feature.shape}")


def _ends(column: pa.Array) -> np.ndarray:
    """Where the values of a string or binary column begin and end in its bytes."""
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]


def _check_order(steps: pa.RecordBatch) -> None:
    episode = steps.column("episode_id").to_numpy()
    frame = steps.column("frame_index").to_numpy()
    if frame.min() < 0 or episode.min() < 0:
        raise FragmentRefused("a negative episode_id or frame_index", rule="both count up from 0")
    same = episode[1:] == episode[:-1]
    in_order = np.where(same, frame[1:] == frame[:-1] + 1, (episode[1:] > episode[:-1]) & (frame[1:] == 0))
    if not in_order.all():
        at = int(np.argmin(in_order)) + 1
        raise FragmentRefused(
            f"row {at} is frame {frame[at]} of episode {episode[at]} after frame {frame[at - 1]} of episode {episode[at - 1]}",
            rule="frames follow each other without a gap; episodes count up",
        )
