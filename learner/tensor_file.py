"""Nested states as tensors in the safetensors layout beside a JSON skeleton: written and read as a stream, never a pickle.

    8 bytes  length of the header, little endian
    header   JSON: {name: {"dtype", "shape", "data_offsets"}}, and "__metadata__" with text by name
    bytes    of the tensors, without holes

A state is nested maps (text keys) and lists of tensors, arrays, numbers, text, truth values and None. Arrays come back as
tensors, see ``to_arrays``; tuples come back as lists.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fleet.errors import LearnerError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
PIECE_BYTES = 4 << 20  # read and hashed at once: what the caches of a processor hold
Sink = Callable[[bytes | memoryview], object]
_TENSOR = "$tensor"
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _nowhere(data: bytes | memoryview) -> None:
    pass


def dumps(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> memoryview:
    """A safetensors file in memory. Copied by numpy, which lets other threads run meanwhile."""
    head, ordered = layout(tensors, metadata)
    out = np.empty(len(head) + sum(tensor.numel() * tensor.element_size() for tensor in ordered), np.uint8)
    at = 0
    for piece in itertools.chain([memoryview(head)], map(bytes_of, ordered)):
        out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return memoryview(out.data)


def pack(state: Any) -> bytes:
    """A state as bytes for another process.

    Raises:
        LearnerError: It holds something that a state may not hold; says where.
    """
    skeleton, tensors = take_tensors(state)
    return bytes(dumps(tensors, {"state": json.dumps(skeleton)}))


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """The state that ``pack`` took, its tensors in memory of their own.

    Raises:
        LearnerError: The bytes are not what ``pack`` makes.
    """
    try:
        tensors, metadata = read_tensors(io.BytesIO(data), len(data))
        return put_tensors(json.loads(metadata["state"]), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LearnerError(
            f"{len(data)} bytes are no packed state: {error}"[:500], rule="as learner.tensor_file.pack"
        ) from None


def to_arrays(state: Any) -> Any:
    """A state with arrays in place of tensors, for what knows nothing of torch."""
    if isinstance(state, Tensor):
        return state.numpy()
    if isinstance(state, Mapping):
        return {key: to_arrays(value) for key, value in state.items()}
    return [to_arrays(value) for value in state] if isinstance(state, list) else state


def take_tensors(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The skeleton of a state, which is plain data, and its tensors by the names that stand in the skeleton.

    Raises:
        LearnerError: It holds something that a state may not hold; says where.
    """
    tensors: dict[str, Tensor] = {}
    return _take(state, "", tensors), tensors


def put_tensors(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state again.

    Raises:
        ValueError: Names of the skeleton and of the tensors differ.
    """
    used: set[str] = set()
    state = _put(skeleton, tensors, used)
    if len(used) != len(tensors):
        raise ValueError(f"tensor {min(set(tensors) - used)!r} belongs nowhere")
    return state


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[Tensor]]:
    """The beginning of a file, its length included, and the tensors in the order in which their bytes follow.

    Wider types stand first, so that every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in order]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if len(flat) else memoryview(b"")


def read_tensors(file: BinaryIO, size: int, passed: Sink = _nowhere) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file of ``size`` bytes once, from its beginning; every tensor gets memory of its own.

    Args:
        passed: Called with all bytes in their order, as they are read.

    Returns:
        Tensors by name, and the metadata.

    Raises:
        ValueError: It is not this layout; nothing larger than the file was allocated.
    """
    first = file.read(8)
    passed(first)
    length = int.from_bytes(first, "little")
    if len(first) != 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
    passed(text)
    places, metadata = _read_header(text, size - 8 - length)
    tensors = {}
    for name, (dtype, shape) in places.items():
        try:
            tensors[name] = torch.empty(shape, dtype=dtype)
        except RuntimeError as error:  # no memory, or a shape beyond torch's numbers
            raise ValueError(f"tensor {name!r} of shape {shape}: {error}") from None
        _read_into(file, bytes_of(tensors[name]), passed)
    return tensors, metadata


def _read_into(file: BinaryIO, into: memoryview, passed: Sink) -> None:
    at = 0
    while at < len(into):
        piece = into[at : at + PIECE_BYTES]
        done = file.readinto(piece)  # type: ignore[attr-defined]  # of every file that is opened for reading bytes
        if not done:
            raise ValueError("the file ends before its last tensor does")
        passed(piece[:done])
        at += done


def _read_header(text: bytes, num_bytes: int) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Type and shape of each tensor among the ``num_bytes`` that follow, in their order, and the metadata."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("the header is no map")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no text by name")
    found = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has shape {shape!r} at {begin!r} to {end!r}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} has {end - begin} bytes")
        found.append((begin, end, name, dtype, shape))
    at, places = 0, {}
    for begin, end, name, dtype, shape in sorted(found, key=lambda entry: entry[:2]):
        if begin != at:
            raise ValueError(f"the tensors overlap or leave a hole at byte {at}")
        places[name], at = (dtype, shape), end
    if at != num_bytes:
        raise ValueError(f"{num_bytes} bytes follow the header, which speaks of {at}")
    return places, metadata


def _take(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, np.ndarray):
        try:
            state = torch.from_numpy(np.ascontiguousarray(state))
        except (TypeError, ValueError) as error:
            raise LearnerError(f"state {path!r} is an array of {state.dtype}", rule=str(error)) from None
    if isinstance(state, Tensor):
        if state.dtype not in _NAMES:
            raise LearnerError(f"state {path!r} is a tensor of {state.dtype}", rule=f"one of {', '.join(_DTYPES)}")
        while path in tensors:  # {"a/b": tensor, "a": {"b": tensor}}
            path += "'"
        tensors[path] = state
        return {_TENSOR: path}
    if isinstance(state, Mapping):
        for key in state:
            if not isinstance(key, str) or key == _TENSOR:
                raise LearnerError(f"state {path!r} has the key {key!r}", rule="keys of a state are text")
        return {key: _take(value, f"{path}/{key}" if path else key, tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_take(value, f"{path}/{i}" if path else str(i), tensors) for i, value in enumerate(state)]
    if state is None or isinstance(state, (str, int, float, bool)):
        return state
    raise LearnerError(
        f"state {path!r} is a {type(state).__name__}", rule="a state holds tensors, numbers, text, lists and maps"
    )


def _put(skeleton: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) != {_TENSOR}:
            return {key: _put(value, tensors, used) for key, value in skeleton.items()}
        name = skeleton[_TENSOR]
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing")
        used.add(name)
        return tensors[name]
    return [_put(value, tensors, used) for value in skeleton] if isinstance(skeleton, list) else skeleton
