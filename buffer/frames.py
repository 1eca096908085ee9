"""Some frames of an episode, with everything that is known of each: for looking at it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.browse import Episode, fragments_of
from buffer.log import load_spec
from fleet.errors import SpecError
from fleet.images import decode
from fleet.spec import ACTION, RobotSpec


@dataclasses.dataclass(frozen=True)
class Frame:
    """One step. ``images`` by camera, uint8 (H, W, C); a frame that cannot be decoded is missing there."""

    index: int
    time_ns: int
    source: int
    operator_id: str
    version: int
    reward: float
    terminated: bool
    truncated: bool
    action: np.ndarray
    images: dict[str, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the images."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "images"}
        return {**fields, "action": self.action.tolist()}


def read_frames(buffer: Path, episode: Episode, count: int, *, images: bool = True) -> list[Frame]:
    """About ``count`` frames spread evenly over an episode, the last one, and each at which somebody else takes over.

    Raises:
        OSError, StorageError, SpecError: The log or its spec cannot be read.
    """
    spec = load_spec(buffer, episode.spec_hash)
    last = max(episode.num_steps - 1, 0)
    wanted = set(np.linspace(0, last, max(min(count, last + 1), 1)).round().astype(int).tolist())
    versions: dict[int, int] = {}
    frames: list[Frame] = []
    position, source_before = 0, -1
    for fragment in fragments_of(buffer, episode):
        chunks, steps = fragment.tables.get("chunks"), fragment.tables.get("steps")
        if chunks is not None:
            versions.update(zip(chunks["chunk_id"].to_pylist(), chunks["policy_version"].to_pylist(), strict=True))
        if steps is None:
            continue
        for row, source in enumerate(steps["source"].to_pylist()):
            if position in wanted or source != source_before:
                frames.append(_frame(steps, row, versions, spec if images else None))
            position, source_before = position + 1, source
    return frames


def _frame(steps: pa.RecordBatch, row: int, versions: dict[int, int], spec: RobotSpec | None) -> Frame:
    values = {name: steps[name][row].as_py() for name in ("frame_index", "time_ns", "source", "operator_id", "chunk_id")}
    return Frame(
        index=values["frame_index"],
        time_ns=values["time_ns"],
        source=values["source"],
        operator_id=values["operator_id"],
        version=versions.get(values["chunk_id"], -1),
        reward=steps["next.reward"][row].as_py(),
        terminated=steps["next.terminated"][row].as_py(),
        truncated=steps["next.truncated"][row].as_py(),
        action=np.array(steps[ACTION][row].as_py(), np.float32),
        images={} if spec is None else _images(steps, row, spec),
    )


def _images(steps: pa.RecordBatch, row: int, spec: RobotSpec) -> dict[str, np.ndarray]:
    found = {}
    for name, feature in spec.observations.items():
        if not feature.is_image or name not in steps.schema.names:
            continue
        value = steps[name][row]
        if feature.codec == "raw":
            found[name] = value.values.to_numpy().reshape(feature.shape)
            continue
        try:
            found[name] = decode(feature, value.as_py())
        except SpecError:
            continue
    return found
