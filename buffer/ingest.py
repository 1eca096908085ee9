"""From a received fragment to the log: checks it, appends the bytes as they came, says what became durable.

Only the fragment's order within its (robot, boot) and within its episode is remembered. That state is stored in the
log beside each fragment, so that a restarted gateway goes on exactly where the killed one stopped, without decoding.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.log import Log
from buffer.segment import BootKey
from fleet.errors import FragmentRefused, StorageError
from fleet.journal import Journal
from fleet.robot import SOURCE_NAMES, Source
from fleet.schema import OUTCOMES, Fragment, check_fragment, decode_fragment
from fleet.spec import RobotSpec

_JUMP_NS = 1_000_000_000  # clocks that differ by less are taken as right
_OLDEST_NS = 30 * 24 * 3600 * 1_000_000_000  # what has waited in a spool for longer is no latency


@dataclasses.dataclass
class IngestStats:
    """Counters since the start. steps: durable steps by (robot, name of the source). Refused and duplicate: fragments.

    clock_jumps: how often the wall clock of a robot went another way than its monotonic clock, or was impossible.
    """

    steps: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    fragments: int = 0
    bytes: int = 0
    duplicates: int = 0
    refused: int = 0
    clock_jumps: int = 0


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a boot is: its newest episode, the frame that must come next, and what its steps were so far."""

    episode_id: int = -1
    next_frame: int = 0
    is_open: bool = False
    operator_steps: int = 0
    steps_by_source: tuple[int, ...] = (0,) * len(Source)

    def to_note(self) -> tuple[Any, ...]:
        return (self.episode_id, self.next_frame, self.is_open, self.operator_steps, *self.steps_by_source)

    @classmethod
    def from_note(cls, note: tuple[Any, ...]) -> Progress:
        return cls(note[0], note[1], note[2], note[3], tuple(note[4:])) if note else cls()


@dataclasses.dataclass(frozen=True)
class _Pending:
    """What is counted and journalled once the fragment is durable."""

    key: BootKey
    seq: int
    num_bytes: int
    time_ns: np.ndarray
    mono_ns: np.ndarray
    sources: np.ndarray
    episodes: tuple[dict[str, Any], ...]


