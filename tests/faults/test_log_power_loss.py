"""The log on a disk that loses its power: what was acknowledged is there, once and intact, and work goes on."""

import dataclasses
import random
import shutil
import time

import pytest

from buffer.log import Log
from buffer.reader import LogReader
from buffer.retention import Limits, Upkeep
from fleet.robot import Source
from tests.buffer.fragments import make_spec
from tests.faults.disk_model import RecordedDisk, Unsynced, killed

ROBOTS = (("r1", "a" * 16), ("r2", "b" * 16))
SPECS = {spec.hash: spec for spec in (make_spec(state_size=size) for size in range(1, 13))}
SEGMENT_BYTES = 16_000  # and 64 kB of room for keys: a few fragments each
CUTS_PER_RUN = 25


def fragment_of(robot, seq):
    """Spec, tables and payload of a number; a resent fragment is the same."""
    rng = random.Random(f"{robot} {seq}")
    payload = rng.randbytes(64 * rng.choice([1, 30, 200, 400]))
    return sorted(SPECS)[seq // 4 % len(SPECS)], {"steps": len(payload)}, payload


@dataclasses.dataclass
class Facts:
    """What is promised from which instant of a disk on (its number of calls), and what retention may take or has taken.

    Attributes:
        acked: Each (robot, seq) that is durable.
        sealed: Numbers of segments that need not be looked at again.
        may_go, gone: Each (robot, seq) that retention was about to give up, and has given up.
    """

    acked: dict = dataclasses.field(default_factory=dict)
    sealed: dict = dataclasses.field(default_factory=dict)
    may_go: dict = dataclasses.field(default_factory=dict)
    gone: dict = dataclasses.field(default_factory=dict)

    def until(self, instant):
        """Those that hold at an instant."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Facts(*({key: 0 for key, when in part.items() if when <= instant} for part in parts))

    def __or__(self, other):
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self))
        return Facts(*({**later, **earlier} for earlier, later in pairs))


class Shard:
    """A log in use with its retention, over kills."""

    def __init__(self, disk, folder, rng):
        self.disk, self.folder, self.rng = disk, folder, rng
        self.facts, self.log = Facts(), None

    def open(self):
        NotedLog(self.folder, self.disk, self)
        self._note_durable()
        return self.log

    def run(self):
        """Works until the disk kills it."""
        self.open()
        while True:
            self.rng.choice([self.append] * 12 + [self.commit] * 5 + [self.retain] * 2)()

    def stop(self):
        if hasattr(self.log, "_lock"):
            self.log._lock.release()

    def append(self):
        append_next(self.log, *self.rng.choice(ROBOTS))

    def commit(self):
        self.log.commit()
        self._note_durable()

    def retain(self):
        """As the shard's keeper does it, with limits that soon ask for something."""
        upkeep, limits = Upkeep(self.disk, self.folder), Limits(max_bytes=self.rng.choice([30_000, 80_000]))
        upkeep.sweep_strays()
        upkeep.sync(time.time_ns())
        parts = [(part, part.robot_id) for action in upkeep.plan(limits, time.time_ns()) for part in action.entry.boots]
        before = set(self._keys())
        self._note(self.facts.may_go, ((robot, seq) for p, robot in parts for seq in range(p.first_seq, p.last_seq + 1)))
        upkeep.retire(limits, time.time_ns())
        self._note(self.facts.gone, before - set(self._keys()))
        if self.rng.random() < 0.5:
            upkeep.sweep(0, time.time_ns())

    def _keys(self):
        return [(record.robot_id, record.seq) for record in LogReader(self.folder).poll()]

    def _note_durable(self):
        marks = [(robot, self.log.high_water(robot, boot)) for robot, boot in ROBOTS]
        self._note(self.facts.acked, ((robot, seq) for robot, mark in marks for seq in range(1, mark + 1)))

    def _note(self, facts, keys):
        for key in keys:
            facts.setdefault(key, len(self.disk.ops))


class NotedLog(Log):
    """Tells its shard what it seals, and of itself also if it is killed while it opens."""

    def __init__(self, folder, disk, shard):
        self.shard, shard.log = shard, self
        super().__init__(folder, files=disk, segment_bytes=SEGMENT_BYTES)
        for found in self.recovered:
            self._note(found.name)

    def _end_segment(self):
        segment = self._active
        super()._end_segment()
        if segment is not None:
            self._note(segment.name)

    def _note(self, name):
        self.shard._note(self.shard.facts.sealed, [name.number])


def append_next(log, robot, boot):
    seq = log.last(robot, boot).seq + 1
    spec_hash, tables, payload = fragment_of(robot, seq)
    log.add_spec(SPECS[spec_hash])
    steps = (0, 3, 0, 0) if seq // 5 % 3 == 0 else (3, 0, 0, 0)
    assert len(steps) == len(Source)
    log.append(robot, boot, seq, spec_hash, tables, payload, (seq,), episode=seq // 5, steps=steps)


def is_protected(key):
    return key[1] // 5 % 3 == 0


def check(log, folder, facts):
    """Each acknowledged fragment is there, once, in order and intact, unless retention had to do with it."""
    assert not facts.sealed.keys() & {found.name.number for found in log.recovered}, "what was sealed is not looked at again"
    assert not any(found.damaged for found in log.recovered), "a power loss damages nothing that counts"
    reader = LogReader(folder)
    records = reader.poll()
    keys = [(record.robot_id, record.seq) for record in records]
    assert not reader.damaged and len(set(keys)) == len(keys), "each once"
    may_go = {key for key in facts.may_go if not is_protected(key)}
    assert facts.gone.keys() <= may_go, "retention took what is protected"
    assert not facts.gone.keys() & set(keys), "what was given up is back"
    assert facts.acked.keys() - may_go <= set(keys), "an acknowledged fragment is gone"
    for robot, boot in ROBOTS:
        mark = log.high_water(robot, boot)
        assert mark >= max((seq for name, seq in facts.acked if name == robot), default=0)
        assert log.last(robot, boot).seq == mark and log.last(robot, boot).note == ((mark,) if mark else ())
        mine = [seq for name, seq in keys if name == robot]
        assert mine == sorted(mine) and not {*range(1, mark + 1)} - {*mine} - {seq for name, seq in may_go if name == robot}
    for record in records:
        assert (record.spec_hash, record.tables, bytes(record.payload)) == fragment_of(record.robot_id, record.seq)
        assert log.spec(record.spec_hash) == SPECS[record.spec_hash]
    reader.close()


def run_shard(folder, rng):
    """A shard that was killed some times, on a recorded disk."""
    folder.mkdir()
    disk = RecordedDisk(folder)
    shard = Shard(disk, folder / "run" / "buffer", rng)
    for _ in range(rng.randrange(3, 8)):
        with killed(disk, rng, 250):
            shard.run()
        shard.stop()
    return shard


@pytest.mark.timeout(600)
def test_power_loss_keeps_what_was_acknowledged(tmp_path, scale):
    """The power goes at any instant, and a second time while the log is opened again and goes on."""
    for trial in range(2 * scale):
        rng = random.Random(trial)
        shard = run_shard(tmp_path / "disk", rng)
        for number in range(CUTS_PER_RUN):
            cut = shard.disk.instant(rng)
            once, twice = tmp_path / "once", tmp_path / "twice"
            said = f"trial {trial}, {number}: {shard.disk.disk_after(cut, once, rng)}"
            again = Shard(RecordedDisk(once), once / "run" / "buffer", rng)
            try:
                facts = shard.facts.until(cut)
                check(again.open(), again.folder, facts)
                for _ in range(3):
                    again.append()
                    again.commit()
                again.retain()
                again.log.close()
                second = again.disk.instant(rng)
                said += f"; again {again.disk.disk_after(second, twice, rng)}"
                log = Log(twice / "run" / "buffer", files=Unsynced(), segment_bytes=SEGMENT_BYTES)
                check(log, twice / "run" / "buffer", facts | again.facts.until(second))
                log.close()
            except BaseException as error:
                error.add_note(said)
                raise
            again.disk.restart()
            shutil.rmtree(once)
            shutil.rmtree(twice)
        shutil.rmtree(tmp_path / "disk")
