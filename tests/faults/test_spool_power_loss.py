"""The spool on a disk that loses its power: what was flushed and not acknowledged is there, and can be sent."""

import collections
import random
import shutil

import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from fleet.errors import DiskFull
from fleet.robot import Source
from fleet.schema import decode_fragment
from fleet.spool import Spool
from tests.buffer.fragments import fragment, make_spec
from tests.faults.disk_model import RecordedDisk, Unsynced, killed

P, O, SPEC, BIG = Source.POLICY, Source.OPERATOR, make_spec(extra=700), 1 << 40  # noqa: E741
CUTS_PER_RUN = 25


class Robot:
    """A spool in use, over kills: what was promised at which instant of the disk.

    Attributes:
        flushed, acked: (instant, boot, seq): durable from then on; stored by the gateway from then on.
        dropped: Instant from which a number may be a dropped one.
        items: What was appended, by (boot, seq).
        sent, taken: What the gateway was given, by boot, and of that what it acknowledged.
    """

    def __init__(self, disk, folder, rng):
        self.disk, self.folder, self.rng = disk, folder, rng
        self.flushed, self.acked, self.dropped, self.items = [], [], {}, {}
        self.sent, self.taken = collections.defaultdict(list), collections.defaultdict(dict)
        self.spool, self.episode, self.frame = None, 0, 0

    @property
    def now(self):
        return len(self.disk.ops)

    def run(self):
        """Works until the disk kills it, or it has done enough."""
        NotedSpool(self)
        self.episode = self.frame = 0
        for boot in self.spool.boots():
            self.spool.rewind(boot, at(self.acked, self.now).get(boot, 0))
        online = self.rng.random() < 0.6
        for _ in range(300):  # a full spool that is offline makes no calls at which it could be killed
            self.rng.choice([self._append] * 6 + [self._flush] + [self._send] * 2 * online)()

    def stop(self):
        if hasattr(self.spool, "_lock"):
            self.spool._lock.release()
        self.spool = None

    def _append(self):
        boot, closed = self.spool.boot_id, self.frame >= 2 and self.rng.random() < 0.5
        options = {"opened": self.frame == 0, "closed": closed, "spec": SPEC}
        item = fragment("r1", boot, self.episode, self.frame, [self.rng.choice([P, P, O])], **options)
        seq = self.spool._current.last + 1
        self.items[boot, seq] = item  # it may be there from now on
        try:
            assert self.spool.append(SPEC.hash, *item, self.episode) == seq
            self.frame += 1
        except DiskFull:
            closed = True
        if closed:
            self.episode, self.frame = self.episode + 1, 0

    def _flush(self):
        self.spool.flush()
        self.flushed.append((self.now, self.spool.boot_id, self.spool._current.last))

    def _send(self):
        got = drain(self.spool)
        for item in got:
            self.sent[item.boot_id].append(item)
        for boot, items in list(self.sent.items()):
            mark = at(self.acked, self.now).get(boot, 0)
            self.sent[boot] = items = list({item.seq: item for item in items if item.seq > mark}.values())
            if items and self.rng.random() < 0.7:
                mark = self.rng.choice(items).seq
                self.acked.append((self.now, boot, mark))
                self.taken[boot].update({item.seq: item for item in items if item.seq <= mark})
                self.spool.acknowledge(boot, mark)


class NotedSpool(Spool):
    """Says which numbers it drops, before it does."""

    def __init__(self, robot):
        self._robot, robot.spool = robot, self  # also if it is killed while it is being made
        super().__init__(robot.folder, max_bytes=robot.rng.choice([BIG, 12_000, 25_000]), files=robot.disk)

    def _drop_episode(self, boot, entries):
        for entry in entries:
            self._robot.dropped.setdefault((boot.boot_id, entry.seq), self._robot.now)
        super()._drop_episode(boot, entries)


def at(facts, instant):
    """The highest seq by boot of what holds at an instant."""
    marks = {}
    for when, boot, seq in facts:
        if when <= instant:
            marks[boot] = max(marks.get(boot, 0), seq)
    return marks


def drain(spool):
    found = []
    while (item := spool.next_unsent()) is not None:
        found.append(item)
    return found


def is_note(item):
    tables = decode_fragment(item.tables, item.payload).tables
    return "steps" not in tables and tables["episodes"].column("event").to_pylist() == ["dropped"]


