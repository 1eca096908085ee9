"""Numbers of a log: what it holds by robot, task and source, what that takes on the disk, and what is wrong with it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from buffer.browse import Episode, Part, read_episodes
from buffer.log import load_spec
from buffer.manifest import live_segments, load_manifest
from buffer.parts import ABSENT
from fleet.errors import SpecError
from fleet.robot import Source
from fleet.spec import RobotSpec

SAMPLED = 64  # fragments of a segment whose encoded images are measured


@dataclasses.dataclass
class Group:
    """Episodes that have something in common.

    Attributes:
        judged: Episodes with an outcome of success or failure. corrected: With a step of an operator.
        hours: Of the robots' control time.
    """

    episodes: int = 0
    judged: int = 0
    success: int = 0
    corrected: int = 0
    takeovers: int = 0
    excluded: int = 0
    steps: int = 0
    operator_steps: int = 0
    hours: float = 0.0

    def add(self, episode: Episode, hours: float) -> None:
        outcome, operator = episode.outcome, episode.by_source[Source.OPERATOR]
        self.episodes += 1
        self.judged += outcome in ("success", "failure")
        self.success += outcome == "success"
        self.corrected += operator > 0
        self.takeovers += episode.num_takeovers
        self.excluded += episode.excluded
        self.steps += episode.num_steps
        self.operator_steps += operator
        self.hours += hours


@dataclasses.dataclass(frozen=True)
class FeatureSize:
    """What a feature takes in the log. ``feature`` "all" is everything that is stored of a step, Arrow's own bytes included."""

    robot_type: str
    spec: str
    feature: str
    codec: str
    shape: tuple[int, ...]
    bytes_per_step: float
    gb_per_hour: float


@dataclasses.dataclass
class Stats:
    """Numbers of a log.

    Attributes:
        without_state: Segments whose length is not known, because their state is lost: what they hold is not counted.
        bytes: Committed, of segments that count. disk_bytes: Of all files in the folder.
        waiting: Retired files that are not unlinked yet. compacted: Segments of which retention left a part.
        unindexed: Sealed segments without a sidecar. damaged: Places that are no record, where that is known.
        labels: Facts that came later, by field and value.
    """

    segments: int = 0
    sealed: int = 0
    without_state: int = 0
    compacted: int = 0
    waiting: int = 0
    bytes: int = 0
    disk_bytes: int = 0
    fragments: int = 0
    unreadable: int = 0
    damaged: int = 0
    unindexed: int = 0
    first_ns: int = 0
    last_ns: int = 0
    first_version: int = -1
    last_version: int = -1
    total: Group = dataclasses.field(default_factory=Group)
    by_robot: dict[str, Group] = dataclasses.field(default_factory=dict)
    by_task: dict[str, Group] = dataclasses.field(default_factory=dict)
    by_source: dict[str, int] = dataclasses.field(default_factory=dict)
    by_outcome: dict[str, int] = dataclasses.field(default_factory=dict)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    sizes: list[FeatureSize] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_stats(buffer: Path, see: Callable[[Part], None] = lambda part: None) -> Stats:
    """Goes through a log once. A gateway may be writing to it.

    Args:
        see: Called with each part, to show how far it is.

    Raises:
        OSError, StorageError: The log cannot be read.
    """
    stats, meter = Stats(), _Meter(buffer)

    def add(part: Part) -> None:
        see(part)
        meter.add(part)
        stats.segments += 1
        stats.sealed += part.state.sealed
        stats.bytes += part.state.length
        stats.fragments += part.index.num_records
        stats.unreadable += sum(part.index.refused.values())
        stats.damaged += part.index.num_damaged
        stats.unindexed += part.state.sealed and not part.name.index_path.exists()

    episodes = read_episodes(buffer, add)
    _add_episodes(stats, episodes, meter.hz)
    _add_files(stats, buffer)
    stats.sizes = meter.sizes()
    return stats


