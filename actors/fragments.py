"""From the control process's records to fragments: rows are gathered and cut every ``fragment_s`` seconds.

A fragment holds steps of one episode only; the one that ends an episode carries its closed row.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from actors.records import RecordKind, unpack_text
from fleet.images import decode, encode
from fleet.robot import Source
from fleet.schema import build_table, encode_fragment
from fleet.spec import RobotSpec

Rows = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class ChunkRow:
    """One policy call, as it is recorded. actions_HA as proposed; log_prob_T may be empty; replay: flat, by column."""

    episode_id: int
    chunk_id: int
    frame_index: int
    version: int
    latency_ms: float
    actions_HA: np.ndarray
    log_prob_T: np.ndarray
    replay: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Open:
    episode_id: int
    task: str
    seed: int
    versions: list[int]
    length: int = 0


class FragmentBuilder:
    """Takes records in order; ``cut`` gives the rows gathered so far.

    Args:
        instructions: Instruction by task, recorded with each episode.
    """

    def __init__(self, spec: RobotSpec, robot_id: str, boot_id: str, instructions: dict[str, str]) -> None:
        self.spec, self.robot_id, self.boot_id, self.instructions = spec, robot_id, boot_id, instructions
        self._rows: Rows = {}
        self._obs: dict[str, Any] = {}
        self._open: _Open | None = None
        self._version_of_chunk: dict[int, int] = {}
        self._since = time.monotonic()

    def add(self, record: np.void) -> None:
        """One record of the control process; values are copied out of it."""
        kind = RecordKind(int(record["kind"]))
        if kind == RecordKind.OPEN:
            self._begin(int(record["episode_id"]), **unpack_text(record))
        elif kind == RecordKind.OBSERVE:
            self._obs = {name: encode(f, np.array(record[name])) for name, f in self.spec.observations.items()}
        elif kind == RecordKind.RESULT:
            self._step(record)
        else:
            self.end(**unpack_text(record))

    def add_chunk(self, chunk: ChunkRow) -> None:
        self._version_of_chunk[chunk.chunk_id] = chunk.version
        row = {
            "episode_id": chunk.episode_id,
            "chunk_id": chunk.chunk_id,
            "frame_index": chunk.frame_index,
            "policy_version": chunk.version,
            "latency_ms": chunk.latency_ms,
            "horizon": len(chunk.actions_HA),
            "actions_HA": chunk.actions_HA.reshape(-1),
            "log_prob_T": chunk.log_prob_T,
            **chunk.replay,
        }
        self._append("chunks", row)

    @property
    def episode_open(self) -> bool:
        return self._open is not None

    @property
    def task(self) -> str:
        """Task of the open episode, "" between episodes."""
        return self._open.task if self._open else ""

    @property
    def observation(self) -> Mapping[str, np.ndarray]:
        """The newest one, as whoever reads the log will see it."""
        return RecordedObservation(self.spec, self._obs)

    @property
    def age_s(self) -> float:
        """Seconds since the first row that is not cut; 0 when there is none."""
        return time.monotonic() - self._since if self._rows else 0.0

    def cut(self) -> Rows | None:
        """The rows gathered since the last cut, or None."""
        rows, self._rows = self._rows, {}
        return rows or None

    def end(self, outcome: str, judge: str, length: int) -> None:
        """The episode is over."""
        if self._open is None:
            return
        self._append("episodes", self._episode_row("closed", outcome, judge, self._open.length if length < 0 else length))
        self._open = None
        self._version_of_chunk.clear()

    def _begin(self, episode_id: int, task: str, seed: int) -> None:
        self._open = _Open(episode_id, task, seed, [])
        self._append("episodes", self._episode_row("opened", "", "", -1))

    def _episode_row(self, event: str, outcome: str, judge: str, length: int) -> dict[str, Any]:
        assert self._open is not None
        versions = self._open.versions or [-1]
        return {
            "episode_id": self._open.episode_id,
            "event": event,
            "time_ns": time.time_ns(),
            "task": self._open.task,
            "instruction": self.instructions.get(self._open.task, ""),
            "seed": self._open.seed,
            "reset_state_id": "",
            "group_id": "",
            "outcome": outcome,
            "judge": judge,
            "length": length,
            "first_version": min(versions),
            "last_version": max(versions),
        }

    def _step(self, record: np.void) -> None:
        assert self._open is not None
        chunk_id = int(record["chunk_id"])
        if record["source"] == Source.POLICY and chunk_id in self._version_of_chunk:
            self._open.versions.append(self._version_of_chunk[chunk_id])
        self._open.length += 1
        head = ("episode_id", "frame_index", "time_ns", "mono_ns", "source", "chunk_id", "chunk_index", "intervention")
        row: dict[str, Any] = {name: record[name].item() for name in head}
        row.update(robot_id=self.robot_id, boot_id=self.boot_id, task=self._open.task)
        row["operator_id"] = unpack_text(record)["operator"]
        for name in ("reward", "terminated", "truncated"):
            row[f"next.{name}"] = record[name].item()
        row["action"] = np.array(record["action"])
        row.update(self._obs)
        self._append("steps", row)

    def _append(self, table: str, row: dict[str, Any]) -> None:
        if not self._rows:
            self._since = time.monotonic()
        self._rows.setdefault(table, []).append(row)


class RecordedObservation(Mapping[str, np.ndarray]):
    """Encoded images are decoded when they are asked for. A policy that is trained on what the log holds acts on the same
    pixels, and the log-probability of its chunks can be computed again."""

    def __init__(self, spec: RobotSpec, values: Mapping[str, Any]) -> None:
        self._spec, self._values = spec, values

    def __getitem__(self, name: str) -> np.ndarray:
        feature, value = self._spec.features[name], self._values[name]
        return np.asarray(decode(feature, value) if feature.codec != "raw" else value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def encode_rows(spec: RobotSpec, rows: Rows) -> tuple[dict[str, int], memoryview]:
    """Table directory and payload of a fragment."""
    return encode_fragment({name: build_table(name, spec, table) for name, table in rows.items()})
