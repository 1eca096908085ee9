import collections
import errno
import functools
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from buffer.retention import Limits, Upkeep
from buffer.segment import list_segments, read_state_file
from fleet.errors import DiskFull, FragmentRefused, RunFolderError, StorageError
from fleet.files import Files
from fleet.robot import Source
from tests.buffer.fragments import make_spec, message
from tests.faults import log_writer
from tests.faults.disk_model import Unsynced
from tests.faults.forked import Forked

SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))
P, B = Source.POLICY, "b" * 16
KEY = ("r1", "b1")


def fill(log, first, last, size=1000):
    for seq in range(first, last + 1):
        log.append("r1", "b1", seq, "h", {"steps": 64}, bytes([seq % 251]) * size)


def seqs(folder):
    return [r.seq for r in LogReader(folder).poll()]


def kill_open(log):
    """What a kill -9 leaves: nothing is sealed, the lock is gone."""
    log._lock.release()


def start_writer(folder):
    return subprocess.Popen([sys.executable, "-m", "tests.faults.log_writer", str(folder)], stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(300)
def test_kill_at_random_instants_loses_and_doubles_nothing(tmp_path):
    """A reader follows all the while, over every kill and restart."""
    rng, acked, reader, seen = random.Random(1), collections.Counter(), LogReader(tmp_path), []
    for seq in range(1, 200):
        log_writer.fragment_of("r1", seq)  # what is made here need not be made in each of the copies
    for _ in range(20 * SCALE):
        process = Forked(functools.partial(log_writer.work, tmp_path))
        if rng.random() < 0.8:  # else it is killed while it opens the log
            _, r1, r2 = process.said.readline().split()
            assert int(r1) >= acked["r1"] and int(r2) >= acked["r2"], "an acknowledged fragment was forgotten"
        lines = [process.said.readline().split() for _ in range(rng.choice([0, 0, 1, 10]))]
        time.sleep(rng.uniform(0, rng.choice([0.003, 0.05])))
        seen += keys_of(reader)
        for kind, *facts in lines + process.kill():
            if kind == "ack":
                acked[facts[0]] = max(acked[facts[0]], int(facts[1]))
    log = Log(tmp_path)
    marks = {robot: log.high_water(robot, B) for robot in ("r1", "r2")}
    log.close()
    seen += keys_of(reader)
    for followed in (seen, keys_of(LogReader(tmp_path))):
        for robot in ("r1", "r2"):
            assert [seq for name, seq in followed if name == robot] == list(range(1, marks[robot] + 1)), "each once, in order"
            assert marks[robot] >= acked[robot] > 0
    assert not reader.damaged and len(list_segments(tmp_path)) >= 10


def keys_of(reader):
    return [(record.robot_id, record.seq) for record in reader.poll()]


def test_a_second_writer_process_is_refused(tmp_path):
    process = start_writer(tmp_path)
    try:
        assert process.stdout.readline().startswith("ready")
        with pytest.raises(RunFolderError, match=f"process {process.pid}"):
            Log(tmp_path)
    finally:
        process.kill()
        process.communicate()
    Log(tmp_path).close()


def test_every_length_of_a_torn_tail_opens(tmp_path):
    whole = tmp_path / "whole"
    log = Log(whole, segment_bytes=3000)
    fill(log, 1, 2, size=200)
    log.commit()
    first_tail = log._active.written
    fill(log, 3, 4, size=100)
    log._active._files.fsync(log._active._fds[0])
    end = log._active.written
    ends = {}
    kill_open(log)
    (name,) = list_segments(whole)
    for cut in range(first_tail, end + 1):
        folder = tmp_path / "cut"
        shutil.copytree(whole, folder)
        os.truncate(folder / name.path.name, cut)
        log = Log(folder, files=Unsynced(), segment_bytes=3000)
        ends[cut] = log.high_water(*KEY)
        log.append("r1", "b1", ends[cut] + 1, "h", {"steps": 64}, b"new")
        log.commit()
        log.close()
        assert seqs(folder) == list(range(1, ends[cut] + 2)), cut
        shutil.rmtree(folder)
    assert set(ends.values()) == {2, 3, 4} and ends[first_tail] == 2 and ends[end] == 4
    assert list(ends.values()) == sorted(ends.values())


def test_a_flipped_bit_costs_one_record_and_is_counted(tmp_path):
    log = Log(tmp_path / "whole", segment_bytes=50_000)
    for seq in range(1, 11):
        fill(log, seq, seq)
        log.commit()
    kill_open(log)
    records = LogReader(tmp_path / "whole").poll()
    rng = random.Random(2)
    for trial in range(40 * SCALE):
        folder = tmp_path / f"t{trial}"
        shutil.copytree(tmp_path / "whole", folder)
        victim = rng.choice(records)
        at = victim.payload_at + rng.randrange(-60, victim.payload_length)
        (name,) = list_segments(folder)
        with name.path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        log = Log(folder)
        kill_open(log)
        reader = LogReader(folder)
        left = [r.seq for r in reader.poll()]
        damaged = len(reader.damaged)
        assert damaged <= 1 and left == [s for s in range(1, 11) if s != victim.seq or not damaged]
        assert [len(r.damaged) for r in log.recovered] == [damaged]
        if at >= victim.payload_at:
            assert damaged == 1
        assert log.high_water(*KEY) >= 9


class BadDisk(Files):
    """Fails on demand: ``fsync_error`` once for files, ``room`` bytes that still fit."""

    def __init__(self):
        self.fsync_error, self.room = None, 1 << 40
        self.fsyncs = collections.Counter()

    def fsync(self, fd):
        self.fsyncs[os.readlink(f"/proc/self/fd/{fd}")] += 1
        if self.fsync_error:
            number, self.fsync_error = self.fsync_error, None
            raise OSError(number, os.strerror(number))
        super().fsync(fd)

    def write(self, fd, buffers):
        data = b"".join(bytes(b) for b in buffers)
        taken, self.room = data[: self.room], max(self.room - len(data), 0)
        super().write(fd, [taken])
        if len(taken) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, StorageError), (errno.ENOSPC, DiskFull)])