def check(robot, spool, instant, scratch, extra_flushed=()):
    """All promises that held at ``instant``, and that the gateway takes what is left."""
    flushed, acked = at([*robot.flushed, *extra_flushed], instant), at(robot.acked, instant)
    for boot in spool.boots():
        spool.rewind(boot, acked.get(boot, 0))
    left = collections.defaultdict(dict)
    for item in drain(spool):
        left[item.boot_id][item.seq] = item
    for boot, items in left.items():
        first = acked.get(boot, 0) + 1
        assert list(items) == list(range(first, first + len(items))), "gapless, from the gateway's mark on"
    for boot, last in flushed.items():
        for seq in range(acked.get(boot, 0) + 1, last + 1):
            assert seq in left[boot], f"{boot}/{seq} was flushed and is gone"
            if robot.dropped.get((boot, seq), 1 << 60) > instant:
                item = left[boot][seq]
                assert (dict(item.tables), item.payload) == robot.items[boot, seq], f"{boot}/{seq} was flushed and is another"
    for boot, items in left.items():
        for seq, item in items.items():
            assert (dict(item.tables), item.payload) == robot.items.get((boot, seq)) or is_note(item)
    send(robot, left, acked, scratch)


def send(robot, left, acked, scratch):
    """The gateway, which has what it acknowledged, refuses nothing of the rest."""
    log = Log(scratch, files=Unsynced())
    ingest = Ingest(log)
    for boot, items in left.items():
        ingest.admit("r1", boot, SPEC)
        before = robot.taken[boot]
        for seq, item in [*((s, before[s]) for s in range(1, acked.get(boot, 0) + 1)), *items.items()]:
            ingest.offer("r1", {"boot_id": boot, "seq": seq, "spec_hash": SPEC.hash, "tables": dict(item.tables)}, item.payload)
    ingest.commit()
    log.close()
    shutil.rmtree(scratch)


def run_robot(folder, rng):
    """A robot that was killed some times, on a recorded disk."""
    folder.mkdir()
    disk = RecordedDisk(folder)
    robot = Robot(disk, folder / "robot" / "spool", rng)
    for _ in range(rng.randrange(2, 5)):
        with killed(disk, rng, 150):
            robot.run()
        robot.stop()
    return robot


def go_on(spool, disk, robot, facts):
    boot = spool.boot_id
    for frame in range(2):
        robot.items[boot, frame + 1] = item = fragment("r1", boot, 0, frame, [P], opened=frame == 0, spec=SPEC)
        spool.append(SPEC.hash, *item, 0)
    spool.flush()
    facts.append((len(disk.ops), boot, 2))


@pytest.mark.timeout(600)
def test_power_loss_keeps_what_was_flushed(tmp_path, scale):
    """The power goes at any instant, and a second time while the spool is opened again and goes on."""
    for trial in range(2 * scale):
        rng = random.Random(trial)
        robot = run_robot(tmp_path / "run", rng)
        for number in range(CUTS_PER_RUN):
            cut = robot.disk.instant(rng)
            once, twice, facts = tmp_path / "once", tmp_path / "twice", []
            said = f"trial {trial}, {number}: {robot.disk.disk_after(cut, once, rng)}"
            disk = RecordedDisk(once)
            try:
                spool = Spool(once / "robot" / "spool", max_bytes=BIG, files=disk)
                check(robot, spool, cut, tmp_path / "buffer")
                go_on(spool, disk, robot, facts)
                spool._lock.release()
                second = disk.instant(rng)
                said += f"; again {disk.disk_after(second, twice, rng)}"
                flushed = [(cut, boot, seq) for when, boot, seq in facts if when <= second]
                spool = Spool(twice / "robot" / "spool", max_bytes=BIG, files=Unsynced())
                check(robot, spool, cut, tmp_path / "buffer", flushed)
                spool.close()
            except BaseException as error:
                error.add_note(said)
                raise
            disk.restart()
            shutil.rmtree(once)
            shutil.rmtree(twice)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.timeout(120)
def test_power_loss_while_what_an_earlier_start_left_is_dropped(tmp_path, scale):
    """Its numbers stay: each is whole or a note."""
    rng, root = random.Random(7), tmp_path / "run"
    root.mkdir()
    robot = Robot(RecordedDisk(root), root / "robot" / "spool", rng)
    for _ in range(2):
        NotedSpool(robot)
        robot.spool._max_bytes = 14_000 if robot.items else BIG
        robot.episode = robot.frame = 0
        for _ in range(8):
            robot._append()
        robot._flush()
        robot.stop()
        robot.disk.restart()
    assert robot.dropped
    for number in range(60 * scale):
        cut, once = robot.disk.instant(rng), tmp_path / "once"
        said = f"{number}: {robot.disk.disk_after(cut, once, rng)}"
        try:
            spool = Spool(once / "robot" / "spool", max_bytes=BIG, files=Unsynced())
            check(robot, spool, cut, tmp_path / "buffer")
            spool.close()
        except BaseException as error:
            error.add_note(said)
            raise
        shutil.rmtree(once)
