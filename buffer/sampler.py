"""From the log to a batch: follows the committed fragments and draws windows of steps. Needs no server.

A window starts at any step t and holds the actions of t .. t+H-1, as long as they belong to the same episode, follow
each other without a gap and have the same source: the window of an operator's step never crosses a takeover. Behind
that the mask is False and the last valid action is repeated. An episode that still goes on is sampled as it is: a
window at its newest steps is shorter until the rest arrives.

Shape suffixes: B batch, H actions in a window, A action dims.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.index import Arenas, Growable, Places, StepIndex
from buffer.ingest import latencies_ms
from buffer.log import load_spec
from buffer.reader import LogReader, LogRecord
from fleet.batch import BatchNeeds, Windows
from fleet.errors import FleetError, NoData, SpecError
from fleet.images import decode
from fleet.journal import Journal
from fleet.robot import Source
from fleet.schema import Fragment, decode_fragment
from fleet.spec import ACTION, Feature, RobotSpec

_CHUNKS_KEPT = 4096  # policy calls of a boot whose version is remembered


@dataclasses.dataclass
class _Boot:
    """The newest step of a (robot, boot), to which the next fragment may be joined, and versions by chunk."""

    episode_id: int = -1
    frame: int = -1
    source: int = -1
    step: int = -1
    versions: dict[int, int] = dataclasses.field(default_factory=dict)


class Sampler:
    """One reader of a log. Not for several threads at once.

    Args:
        folder: The run's buffer folder.
        task_names: Tasks whose steps are sampled; ``Windows.task_B`` counts in this order. Others are skipped.
        seed: A batch is a function of (seed, step, position in the log).
        journal: Where ``sampleable`` lines go.
        by_task: Within a group of sources each task that has data gets the same weight (SOP's 1/M); False: each step.

    Attributes:
        skipped_steps: Steps of other tasks.
        skipped_fragments: Fragments that could not be read, by the error's code.
    """

    def __init__(
        self, folder: Path, task_names: Sequence[str], seed: int, journal: Journal | None = None, *, by_task: bool = True
    ) -> None:
        self._reader, self._folder = LogReader(folder), folder
        self._task_names, self._seed, self._journal, self._by_task = tuple(task_names), seed, journal, by_task
        self._task_index = {name: i for i, name in enumerate(self._task_names)}
        self._index, self._arenas = StepIndex(), Arenas()
        self._places: dict[str, Places] = {}
        self._encoded: dict[str, dict[int, pa.Array]] = {}
        self._specs: dict[str, RobotSpec] = {}
        self._boots: dict[tuple[str, str], _Boot] = {}
        self._pools: dict[tuple[int, int], Growable] = {}
        self._num_fragments = 0
        self.skipped_steps = 0
        self.skipped_fragments: dict[str, int] = {}

    @property
    def position(self) -> int:
        """Fragments read: the position in the log on which ``batch`` depends."""
        return self._reader.num_records

    @property
    def specs(self) -> list[RobotSpec]:
        """Specs of the robots whose steps were read."""
        return list(self._specs.values())

    @property
    def damaged(self) -> int:
        """Places in the log that could not be read."""
        return len(self._reader.damaged)

    def poll(self, limit: int | None = None) -> int:
        """Takes in what was committed since the last call, at most ``limit`` fragments; returns the number of new steps."""
        before = len(self._index)
        for record in self._reader.poll(limit):
            try:
                fragment = decode_fragment(record.tables, record.payload)
                spec = self._spec(record.spec_hash)
            except FleetError as error:  # checked at ingest: only a damaged disk or spec file brings us here
                self.skipped_fragments[error.code] = self.skipped_fragments.get(error.code, 0) + 1
                continue
            self._add(record, fragment, spec)
        return len(self._index) - before

    def num_steps(self, source: Source | None = None) -> int:
        """Steps that can be drawn, of one source or of all."""
        return sum(len(pool) for (s, _), pool in self._pools.items() if source is None or s == source)

    def batch(self, needs: BatchNeeds, step: int) -> Windows:
        """One batch, a copy that the caller owns.

        Raises:
            NoData: There is no step of the sources that ``needs`` names.
            SpecError: Robots of this log do not have the observations that ``needs`` names, or not in one shape.
        """
        starts = self._draw(needs, np.random.default_rng([self._seed, step]))
        features = {name: self._feature(name) for name in needs.observations}
        steps, mask = self._index.windows(starts, needs.horizon)
        action = self._feature(ACTION)
        actions = self._gather(ACTION, action, steps.reshape(-1))
        return Windows(
            obs={name: self._gather(name, feature, starts) for name, feature in features.items()},
            actions_BHA=actions.reshape(len(starts), needs.horizon, action.size),
            mask_BH=mask,
            source_B=self._index.source.view[starts],
            task_B=self._index.task.view[starts].astype(np.int64),
            version_B=self._index.version.view[starts],
        )

    def close(self) -> None:
        self._reader.close()

    def _spec(self, spec_hash: str) -> RobotSpec:
        if spec_hash not in self._specs:
            spec = load_spec(self._folder, spec_hash)
            if spec is None:
                raise SpecError(f"spec {spec_hash} is not in {self._folder / 'specs'}", rule="a spec is stored before its data")
            self._specs[spec_hash] = spec
        return self._specs[spec_hash]

    def _add(self, record: LogRecord, fragment: Fragment, spec: RobotSpec) -> None:
        boot = self._boots.setdefault((record.robot_id, record.boot_id), _Boot())
        if "chunks" in fragment.tables:
            _remember_versions(boot, fragment.tables["chunks"])
        steps = fragment.tables.get("steps")
        if steps is None:
            return
        task = self._task_index.get(steps.column("task")[0].as_py(), -1)
        if task < 0:
            self.skipped_steps += steps.num_rows
            return
        chunk_ids = steps.column("chunk_id").to_numpy().tolist()
        versions = np.array([boot.versions.get(chunk, -1) for chunk in chunk_ids], np.int64)
        source = steps.column("source").to_numpy()
        first = self._index.add(self._num_fragments, source, task, versions)
        self._link(boot, steps, source, first)
        self._pool(source, task, first)
        self._add_columns(record, steps, spec)
        if self._journal is not None:
            latency = latencies_ms(steps.column("time_ns").to_numpy(), time.time_ns())
            self._journal.write("sampleable", robot=record.robot_id, boot=record.boot_id, seq=record.seq, latency_ms=latency)

    def _link(self, boot: _Boot, steps: pa.RecordBatch, source: np.ndarray, first: int) -> None:
        episode, frame = steps.column("episode_id")[0].as_py(), steps.column("frame_index").to_numpy()
        if (episode, frame[0], source[0]) == (boot.episode_id, boot.frame + 1, boot.source):
            self._index.next.view[boot.step] = first
        boot.episode_id, boot.frame, boot.source, boot.step = episode, int(frame[-1]), int(source[-1]), first + len(frame) - 1

    def _pool(self, source: np.ndarray, task: int, first: int) -> None:
        for value in set(source.tolist()):
            members = np.flatnonzero(source == value) + first
            self._pools.setdefault((value, task), Growable(np.int64)).extend(members, len(members))

    def _add_columns(self, record: LogRecord, steps: pa.RecordBatch, spec: RobotSpec) -> None:
        for name, feature in spec.features.items():
            column = steps.column(name)
            if feature.codec != "raw":
                self._encoded.setdefault(name, {})[self._num_fragments] = column
                continue
            places = self._places.setdefault(name, Places())
            places.fill_to(self._num_fragments)
            places.add(self._arenas.locate(column, record.segment, feature.np_dtype.itemsize))
        self._num_fragments += 1

    def _feature(self, name: str) -> Feature:
        """The feature that all specs of this log agree on."""
        features = {spec.features.get(name) for spec in self._specs.values()}
        kinds = {None if f is None else (f.dtype, f.shape, f.codec) for f in features}
        feature = next(iter(features))
        if len(kinds) != 1 or feature is None:
            raise SpecError(
                f"feature {name!r} is {sorted(str(kind) for kind in kinds)} in this log",
                rule="all robots of a batch have the same dtype, shape and codec of what is asked for",
                remedy="ask for features that all robots have, or train robot types in separate runs",
            )
        return feature

    def _draw(self, needs: BatchNeeds, rng: np.random.Generator) -> np.ndarray:
        """First steps of the windows (B,)."""
        groups = []
        for sources, share in needs.shares.items():
            pools = self._group(sources)
            if pools and share > 0:
                groups.append((pools, share))
        if not groups:
            have = {Source(s).name.lower(): self.num_steps(Source(s)) for s, _ in self._pools}
            raise NoData(
                f"no step of {[s.name.lower() for sources in needs.shares for s in sources]}; the log has {have or 'nothing'}",
                rule="a batch needs at least one step of the sources that are asked for",
                remedy="wait for robots or collect demonstrations",
            )
        counts = split_by_share(needs.batch_size, [share for _, share in groups], rng.random())
        drawn = [self._draw_group(pools, count, rng) for (pools, _), count in zip(groups, counts, strict=True)]
        return rng.permutation(np.concatenate(drawn))

    def _group(self, sources: tuple[Source, ...]) -> list[list[np.ndarray]]:
        """The group's steps: by task (or all in one), by source."""
        wanted = sorted(key for key in self._pools if key[0] in sources)
        if not self._by_task:
            return [[self._pools[key].view for key in wanted]] if wanted else []
        by_task = sorted(wanted, key=lambda key: key[1])
        return [[self._pools[key].view for key in keys] for _, keys in itertools.groupby(by_task, key=lambda key: key[1])]

    def _draw_group(self, pools: list[list[np.ndarray]], count: int, rng: np.random.Generator) -> np.ndarray:
        numbers = np.sort(rng.integers(len(pools), size=count))
        fractions = rng.random(count)
        ends = np.searchsorted(numbers, np.arange(len(pools) + 1))
        out = np.empty(count, np.int64)
        for number in np.unique(numbers):
            part = slice(ends[number], ends[number + 1])
            out[part] = _pick(pools[number], fractions[part])
        return out

    def _gather(self, name: str, feature: Feature, steps: np.ndarray) -> np.ndarray:
        fragment, row = self._index.fragment.view[steps], self._index.row.view[steps]
        if name not in self._places:
            return self._decode_images(name, feature, fragment, row)
        places = self._places[name]
        starts = places.offset.view[fragment] + row.astype(np.int64) * feature.size
        dtype = np.dtype(np.uint8) if feature.dtype == "bool" else feature.np_dtype
        values = self._arenas.gather(places.arena.view[fragment], starts, feature.size, dtype)
        return values.astype(feature.np_dtype, copy=False).reshape(len(steps), *feature.shape)

    def _decode_images(self, name: str, feature: Feature, fragment: np.ndarray, row: np.ndarray) -> np.ndarray:
        columns = self._encoded[name]
        out = np.empty((len(row), *feature.shape), feature.np_dtype)
        for i, (f, r) in enumerate(zip(fragment.tolist(), row.tolist(), strict=True)):
            out[i] = decode(feature, columns[f][r].as_py())
        return out


def _remember_versions(boot: _Boot, chunks: pa.RecordBatch) -> None:
    ids, versions = chunks.column("chunk_id").to_numpy().tolist(), chunks.column("policy_version").to_numpy().tolist()
    boot.versions.update(zip(ids, versions, strict=True))
    while len(boot.versions) > _CHUNKS_KEPT:
        del boot.versions[next(iter(boot.versions))]


def _pick(pools: list[np.ndarray], fractions: np.ndarray) -> np.ndarray:
    """Elements of several arrays taken as one, by fractions in [0, 1)."""
    if len(pools) == 1:
        return pools[0][(fractions * len(pools[0])).astype(np.int64)]
    ends = np.cumsum([len(pool) for pool in pools])
    at = (fractions * ends[-1]).astype(np.int64)
    which = np.searchsorted(ends, at, side="right")
    out = np.empty(len(at), np.int64)
    for number, pool in enumerate(pools):
        mine = which == number
        out[mine] = pool[at[mine] - (ends[number] - len(pool))]
    return out


def split_by_share(total: int, shares: Sequence[float] | Mapping[Any, float], offset: float) -> list[int]:
    """Whole numbers that sum to ``total`` and whose mean over offsets in [0, 1) is exactly each share of it."""
    values = list(shares.values()) if isinstance(shares, Mapping) else list(shares)
    whole = math.fsum(values)
    edges = [math.floor(total * math.fsum(values[: i + 1]) / whole + offset) for i in range(len(values))]
    edges[-1] = total
    return [edge - before for edge, before in zip(edges, [0, *edges[:-1]], strict=True)]
