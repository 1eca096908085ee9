"""A run, or a part of it, as a LeRobotDataset v3: one episode of it for each finished episode, with what only we know
(interventions, sources, policy versions, success) as columns, and where each episode came from in meta/fleet.json.

Two passes over the log: the first chooses episodes and checks that they fit together, the second writes them, one
episode in memory at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.format_lerobot import (
    DONE,
    REWARD,
    SIDECAR,
    SUCCESS,
    TRUNCATED,
    features_of,
    load_lerobot,
    whole_fps,
)
from buffer.labels import AFTERWARDS, BY_ROBOT, Judged, LabelReader, label_of
from buffer.log import load_spec
from buffer.reader import LogReader, LogRecord
from buffer.segment import EpisodeKey
from fleet.errors import DatasetError, NoData
from fleet.files import storage_errors
from fleet.images import decode
from fleet.robot import Source
from fleet.schema import decode_fragment
from fleet.spec import Feature, RobotSpec

POLL_RECORDS = 256


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which finished episodes are exported. An empty tuple allows all; episodes excluded by a label are never exported.

    Args:
        tasks, robots, outcomes: Names; the outcome by the newest label.
        sources: Episodes in which one of these acted.
        from_version: Episodes in which no policy older than this acted; those without a policy have no version and pass
            only where this is 0.
        spec: A robot type, or the first digits of a spec's hash; "" for all.
    """

    tasks: tuple[str, ...] = ()
    robots: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    from_version: int = 0
    spec: str = ""