class Ingest:
    """The gateway's IngestHandler.

    Args:
        log: Open for writing; closed by whoever opened it.
        journal: Where ``durable`` and ``episode`` lines go.
    """

    def __init__(self, log: Log, journal: Journal | None = None) -> None:
        self.stats = IngestStats()
        self._log, self._journal = log, journal
        self._pending: list[_Pending] = []
        self._again: set[BootKey] = set()
        self._ahead_ns: dict[BootKey, int] = {}  # wall clock minus monotonic clock of the newest step
        self._admitted: dict[str, RobotSpec] = {}  # by robot: the spec of its last HELLO

    def admit(self, robot_id: str, boot_id: str, spec: RobotSpec) -> int:
        """Remembers the spec of a robot that said HELLO; it is stored with its first fragment, so that a robot which
        never sends one leaves no trace.

        Returns:
            The highest durable seq of this boot, 0 for none.
        """
        self._admitted[robot_id] = spec
        return self._log.high_water(robot_id, boot_id)

    def offer(self, robot_id: str, fields: Mapping[str, Any], payload: bytes | memoryview) -> None:
        """Takes one FRAGMENT message. A duplicate is dropped here and acknowledged again by ``commit``.

        Raises:
            FragmentRefused: The fragment breaks a rule; nothing of it is kept.
            DiskFull, StorageError: It could not be stored.
        """
        boot_id, seq = fields["boot_id"], fields["seq"]
        last = self._log.last(robot_id, boot_id)
        if 1 <= seq <= last.seq:
            self.stats.duplicates += 1
            self._again.add((robot_id, boot_id))
            return
        try:
            if seq != last.seq + 1:
                raise FragmentRefused(
                    f"seq {seq} of {robot_id}/{boot_id} after {last.seq}",
                    rule="gapless",
                    remedy="send again from the high-water mark",
                )
            fragment = self._decode(robot_id, fields, payload)
            progress, closed = advance(Progress.from_note(last.note), fragment)
        except FragmentRefused:
            self.stats.refused += 1
            raise
        pending = _pending(robot_id, boot_id, seq, len(payload), fragment, closed)
        try:
            self._log.append(
                robot_id,
                boot_id,
                seq,
                fields["spec_hash"],
                fields["tables"],
                payload,
                progress.to_note(),
                episode=progress.episode_id,
                steps=np.bincount(pending.sources, minlength=len(Source)).tolist(),
            )
        except StorageError:
            self._forget_lost()
            raise
        self._pending.append(pending)

    def _decode(self, robot_id: str, fields: Mapping[str, Any], payload: bytes | memoryview) -> Fragment:
        spec = self._log.spec(fields["spec_hash"])
        admitted = self._admitted.get(robot_id)
        if spec is None and admitted is not None and admitted.hash == fields["spec_hash"]:
            spec = admitted
        if spec is None:
            raise FragmentRefused(
                f"spec {fields['spec_hash']!r} of {robot_id} is not known",
                rule="a HELLO with the spec comes before its fragments",
            )
        fragment = decode_fragment(fields["tables"], payload)
        check_fragment(fragment, spec, robot_id, fields["boot_id"])
        self._log.add_spec(spec)
        return fragment

    def commit(self) -> list[tuple[str, str, int]]:
        """Makes what was offered durable with one fsync.

        Returns:
            (robot_id, boot_id, seq) to be acknowledged; also for boots that only sent duplicates.

        Raises:
            DiskFull, StorageError: Nothing since the last commit is stored or may be acknowledged. The next fragments
                of these robots are refused by the rule "gapless", until they start again from the high-water mark.
        """
        try:
            newly = {(robot, boot): seq for robot, boot, seq in self._log.commit()}
        except StorageError:
            self._forget_lost()
            raise
        for key in self._again - newly.keys():
            newly[key] = self._log.high_water(*key)
        self._again.clear()
        pending, self._pending = self._pending, []
        now_ns = time.time_ns()
        for item in pending:
            if item.seq <= self._log.high_water(*item.key):
                self._report(item, now_ns)
        return [(robot, boot, seq) for (robot, boot), seq in newly.items() if seq > 0]

    def _forget_lost(self) -> None:
        """What the log forgot after an error is not counted: it comes again."""
        self._pending = [item for item in self._pending if item.seq <= self._log.last(*item.key).seq]

    def _report(self, item: _Pending, now_ns: int) -> None:
        robot, boot = item.key
        self.stats.fragments += 1
        self.stats.bytes += item.num_bytes
        by_source = {SOURCE_NAMES[s]: int(n) for s, n in zip(*np.unique(item.sources, return_counts=True), strict=True)}
        for source, count in by_source.items():
            self.stats.steps[robot, source] += count
        jumps = self._clock_jumps(item, now_ns) if len(item.time_ns) else 0
        self.stats.clock_jumps += jumps
        if self._journal is None:
            return
        if len(item.time_ns):
            facts = {"latency_ms": latencies_ms(item.time_ns, now_ns), "steps": by_source, "clock_jumps": jumps}
            self._journal.write("durable", robot=robot, boot=boot, seq=item.seq, **facts)
        for episode in item.episodes:
            self._journal.write("episode", robot=robot, boot=boot, **episode)

    def _clock_jumps(self, item: _Pending, now_ns: int) -> int:
        """A jump harms nothing: frames say what follows what. It is counted, because times of these steps mislead people."""
        ahead_ns = item.time_ns - item.mono_ns
        steps_ns = np.diff(ahead_ns, prepend=self._ahead_ns.get(item.key, ahead_ns[0]))
        self._ahead_ns[item.key] = int(ahead_ns[-1])
        jumps = np.count_nonzero((steps_ns > _JUMP_NS) | (steps_ns < -_JUMP_NS))
        return int(jumps) + bool((item.time_ns > now_ns + _JUMP_NS).any())


def latencies_ms(time_ns: np.ndarray, now_ns: int) -> list[float]:
    """Milliseconds from each step until now, rounded to 0.1; not of steps whose clock cannot have been right."""
    believed = time_ns[(time_ns <= now_ns + _JUMP_NS) & (time_ns >= now_ns - _OLDEST_NS)]
    return [float(ms) for ms in np.round((now_ns - believed) / 1e6, 1)]


