"""What a log holds, for people: its episodes, its size, and the fragments of one episode. Read-only; a gateway may write.

Segments are gone through one at a time, by their index sidecars where there are any, so that a log of any size can be
looked at; what grows is one small row an episode.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from buffer import sidecar
from buffer.labels import Judged, Label, LabelReader, label_of
from buffer.manifest import live_segments
from buffer.parts import IndexPart
from buffer.reader import SegmentMap, map_segment
from buffer.segment import EpisodeKey, SegmentName, SegmentState, read_state_file
from fleet.errors import EpisodeError, FragmentRefused
from fleet.robot import SOURCE_NAMES, Source
from fleet.schema import Fragment, decode_fragment

OPEN = "open"
_LISTED = 5  # of several episodes that answer to one name


@dataclasses.dataclass(slots=True)
class Episode:
    """One episode, as the log has it now.

    Attributes:
        said, judge: Outcome as the robot said it, and who judged there; "open" where its end is not known.
        length: Steps as the robot said at the end, -1 before. num_steps: Those that are there.
        by_source: Steps by fleet.robot.Source. num_takeovers: Runs of an operator's steps. last_source: Who acted last.
        first_version, last_version: Policy versions, -1 for none.
        start_ns, end_ns: Robot's clock at the first and the last step, 0 without steps.
        segments: Numbers of the segments that have a part of it, in order.
        labels: Facts that came later, in the order in which they were read.
    """

    key: EpisodeKey
    spec_hash: str = ""
    task: str = ""
    instruction: str = ""
    said: str = OPEN
    judge: str = ""
    length: int = -1
    num_steps: int = 0
    by_source: tuple[int, ...] = (0,) * len(Source)
    num_takeovers: int = 0
    last_source: int = -1
    first_version: int = -1
    last_version: int = -1
    start_ns: int = 0
    end_ns: int = 0
    reward: float = 0.0
    start: str = ""
    segments: tuple[int, ...] = ()
    labels: tuple[Label, ...] = ()

    @property
    def name(self) -> str:
        return "/".join(map(str, self.key))

    @property
    def finished(self) -> bool:
        return self.said != OPEN

    @property
    def outcome(self) -> str:
        """By the newest label, else as the robot said."""
        label = Judged(self.labels).outcome
        return self.said if label is None else label.value

    @property
    def judged_by(self) -> str:
        """Who said so; "" for nobody."""
        label = Judged(self.labels).outcome
        return self.judge if label is None else label.judge

    @property
    def excluded(self) -> bool:
        return Judged(self.labels).excluded

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for scripts."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        robot, boot, episode = fields.pop("key")
        named = dict(zip(SOURCE_NAMES, self.by_source, strict=True))
        history = [dataclasses.asdict(label) for label in self.labels]
        judged = {"outcome": self.outcome, "judged_by": self.judged_by, "excluded": self.excluded, "finished": self.finished}
        key = {"name": self.name, "robot": robot, "boot": boot, "episode": episode}
        return {**key, **fields, **judged, "by_source": named, "labels": history, "segments": list(self.segments)}


@dataclasses.dataclass(frozen=True)
class Part:
    """The index part of a segment, with the segment it was made of."""

    name: SegmentName
    state: SegmentState
    map: SegmentMap
    index: IndexPart


def parts(buffer: Path, names: Iterable[SegmentName] | None = None) -> Iterator[Part]:
    """Index parts of all segments that count, or of some of them, in order; empty segments are left out.

    Raises:
        OSError, StorageError: The folder or a segment cannot be read.
    """
    for name in live_segments(buffer) if names is None and buffer.is_dir() else names or ():
        state = read_state_file(name.state_path)
        try:
            segment = map_segment(name)
        except FileNotFoundError:  # given up since the listing
            continue
        if state is None or segment is None:
            continue
        loaded = sidecar.load(name, state.length) if state.sealed else None
        yield Part(name, state, segment, sidecar.make(segment, state.length) if loaded is None else loaded)


def read_episodes(buffer: Path, see: Callable[[Part], None] = lambda part: None) -> list[Episode]:
    """All episodes of a log, in the order in which they were first heard of.

    Args:
        see: Called with each part, for who wants to know more of it.

    Raises:
        OSError, StorageError: The log cannot be read.
    """
    found: dict[EpisodeKey, Episode] = {}
    labels: list[Label] = []
    for part in parts(buffer):
        see(part)
        _add_steps(found, part)
        _add_rows(found, part, labels)
    reader = LabelReader(buffer)
    labels += reader.poll()  # after the robots' own, which these overrule
    reader.close()
    for label in labels:
        if label.episode in found:
            found[label.episode].labels += (label,)
    return list(found.values())


def _episode(found: dict[EpisodeKey, Episode], key: EpisodeKey, segment: int) -> Episode:
    episode = found.get(key)
    if episode is None:
        episode = found[key] = Episode(key)
    if episode.segments[-1:] != (segment,):
        episode.segments += (segment,)
    return episode


def _add_steps(found: dict[EpisodeKey, Episode], part: Part) -> None:
    """Adds the steps of a part, a run of fragments of one episode at a time."""
    fragments, steps = part.index.fragments, part.index.steps
    with_steps = np.flatnonzero(fragments["num_steps"] > 0)
    ends = np.cumsum(fragments["num_steps"])
    pairs = np.stack([fragments["boot"][with_steps], fragments["episode_id"][with_steps]], axis=1)
    episodes, of_pair = np.unique(pairs, axis=0, return_inverse=True)
    order = np.argsort(of_pair.reshape(-1), kind="stable")
    groups = np.split(with_steps[order], np.cumsum(np.bincount(of_pair.reshape(-1)))[:-1]) if len(episodes) else []
    versions = _versions(part.index)
    groups.sort(key=lambda group: int(group[0]))
    for group in groups:
        first = int(group[0])
        boot = part.index.boots[fragments["boot"][first]]
        episode = _episode(found, (*boot, int(fragments["episode_id"][first])), part.name.number)
        rows = np.concatenate([np.arange(ends[f] - fragments["num_steps"][f], ends[f]) for f in group])
        episode.spec_hash = part.index.specs[fragments["spec"][first]]
        episode.task = part.index.tasks[fragments["task"][first]]
        _count_steps(episode, {name: steps[name][rows] for name in ("source", "time_ns", "reward")})
        if not episode.finished:
            _add_versions(episode, [version for f in group for version in versions.get(int(f), ())])


def _count_steps(episode: Episode, steps: dict[str, np.ndarray]) -> None:
    source = steps["source"]
    counts = np.bincount(source, minlength=len(Source))
    operator = source == Source.OPERATOR
    begins = int(operator[0] and episode.last_source != Source.OPERATOR)
    episode.num_takeovers += begins + int((operator[1:] & ~operator[:-1]).sum())
    episode.last_source = int(source[-1])
    episode.by_source = tuple(int(a + b) for a, b in zip(episode.by_source, counts, strict=True))
    episode.num_steps += len(source)
    episode.reward += float(steps["reward"].sum(dtype=np.float64))
    episode.start_ns = episode.start_ns or int(steps["time_ns"][0])
    episode.end_ns = int(steps["time_ns"][-1])


def _versions(index: IndexPart) -> dict[int, list[int]]:
    """Versions of the policy calls, by fragment."""
    found: dict[int, list[int]] = {}
    for fragment, version in zip(index.chunks["fragment"].tolist(), index.chunks["version"].tolist(), strict=True):
        found.setdefault(fragment, []).append(version)
    return found


def _add_versions(episode: Episode, versions: list[int]) -> None:
    if versions:
        first = min(versions)
        episode.first_version = first if episode.first_version < 0 else min(episode.first_version, first)
        episode.last_version = max(episode.last_version, *versions)


def _add_rows(found: dict[EpisodeKey, Episode], part: Part, labels: list[Label]) -> None:
    """Adds what episodes tables say; collects the robots' own labels."""
    boot_of = part.index.fragments["boot"]
    for row in part.index.episodes.to_pylist():
        episode = _episode(found, (*part.index.boots[boot_of[row["fragment"]]], row["episode_id"]), part.name.number)
        episode.task, episode.instruction = row["task"], row["instruction"] or episode.instruction
        episode.start = row["reset_state_id"] or (f"seed:{row['seed']}" if row["seed"] >= 0 else episode.start)
        if row["event"] == "closed":
            episode.said, episode.judge, episode.length = row["outcome"] or "unknown", row["judge"], row["length"]
            if row["first_version"] >= 0:
                episode.first_version, episode.last_version = row["first_version"], row["last_version"]
        elif row["event"] == "dropped":
            episode.said, episode.judge = "dropped", "the robot's disk was full"
    labels += (label_of(row) for row in part.index.labels.to_pylist())


