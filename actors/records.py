"""The two record types between the control process and the courier, as numpy structured dtypes.

Control -> courier: OPEN (an episode starts), OBSERVE (what the robot measured at a frame, and whether a chunk is due),
RESULT (what was executed there), CLOSE (the episode's end). Courier -> control: one chunk of actions for each that was due,
without any where the policy has none.
"""

from __future__ import annotations

import enum
import json
from typing import Any

import numpy as np

from actors.plan import MAX_PREFIX
from fleet.spec import RobotSpec

MAX_HORIZON = 128
TEXT_BYTES = 1024


class RecordKind(enum.IntEnum):
    OPEN = 1
    OBSERVE = 2
    RESULT = 3
    CLOSE = 4


def step_dtype(spec: RobotSpec) -> np.dtype[Any]:
    """Records of the control process. Images lie in them as raw pixels; the courier encodes them."""
    fields: list[tuple[str, Any] | tuple[str, Any, tuple[int, ...]]] = [
        ("kind", np.uint8),
        ("wants_chunk", np.bool_),
        ("intervention", np.bool_),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
        ("source", np.uint8),
        ("chunk_index", np.int16),
        ("delay", np.int16),  # how many actions of prefix count
        ("prefix", np.float32, (MAX_PREFIX, spec.action.size)),  # OBSERVE: what is executed until the chunk is there
        ("frame_index", np.int32),
        ("episode_id", np.int64),
        ("chunk_id", np.int64),
        ("time_ns", np.int64),
        ("mono_ns", np.int64),
        ("reward", np.float32),
        ("late_ms", np.float32),  # how late this tick began
        ("text", f"S{TEXT_BYTES}"),  # JSON: task and seed (OPEN), operator (RESULT), outcome (CLOSE)
    ]
    fields += [(name, feature.np_dtype, feature.shape) for name, feature in sorted(spec.features.items())]
    return np.dtype(fields, align=True)


def chunk_dtype(spec: RobotSpec) -> np.dtype[Any]:
    """Records of the courier: one chunk, (MAX_HORIZON, A) of which ``horizon`` rows count."""
    return np.dtype(
        [
            ("episode_id", np.int64),
            ("frame_index", np.int32),
            ("horizon", np.int32),
            ("chunk_id", np.int64),
            ("version", np.int64),
            ("actions", np.float32, (MAX_HORIZON, spec.action.size)),
        ],
        align=True,
    )


def pack_text(**fields: Any) -> bytes:
    """JSON for the ``text`` field; what does not fit is an error of the caller."""
    data = json.dumps(fields).encode()
    if len(data) > TEXT_BYTES:
        raise ValueError(f"text of {len(data)} bytes, at most {TEXT_BYTES}")
    return data


def unpack_text(record: np.void) -> dict[str, Any]:
    return dict(json.loads(bytes(record["text"]) or b"{}"))