def advance(before: Progress, fragment: Fragment) -> tuple[Progress, tuple[dict[str, Any], ...]]:
    """Where the boot is after this fragment, and the closed episodes as the journal's fields.

    An episode may be left without a closed row (the robot's disk was full); a new one always starts at frame 0.

    Raises:
        FragmentRefused: The fragment does not continue its episode.
    """
    after = before
    episodes = fragment.tables["episodes"].to_pylist() if "episodes" in fragment.tables else []
    for row in episodes:
        if row["event"] not in ("opened", "closed", "dropped"):
            raise FragmentRefused(f"episode event {row['event']!r}", rule="opened, closed or dropped")
        if row["event"] == "opened" and row["episode_id"] != after.episode_id:
            after = _begin(after, row["episode_id"])
    steps = fragment.tables.get("steps")
    if steps is not None:
        after = _add_steps(after, steps)
    closed = []
    for row in episodes:
        if row["event"] == "opened":
            continue
        if row["event"] == "dropped":
            after = after if row["episode_id"] == after.episode_id else _begin(after, row["episode_id"])
            after = dataclasses.replace(after, is_open=False)
            continue
        if row["outcome"] not in OUTCOMES:
            raise FragmentRefused(f"outcome {row['outcome']!r} of a closed episode", rule=f"one of {OUTCOMES}")
        if row["episode_id"] != after.episode_id or not after.is_open:
            raise FragmentRefused(
                f"a closed row of episode {row['episode_id']} after episode {after.episode_id}, open: {after.is_open}",
                rule="the open episode is closed, once",
            )
        after = dataclasses.replace(after, is_open=False)
        closed.append(_closed_fields(row, after))
    return after, tuple(closed)


def _begin(before: Progress, episode_id: int) -> Progress:
    if episode_id <= before.episode_id:
        raise FragmentRefused(
            f"episode {episode_id} after episode {before.episode_id}", rule="episode ids count up within a boot"
        )
    return Progress(episode_id, 0, True)


def _add_steps(before: Progress, steps: pa.RecordBatch) -> Progress:
    episode, frame = steps.column("episode_id").to_numpy(), steps.column("frame_index").to_numpy()
    first, last = int(episode[0]), int(episode[-1])
    if first != last:
        raise FragmentRefused(f"steps of episodes {first} to {last}", rule="a fragment holds steps of one episode")
    current = before if first == before.episode_id else _begin(before, first)
    if not current.is_open:
        raise FragmentRefused(f"steps of episode {first}", rule="an episode does not go on after its end")
    if int(frame[0]) != current.next_frame:
        raise FragmentRefused(
            f"frame {int(frame[0])} of episode {first} where {current.next_frame} comes next",
            rule="frames follow each other without a gap",
        )
    sources = steps.column("source").to_numpy()
    if int(sources.max()) >= len(Source):
        raise FragmentRefused(f"source {int(sources.max())}", rule=f"one of {[int(s) for s in Source]}")
    counts = np.bincount(sources, minlength=len(Source))
    return Progress(
        first,
        int(frame[-1]) + 1,
        True,
        current.operator_steps + int(steps.column("intervention").to_numpy(zero_copy_only=False).sum()),
        tuple(int(a + b) for a, b in zip(current.steps_by_source, counts, strict=True)),
    )


def _closed_fields(row: dict[str, Any], progress: Progress) -> dict[str, Any]:
    names = ("episode_id", "task", "outcome", "judge", "length", "first_version", "last_version")
    source = SOURCE_NAMES[int(np.argmax(progress.steps_by_source))]
    return {**{name: row[name] for name in names}, "operator_steps": progress.operator_steps, "source": source}


def _pending(
    robot_id: str, boot_id: str, seq: int, num_bytes: int, fragment: Fragment, closed: tuple[dict[str, Any], ...]
) -> _Pending:
    steps = fragment.tables.get("steps")
    if steps is None:
        time_ns, mono_ns, sources = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
    else:
        time_ns, mono_ns, sources = (np.array(steps.column(name)) for name in ("time_ns", "mono_ns", "source"))
    return _Pending((robot_id, boot_id), seq, num_bytes, time_ns, mono_ns, sources, closed)
