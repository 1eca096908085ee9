"""The log on a disk that loses its power: what was acknowledged is there, once and intact, and work goes on."""

import random
import shutil

import pytest

from buffer.log import Log
from buffer.reader import LogReader
from fleet.robot import Source
from tests.buffer.fragments import make_spec
from tests.faults.disk_model import RecordedDisk, Unsynced, killed

ROBOTS = (("r1", "a" * 16), ("r2", "b" * 16))
SPECS = {spec.hash: spec for spec in (make_spec(state_size=size) for size in (3, 4, 5))}
SEGMENT_BYTES = 16_000  # and 64 kB of room for keys: a few fragments each
CUTS_PER_RUN = 25


def fragment_of(robot, seq):
    """Spec, tables and payload of a number; a resent fragment is the same."""
    rng = random.Random(f"{robot} {seq}")
    payload = rng.randbytes(64 * rng.choice([1, 9, 30, 200]))
    return sorted(SPECS)[min(seq // 20, 2)], {"steps": len(payload)}, payload


class Shard:
    """A log in use, over kills.

    Attributes:
        acked: (instant of the disk, robot, seq): durable from then on.
        sealed: From which instant a segment need not be looked at again, by its number.
    """

    def __init__(self, disk, folder, rng):
        self.disk, self.folder, self.rng = disk, folder, rng
        self.acked, self.sealed, self.log = [], {}, None

    def run(self):
        """Works until the disk kills it."""
        NotedLog(self.folder, self.disk, self)
        self.acked += [(len(self.disk.ops), robot, self.log.high_water(robot, boot)) for robot, boot in ROBOTS]
        while True:
            if self.rng.random() < 0.7:
                append_next(self.log, *self.rng.choice(ROBOTS))
            else:
                newly = self.log.commit()
                self.acked += [(len(self.disk.ops), robot, seq) for robot, _, seq in newly]

    def stop(self):
        if hasattr(self.log, "_lock"):
            self.log._lock.release()


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
        self.shard.sealed.setdefault(name.number, len(self.shard.disk.ops))


def append_next(log, robot, boot):
    seq = log.last(robot, boot).seq + 1
    spec_hash, tables, payload = fragment_of(robot, seq)
    log.add_spec(SPECS[spec_hash])
    steps = (0, 3, 0, 0) if seq // 5 % 3 == 0 else (3, 0, 0, 0)
    assert len(steps) == len(Source)
    log.append(robot, boot, seq, spec_hash, tables, payload, (seq,), episode=seq // 5, steps=steps)


def at(facts, instant):
    """The highest seq by robot of what holds at an instant."""
    marks = {robot: 0 for robot, _ in ROBOTS}
    for when, robot, seq in facts:
        if when <= instant:
            marks[robot] = max(marks[robot], seq)
    return marks


def check(log, folder, acked, sealed):
    """Each acknowledged fragment is there, once, in order and intact; what the log says is durable is there too."""
    assert not sealed & {found.name.number for found in log.recovered}, "what was sealed is not looked at again"
    assert not any(found.damaged for found in log.recovered), "a power loss damages nothing that counts"
    reader = LogReader(folder)
    records = reader.poll()
    assert not reader.damaged
    for robot, boot in ROBOTS:
        mark = log.high_water(robot, boot)
        assert mark >= acked[robot], f"{robot}: {acked[robot]} was acknowledged, {mark} is there"
        assert log.last(robot, boot).seq == mark and log.last(robot, boot).note == ((mark,) if mark else ())
        mine = [record for record in records if record.robot_id == robot]
        assert [record.seq for record in mine] == list(range(1, mark + 1)), robot
        for record in mine:
            assert (record.spec_hash, record.tables, bytes(record.payload)) == fragment_of(robot, record.seq)
            assert log.spec(record.spec_hash) == SPECS[record.spec_hash]
    reader.close()


def run_shard(folder, rng):
    """A shard that was killed some times, on a recorded disk."""
    folder.mkdir()
    disk = RecordedDisk(folder)
    shard = Shard(disk, folder / "run" / "buffer", rng)
    for _ in range(rng.randrange(2, 6)):
        with killed(disk, rng, 90):
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
            cut = rng.randrange(len(shard.disk.ops) + 1)
            once, twice = tmp_path / "once", tmp_path / "twice"
            said = f"trial {trial}, {number}: {shard.disk.disk_after(cut, once, rng)}"
            again = Shard(RecordedDisk(once), once / "run" / "buffer", rng)
            try:
                log = NotedLog(again.folder, again.disk, again)
                acked, sealed = at(shard.acked, cut), {number for number, when in shard.sealed.items() if when <= cut}
                check(log, again.folder, acked, sealed)
                again.acked += [(len(again.disk.ops), robot, log.high_water(robot, boot)) for robot, boot in ROBOTS]
                for _ in range(3):
                    append_next(log, *rng.choice(ROBOTS))
                    again.acked += [(len(again.disk.ops), robot, seq) for robot, _, seq in log.commit()]
                log.close()
                second = rng.randrange(len(again.disk.ops) + 1)
                said += f"; again {again.disk.disk_after(second, twice, rng)}"
                log = Log(twice / "run" / "buffer", files=Unsynced(), segment_bytes=SEGMENT_BYTES)
                after = at(again.acked, second)
                sealed |= {number for number, when in again.sealed.items() if when <= second}
                check(log, twice / "run" / "buffer", {robot: max(acked[robot], after[robot]) for robot in acked}, sealed)
                log.close()
            except BaseException as error:
                error.add_note(said)
                raise
            again.disk.restart()
            shutil.rmtree(once)
            shutil.rmtree(twice)
        shutil.rmtree(tmp_path / "disk")