def test_after_an_fsync_error_nothing_is_acknowledged_and_the_segment_is_abandoned(tmp_path, number, error):
    disk = BadDisk()
    log = Log(tmp_path, files=disk)
    fill(log, 1, 2)
    log.commit()
    fill(log, 3, 5)
    disk.fsync_error = number
    with pytest.raises(error, match="fsync"):
        log.commit()
    assert log.high_water(*KEY) == 2 and log.last(*KEY).seq == 2 and log.commit() == []
    (abandoned,) = list_segments(tmp_path)
    count = disk.fsyncs[str(abandoned.path)]
    assert seqs(tmp_path) == [1, 2] and read_state_file(abandoned.state_path).sealed
    fill(log, 3, 4)
    assert log.commit() == [("r1", "b1", 4)] and seqs(tmp_path) == [1, 2, 3, 4]
    assert disk.fsyncs[str(abandoned.path)] == count, "an abandoned segment is never fsynced again"
    kill_open(log)
    abandoned.state_path.unlink()
    assert Log(tmp_path).high_water(*KEY) == 4 and seqs(tmp_path) == [1, 2, 3, 4], "also when its state is lost"


def test_ingest_starts_again_from_the_high_water_mark_after_an_fsync_error(tmp_path):
    disk = BadDisk()
    ingest = Ingest(Log(tmp_path, files=disk))
    ingest.admit("r1", B, make_spec())
    ingest.offer("r1", *message("r1", B, 1, 0, 0, [P]))
    ingest.commit()
    ingest.offer("r1", *message("r1", B, 2, 0, 1, [P]))
    disk.fsync_error = errno.EIO
    with pytest.raises(StorageError):
        ingest.commit()
    with pytest.raises(FragmentRefused, match="gapless"):
        ingest.offer("r1", *message("r1", B, 3, 0, 2, [P]))
    assert ingest.admit("r1", B, make_spec()) == 1
    ingest.offer("r1", *message("r1", B, 2, 0, 1, [P]))
    assert ingest.commit() == [("r1", B, 2)] and seqs(tmp_path) == [1, 2]
    assert ingest.stats.fragments == 2