@dataclasses.dataclass
class RecordedEpisode:
    """A finished episode. ``fragments`` in order, each with its record; ``versions`` by chunk id."""

    key: EpisodeKey
    spec_hash: str
    opened: dict[str, Any]
    closed: dict[str, Any] = dataclasses.field(default_factory=dict)
    fragments: list[LogRecord] = dataclasses.field(default_factory=list)
    versions: dict[int, int] = dataclasses.field(default_factory=dict)
    sources: set[int] = dataclasses.field(default_factory=set)
    num_steps: int = 0
    num_interventions: int = 0


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote, and how many episodes were left out, by reason."""

    path: Path
    episodes: int
    steps: int
    left_out: Mapping[str, int]


def export_dataset(
    buffer: Path,
    out: Path,
    selection: Selection,
    *,
    run_id: str,
    video: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Writes the selected episodes of a log into a new folder ``out``; it appears once it is complete.

    Args:
        buffer: The run's buffer folder. A gateway may be writing to it.
        video: Images as videos, smaller and encoded a second time; else as PNG, exactly the pixels that were recorded.
        progress: Called with (steps done, all steps).

    Raises:
        NoData: No episode is left.
        DatasetError: ``out`` exists, or the episodes are of robots that do not fit into one dataset.
        StorageError: ``out`` cannot be written.
    """
    if out.exists():
        raise DatasetError(f"{out} exists", rule="a dataset is written into a new folder", remedy="name another one")
    chosen, left_out = choose(buffer, selection)
    if not chosen:
        raise NoData(
            f"no finished episode is left; left out: {dict(left_out) or 'none'}",
            rule=f"exported are finished episodes of {selection}",
            remedy="ask for fewer things, or wait for robots to finish episodes",
        )
    specs = common_specs(buffer, chosen)
    with storage_errors(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            writer = _Writer(hidden / "dataset", out.name, specs, video)
            total = sum(episode.num_steps for episode in chosen.values())
            for episode in recorded_episodes(buffer, collections.Counter()):
                if episode.key in chosen:
                    writer.add(dataclasses.replace(episode, closed=chosen[episode.key].closed))
                    progress(writer.num_steps, total)
            writer.finish({"run_id": run_id, "left_out": dict(left_out)})
            os.rename(hidden / "dataset", out)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return Exported(out, len(chosen), writer.num_steps, left_out)


def choose(buffer: Path, selection: Selection) -> tuple[dict[EpisodeKey, RecordedEpisode], collections.Counter[str]]:
    """The selected episodes in the order in which they ended, without their fragments, and what was left out."""
    judged, left_out, robot_types = judged_episodes(buffer), collections.Counter[str](), _RobotTypes(buffer)
    chosen: dict[EpisodeKey, RecordedEpisode] = {}
    for episode in recorded_episodes(buffer, left_out):
        said = judged.get(episode.key, Judged())
        if said.outcome is not None:
            episode.closed |= {"outcome": said.outcome.value, "judge": said.outcome.judge}
        if said.excluded:
            left_out["excluded by a label"] += 1
        elif not _selected(episode, selection, robot_types[episode.spec_hash]):
            left_out["not asked for"] += 1
        else:
            episode.fragments = []
            chosen[episode.key] = episode
    return chosen, +left_out


class _RobotTypes(dict[str, str]):
    """Robot type by spec hash."""

    def __init__(self, buffer: Path) -> None:
        self._buffer = buffer

    def __missing__(self, spec_hash: str) -> str:
        spec = load_spec(self._buffer, spec_hash)
        self[spec_hash] = spec.robot_type if spec is not None else ""
        return self[spec_hash]


def _selected(episode: RecordedEpisode, selection: Selection, robot_type: str) -> bool:
    row, wanted = episode.closed, selection.spec
    return (
        (not selection.tasks or row["task"] in selection.tasks)
        and (not selection.robots or episode.key[0] in selection.robots)
        and (not selection.outcomes or row["outcome"] in selection.outcomes)
        and (not selection.sources or bool(episode.sources & {int(s) for s in selection.sources}))
        and (selection.from_version <= 0 or row["first_version"] >= selection.from_version)
        and (not wanted or robot_type == wanted or episode.spec_hash.startswith(wanted))
    )


def recorded_episodes(buffer: Path, left_out: collections.Counter[str]) -> Iterator[RecordedEpisode]:
    """Finished episodes with all their fragments, in the order in which they ended; others are counted by reason."""
    open_now: dict[tuple[str, str], RecordedEpisode] = {}
    for record in _records(buffer):
        tables = decode_fragment(record.tables, record.payload).tables
        rows = tables["episodes"].to_pylist() if "episodes" in tables else []
        boot = (record.robot_id, record.boot_id)
        for row in rows:
            if row["event"] == "opened":
                left_out["not finished"] += boot in open_now
                open_now[boot] = RecordedEpisode((*boot, row["episode_id"]), record.spec_hash, row)
        episode = open_now.get(boot)
        if episode is not None and {"steps", "chunks"} & tables.keys():
            _add_fragment(episode, record, tables)
        for row in rows:
            if row["event"] == "opened" or episode is None or row["episode_id"] != episode.key[2]:
                left_out["without its beginning"] += row["event"] == "closed"
                continue
            del open_now[boot]
            if row["event"] == "dropped" or row["length"] != episode.num_steps or not episode.num_steps:
                left_out["without all of its steps"] += 1
                continue
            episode.closed = row
            yield episode
    left_out["not finished"] += len(open_now)


def _add_fragment(episode: RecordedEpisode, record: LogRecord, tables: Mapping[str, pa.RecordBatch]) -> None:
    chunks, steps = tables.get("chunks"), tables.get("steps")
    if chunks is not None:
        episode.versions.update(zip(chunks["chunk_id"].to_pylist(), chunks["policy_version"].to_pylist(), strict=True))
    if steps is None or steps["episode_id"][0].as_py() != episode.key[2]:
        return
    if steps["frame_index"][0].as_py() == episode.num_steps:  # else a part before it is lost
        episode.fragments.append(record)
        episode.num_steps += steps.num_rows
        episode.num_interventions += int(steps["intervention"].to_numpy(zero_copy_only=False).sum())
        episode.sources |= set(steps["source"].to_pylist())


def judged_episodes(buffer: Path) -> dict[EpisodeKey, Judged]:
    """What labels say of episodes: the robots' own ones, and those given later."""
    found: collections.defaultdict[EpisodeKey, Judged] = collections.defaultdict(Judged)
    for record in _records(buffer):
        if "labels" in record.tables:
            for row in decode_fragment(record.tables, record.payload).tables["labels"].to_pylist():
                label = label_of(row)
                found[label.episode].add(label, BY_ROBOT)
    reader = LabelReader(buffer)
    for label in reader.poll():
        found[label.episode].add(label, AFTERWARDS)
    reader.close()
    return found


def _records(folder: Path) -> Iterator[LogRecord]:
    """Everything that is committed now."""
    reader = LogReader(folder)
    try:
        while records := reader.poll(POLL_RECORDS):
            yield from records
    finally:
        reader.close()


def common_specs(buffer: Path, chosen: Mapping[EpisodeKey, RecordedEpisode]) -> dict[str, RobotSpec]:
    """The specs of all episodes by their hash. They may differ in units, bounds and codecs only.

    Raises:
        DatasetError: Names two that do not fit together.
    """
    found: dict[str, RobotSpec] = {}
    for spec_hash in sorted({episode.spec_hash for episode in chosen.values()}):
        spec = load_spec(buffer, spec_hash)
        if spec is None:
            raise DatasetError(f"spec {spec_hash} is lost", rule="the log keeps the spec of its data")
        found[spec_hash] = spec
    (first_hash, first), *others = found.items()
    for other_hash, other in others:
        if _shape_of(first) != _shape_of(other):
            raise DatasetError(
                f"episodes of {first.robot_type!r} (spec {first_hash}) and of {other.robot_type!r} (spec {other_hash})",
                rule="one dataset is of one robot type, control rate and set of features",
                remedy=f"export them one by one: --spec {first_hash}, then --spec {other_hash}",
            )
    return found


def _shape_of(spec: RobotSpec) -> Any:
    return spec.robot_type, spec.control_hz, {name: (f.dtype, f.shape) for name, f in spec.features.items()}


class _Writer:
    """The dataset that is being written."""

    def __init__(self, root: Path, name: str, specs: Mapping[str, RobotSpec], video: bool) -> None:
        self.num_steps = 0
        self._root, self._specs = root, specs
        spec = next(iter(specs.values()))
        self._operators: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._dataset = load_lerobot().create(
            f"local/{name}",
            fps=whole_fps(spec.control_hz),
            features=features_of(spec, video=video),
            root=root,
            robot_type=spec.robot_type,
            use_videos=video,
            video_backend="pyav",
            image_writer_threads=2,
        )

    def add(self, episode: RecordedEpisode) -> None:
        """Writes one episode."""
        row, success = episode.closed, episode.closed["outcome"] == "success"
        text = row["instruction"] or row["task"]
        left = episode.num_steps
        for record in episode.fragments:
            steps = decode_fragment(record.tables, record.payload).tables["steps"]
            columns = self._columns(steps, episode)
            for i in range(steps.num_rows):
                left -= 1
                frame = {name: values[i] for name, values in columns.items()}
                self._dataset.add_frame({**frame, SUCCESS: np.array([success and left == 0]), "task": text})
        self._dataset.save_episode()
        self.num_steps += episode.num_steps
        self._episodes.append(_origin(len(self._episodes), episode))

    def finish(self, facts: dict[str, Any]) -> None:
        """Closes the dataset and writes the sidecar."""
        self._dataset.finalize()
        more = {
            "specs": {spec_hash: spec.to_dict() for spec_hash, spec in self._specs.items()},
            "sources": {int(s): s.name.lower() for s in Source},
            "operators": list(self._operators),
            "episodes": self._episodes,
        }
        (self._root / SIDECAR).write_text(json.dumps(facts | more, indent=1))

    def _columns(self, steps: pa.RecordBatch, episode: RecordedEpisode) -> dict[str, np.ndarray | list[np.ndarray]]:
        """Values of the frames of one fragment by LeRobot's column."""
        terminated, truncated = (_flags(steps, f"next.{name}") for name in ("terminated", "truncated"))
        versions = [episode.versions.get(chunk, -1) for chunk in steps["chunk_id"].to_pylist()]
        operators = [self._operator_index(name) for name in steps["operator_id"].to_pylist()]
        columns: dict[str, np.ndarray | list[np.ndarray]] = {
            name: _values(steps[name], feature) for name, feature in self._specs[episode.spec_hash].features.items()
        }
        scalars = {
            REWARD: steps["next.reward"].to_numpy(),
            DONE: terminated | truncated,
            TRUNCATED: truncated,
            "intervention": _flags(steps, "intervention"),
            "source": steps["source"].to_numpy().astype(np.int64),
            "policy_version": np.array(versions, np.int64),
            "operator_index": np.array(operators, np.int64),
        }
        return columns | {name: values[:, None] for name, values in scalars.items()}

    def _operator_index(self, operator: str) -> int:
        return self._operators.setdefault(operator, len(self._operators)) if operator else -1


def _flags(steps: pa.RecordBatch, name: str) -> np.ndarray:
    flags: np.ndarray = steps[name].to_numpy(zero_copy_only=False)
    return flags


def _values(column: pa.Array, feature: Feature) -> np.ndarray | list[np.ndarray]:
    if feature.codec != "raw":
        return [decode(feature, data) for data in column.to_pylist()]
    values: np.ndarray = column.flatten().to_numpy()
    return values.reshape(len(column), *feature.shape).astype(feature.np_dtype, copy=False)


def _origin(index: int, episode: RecordedEpisode) -> dict[str, Any]:
    robot, boot, number = episode.key
    names = ("task", "instruction", "outcome", "judge", "length", "first_version", "last_version")
    return {
        "episode_index": index,
        "robot_id": robot,
        "boot_id": boot,
        "episode_id": number,
        **{name: episode.closed[name] for name in names},
        **{name: episode.opened[name] for name in ("seed", "reset_state_id", "group_id")},
        "opened_ns": episode.opened["time_ns"],
        "closed_ns": episode.closed["time_ns"],
        "interventions": episode.num_interventions,
    }