def _add_episodes(stats: Stats, episodes: Iterable[Episode], hz: dict[str, float]) -> None:
    sources, outcomes, labels = (collections.Counter[str]() for _ in range(3))
    for episode in episodes:
        hours = episode.num_steps / hz.get(episode.spec_hash, np.inf) / 3600
        by_robot = stats.by_robot.setdefault(episode.key[0], Group())
        by_task = stats.by_task.setdefault(episode.task, Group())
        for group in (stats.total, by_robot, by_task):
            group.add(episode, hours)
        for source, count in zip(Source, episode.by_source, strict=True):
            sources[source.name.lower()] += count
        outcomes[episode.outcome] += 1
        labels.update(f"{label.field}={label.value}" for label in episode.labels)
        if episode.start_ns:
            stats.first_ns = min(stats.first_ns or episode.start_ns, episode.start_ns)
            stats.last_ns = max(stats.last_ns, episode.end_ns)
        if episode.first_version >= 0:
            first = stats.first_version
            stats.first_version = episode.first_version if first < 0 else min(first, episode.first_version)
            stats.last_version = max(stats.last_version, episode.last_version)
    stats.by_source, stats.by_outcome, stats.labels = dict(+sources), dict(outcomes), dict(labels)


def _add_files(stats: Stats, buffer: Path) -> None:
    if not buffer.is_dir():
        return
    stats.disk_bytes = sum(path.stat().st_blocks * 512 for path in buffer.rglob("*") if path.is_file())
    manifest = load_manifest(buffer)
    if manifest is not None:
        stats.waiting = len(manifest.retired)
        stats.compacted = sum(entry.generation > 0 for entry in manifest.segments)
    stats.without_state = len(live_segments(buffer)) - stats.segments


class _Meter:
    """Bytes by feature. Encoded images are measured in some fragments of each segment."""

    def __init__(self, buffer: Path) -> None:
        self._buffer = buffer
        self._specs: dict[str, RobotSpec | None] = {}
        self._steps: collections.Counter[str] = collections.Counter()
        self._bytes: collections.Counter[str] = collections.Counter()
        self._measured: dict[tuple[str, str], list[int]] = {}  # (spec, feature) -> bytes, steps

    @property
    def hz(self) -> dict[str, float]:
        return {spec_hash: spec.control_hz for spec_hash, spec in self._specs.items() if spec is not None}

    def add(self, part: Part) -> None:
        fragments = part.index.fragments
        for number, spec_hash in enumerate(part.index.specs):
            spec = self._spec(spec_hash)
            mine = np.flatnonzero((fragments["spec"] == number) & (fragments["num_steps"] > 0))
            if spec is None or not len(mine):
                continue
            self._steps[spec_hash] += int(fragments["num_steps"][mine].sum())
            self._bytes[spec_hash] += int(fragments["steps_length"][mine].sum())
            some = mine[:: max(1, len(mine) // SAMPLED)]
            for name, offsets in part.index.offsets.items():
                there = some[offsets[some] != ABSENT]
                self._measure((spec_hash, name), part, offsets[there], fragments["num_steps"][there])

    def _measure(self, key: tuple[str, str], part: Part, offsets: np.ndarray, num_steps: np.ndarray) -> None:
        values = np.frombuffer(part.map.buffer, np.int32, len(part.map.bytes) // 4)
        sizes = values[offsets // 4 + num_steps].astype(np.int64) - values[offsets // 4]
        measured = self._measured.setdefault(key, [0, 0])
        measured[0] += int(sizes.sum())
        measured[1] += int(num_steps.sum())

    def _spec(self, spec_hash: str) -> RobotSpec | None:
        if spec_hash not in self._specs:
            try:
                self._specs[spec_hash] = load_spec(self._buffer, spec_hash)
            except SpecError:
                self._specs[spec_hash] = None
        return self._specs[spec_hash]

    def sizes(self) -> list[FeatureSize]:
        """Largest first, by spec."""
        found: list[FeatureSize] = []
        for spec_hash, steps in self._steps.items():
            spec = self._specs[spec_hash]
            if spec is None or not steps:
                continue
            rows: list[tuple[str, str, tuple[int, ...], float]] = [("all", "", (), self._bytes[spec_hash] / steps)]
            for name, feature in spec.features.items():
                measured, of_steps = self._measured.get((spec_hash, name), (0, 0))
                size = measured / max(of_steps, 1) if feature.codec != "raw" else feature.size * feature.np_dtype.itemsize
                rows.append((name, feature.codec, feature.shape, float(size)))
            rows.sort(key=lambda row: -row[3])
            per_hour = spec.control_hz * 3600 / 1e9
            found += (FeatureSize(spec.robot_type, spec_hash, n, c, s, b, b * per_hour) for n, c, s, b in rows)
        return found