@pytest.mark.parametrize("room", [0, 1, 100, 1200])
def test_no_room_in_the_middle_of_a_record(tmp_path, room):
    disk = BadDisk()
    log = Log(tmp_path, files=disk)
    fill(log, 1, 2)
    disk.room = room
    with pytest.raises(DiskFull):
        fill(log, 3, 10)
    appended = log.last(*KEY).seq
    assert log.commit() == [("r1", "b1", appended)], "what was appended before is not affected"
    with pytest.raises(DiskFull):
        fill(log, appended + 1, appended + 1)
    assert len(list_segments(tmp_path)) == 1, "nothing of a segment that could not be made is left"
    disk.room = 1 << 40
    fill(log, appended + 1, 10)
    assert log.commit() == [("r1", "b1", 10)] and seqs(tmp_path) == list(range(1, 11))
    kill_open(log)
    assert Log(tmp_path).high_water(*KEY) == 10


def test_a_real_full_disk(tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)], check=False).returncode
    ):
        pytest.skip("needs root and tmpfs; test_no_room_in_the_middle_of_a_record covers it through the seam")
    try:
        ballast = mounted / "ballast"
        ballast.write_bytes(bytes(200_000))
        log, acked, full = Log(mounted / "log"), 0, 0
        for seq in range(1, 60):
            try:
                fill(log, seq, seq, size=10_000)
            except DiskFull:
                full += 1
                break
            acked = log.commit()[0][2]
        assert full and acked == log.high_water(*KEY) > 5
        ballast.unlink()
        fill(log, acked + 1, acked + 5, size=10_000)
        assert log.commit() == [("r1", "b1", acked + 5)]
        log.close()
        reader = LogReader(mounted / "log")
        assert [r.seq for r in reader.poll()] == list(range(1, acked + 6)) and not reader.damaged
        reader.close()
        del reader
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def work_with_retention(folder, say):
    """Ingests, and gives up all but the newest, in which nobody can have acted but the policy; unlinks at once."""
    files = Files()
    log = Log(folder, segment_bytes=100_000)
    seq = log.high_water("r1", "b1")
    say("ready")
    while True:
        for _ in range(20):
            seq += 1
            source = Source.DEMO if seq // 5 % 4 == 0 else P
            steps = [int(source == each) for each in Source]
            log.append("r1", "b1", seq, "h", {"steps": 2048}, seq.to_bytes(4, "little") * 512, episode=seq // 5, steps=steps)
        log.commit()
        upkeep = Upkeep(files, folder)
        upkeep.sync(time.time_ns())
        say(f"retired {len(upkeep.retire(Limits(max_bytes=400_000), time.time_ns()))}")
        upkeep.sweep(0, time.time_ns())


@pytest.mark.timeout(120)
def test_readers_during_retention_neither_crash_nor_see_a_key_twice(tmp_path):
    """Records that a reader holds stay readable although their files are gone."""
    followers, held, num_retired = [(LogReader(tmp_path), limit, []) for limit in (None, 7, 40)], [], 0
    for _ in range(3 * SCALE):
        process = Forked(functools.partial(work_with_retention, tmp_path))
        assert process.said.readline() == "ready\n"
        for _ in range(10):
            num_retired += int(process.said.readline().split()[1])
            for reader, limit, seen in followers:
                records = reader.poll(limit)
                seen += [record.seq for record in records]
                held = [*held[-500:], *records]
            assert all(is_whole(record) for record in held)
        process.kill()
        late = [record.seq for record in LogReader(tmp_path).poll()]
        assert len(late) == len(set(late)) and late == sorted(late)
    assert num_retired > 10
    kept = [record.seq for record in LogReader(tmp_path).poll()]
    assert {seq for seq in range(1, kept[-1] + 1) if seq // 5 % 4 == 0} <= set(kept), "demonstrations are kept"
    assert len(kept) < kept[-1]
    for reader, _, seen in followers:
        seen += [record.seq for record in reader.poll()]
        assert len(seen) == len(set(seen)) and seen == sorted(seen) and seen[-1] == kept[-1] and not reader.damaged
        assert set(seen) >= set(kept)


def is_whole(record):
    return bytes(record.payload) == record.seq.to_bytes(4, "little") * 512