def find_episodes(episodes: list[Episode], names: Iterable[str]) -> list[Episode]:
    """The episodes that people mean by ROBOT/BOOT/EPISODE, where robot and boot may be cut short, or by ROBOT/EPISODE.

    Raises:
        EpisodeError: None or several answer to a name.
    """
    return [_find(episodes, name) for name in names]


def _find(episodes: list[Episode], name: str) -> Episode:
    *owners, number = name.split("/")
    exact = [e for e in episodes if e.name == name]
    found = exact or [e for e in episodes if str(e.key[2]) == number and _answers(e.key[:2], owners)]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(e.name for e in found[:_LISTED]) + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")
    raise EpisodeError(
        f"{len(found) or 'no'} episode{'s' * (len(found) != 1)} answer to {name!r}" + (f": {listing}" if found else ""),
        rule="ROBOT/BOOT/EPISODE names one; robot and boot may be cut short, and boot left out",
        remedy="`fleet data list` shows their names",
    )


def _answers(key: tuple[str, ...], owners: list[str]) -> bool:
    if not 1 <= len(owners) <= 2:
        return False
    return all(part.startswith(asked) for part, asked in zip(key, owners, strict=False))


def fragments_of(buffer: Path, episode: Episode) -> Iterator[Fragment]:
    """The fragments of one episode in order, each read when it is asked for; damaged ones are left out.

    Raises:
        OSError, StorageError: The log cannot be read.
    """
    for name in live_segments(buffer):
        if name.number not in episode.segments:
            continue
        state, segment = read_state_file(name.state_path), map_segment(name)
        if state is None or segment is None:
            continue
        records, _ = sidecar.records_of(segment, state.length)
        for record in records:
            if (record.robot_id, record.boot_id) == episode.key[:2]:
                with contextlib.suppress(FragmentRefused):
                    fragment = decode_fragment(record.tables, record.payload)
                    if _speaks_of(fragment, episode.key[2]):
                        yield fragment


def _speaks_of(fragment: Fragment, episode_id: int) -> bool:
    tables = (fragment.tables[name] for name in ("steps", "chunks", "episodes") if name in fragment.tables)
    return any(episode_id in table.column("episode_id").to_pylist() for table in tables)
