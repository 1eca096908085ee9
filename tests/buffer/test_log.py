import os
import time

import numpy as np
import pytest

from buffer.log import Log
from buffer.reader import LogReader
from buffer.segment import list_segments, read_state_file
from fleet.errors import DiskFull, RunFolderError, SpecError
from fleet.files import Files
from tests.buffer.fragments import make_spec

TABLES = {"steps": 64}


def fill(log, first, last, robot="r1", boot="b1", size=1000):
    for seq in range(first, last + 1):
        log.append(robot, boot, seq, "h", TABLES, bytes([seq % 251]) * size, (seq, "note"))


def keys(records):
    return [(r.robot_id, r.boot_id, r.seq) for r in records]


def test_only_committed_fragments_are_seen_and_each_once(tmp_path):
    log, reader = Log(tmp_path), LogReader(tmp_path)
    assert reader.poll() == []
    fill(log, 1, 3)
    assert reader.poll() == [] and log.high_water("r1", "b1") == 0 and log.last("r1", "b1").seq == 3
    assert log.commit() == [("r1", "b1", 3)] and log.commit() == []
    records = reader.poll()
    assert keys(records) == [("r1", "b1", seq) for seq in (1, 2, 3)] and reader.poll() == []
    assert [bytes(r.payload) for r in records] == [bytes([seq]) * 1000 for seq in (1, 2, 3)]
    assert all(r.payload.address % 64 == 0 for r in records)


def test_a_reader_follows_over_many_segments_and_a_restart(tmp_path):
    reader, seen, seq = LogReader(tmp_path), [], 0
    for _ in range(3):
        log = Log(tmp_path, segment_bytes=150_000)
        assert log.high_water("r1", "b1") == seq
        for _ in range(20):
            fill(log, seq + 1, seq + 2, size=9_000)
            seq += 2
            log.commit()
            seen += reader.poll(limit=1)
        log.close()
    seen += reader.poll()
    assert keys(seen) == [("r1", "b1", n) for n in range(1, seq + 1)]
    assert [bytes(r.payload[:1])[0] for r in seen] == [n % 251 for n in range(1, seq + 1)], "maps of ended segments stay valid"
    assert len(list_segments(tmp_path)) > 5 and reader.num_records == seq


def test_a_segment_made_within_one_tick_of_the_file_systems_clock_is_found(tmp_path):
    log, reader = Log(tmp_path), LogReader(tmp_path)
    fill(log, 1, 1)
    log.commit()
    log.close()
    assert len(reader.poll()) == 1
    changed = tmp_path.stat()
    log = Log(tmp_path)
    fill(log, 2, 2)
    log.commit()
    os.utime(tmp_path, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    assert [r.seq for r in reader.poll()] == [2]


def test_marks_and_notes_outlive_the_segments_they_came_from(tmp_path):
    log = Log(tmp_path, segment_bytes=150_000)
    fill(log, 1, 5, robot="old")
    for seq in range(1, 60):
        fill(log, seq, seq, robot="busy", size=9_000)
        log.commit()
    log.close()
    for name in list_segments(tmp_path)[:-1]:
        name.path.unlink()
        name.state_path.unlink()
    log = Log(tmp_path)
    assert log.high_water("old", "b1") == 5 and log.last("old", "b1").note == (5, "note")
    assert log.high_water("busy", "b1") == 59


def test_a_large_fragment_gets_a_segment_that_holds_it(tmp_path):
    log = Log(tmp_path, segment_bytes=1000)
    fill(log, 1, 2, size=500_000)
    log.commit()
    assert [len(r.payload) for r in LogReader(tmp_path).poll()] == [500_000, 500_000]


def test_close_gives_up_what_was_not_committed(tmp_path):
    log = Log(tmp_path)
    fill(log, 1, 1)
    log.commit()
    fill(log, 2, 2)
    log.close()
    log = Log(tmp_path)
    assert log.high_water("r1", "b1") == 1 and keys(LogReader(tmp_path).poll()) == [("r1", "b1", 1)]


def test_a_second_writer_in_the_same_process_is_refused_until_the_first_closes(tmp_path):
    log = Log(tmp_path)
    with pytest.raises(RunFolderError, match="in use by process"):
        Log(tmp_path)
    log.close()
    Log(tmp_path).close()


def test_an_empty_start_leaves_no_segment(tmp_path):
    Log(tmp_path).close()
    assert list_segments(tmp_path) == []


def test_specs_are_kept_and_a_damaged_one_is_named(tmp_path):
    log, spec = Log(tmp_path), make_spec()
    log.add_spec(spec)
    log.close()
    log = Log(tmp_path)
    assert log.spec(spec.hash) == spec and log.spec("0" * 16) is None and log.spec("../specs/" + spec.hash) is None
    log.close()
    path = tmp_path / "specs" / f"{spec.hash}.json"
    path.write_bytes(path.read_bytes().replace(b"50.0", b"51.0"))
    with pytest.raises(SpecError, match="hash"):
        Log(tmp_path).spec(spec.hash)


def test_a_lost_state_file_is_rebuilt_from_the_segment(tmp_path):
    log = Log(tmp_path)
    fill(log, 1, 4)
    log.commit()
    log.close()
    (name,) = list_segments(tmp_path)
    before = read_state_file(name.state_path)
    name.state_path.write_bytes(b"garbage" * 10)
    log = Log(tmp_path)
    assert log.high_water("r1", "b1") == 4 and read_state_file(name.state_path) == before
    assert len(log.recovered) == 1 and log.recovered[0].num_fragments == 4


def test_a_reader_goes_on_when_a_lost_state_file_is_made_anew(tmp_path):
    log, reader = Log(tmp_path), LogReader(tmp_path)
    fill(log, 1, 2)
    log.commit()
    assert len(reader.poll()) == 2
    (name,) = list_segments(tmp_path)
    name.state_path.unlink()
    fill(log, 3, 4)
    log.commit()
    log._lock.release()  # as if this process were killed
    log = Log(tmp_path)
    assert [record.seq for record in reader.poll()] == [3, 4]
    fill(log, 5, 6)
    log.commit()
    assert [record.seq for record in reader.poll()] == [5, 6]
    log.close()
    reader.close()


def test_a_damaged_header_of_the_newest_segment_forgets_nothing(tmp_path):
    log = Log(tmp_path, segment_bytes=150_000)
    fill(log, 1, 1, robot="old")
    for seq in range(1, 41):
        fill(log, seq, seq, size=9_000)
        log.commit()
    log.close()
    newest = list_segments(tmp_path)[-1]
    with newest.path.open("r+b") as file:
        file.write(b"\0" * 8)
    log = Log(tmp_path)
    assert log.high_water("r1", "b1") == 40 and log.high_water("old", "b1") == 1


def test_opening_after_a_kill_scans_only_what_was_not_sealed(tmp_path, monkeypatch):
    import buffer.segment as segment

    log = Log(tmp_path, segment_bytes=150_000)
    for seq in range(1, 101):
        fill(log, seq, seq, size=9_000)
        log.commit()
    log._lock.release()  # what a kill -9 leaves
    scanned, real = [], segment.scan
    monkeypatch.setattr(segment, "scan", lambda data, *rest, **more: scanned.append(len(data)) or real(data, *rest, **more))
    again = Log(tmp_path)
    assert again.high_water("r1", "b1") == 100 and len(again.recovered) == 1
    assert len(list_segments(tmp_path)) > 8 and len(scanned) == 2, "the unsealed one to find its end, then for its marks"


class Disk(Files):
    """Says how much room there is, and counts how often it was asked."""

    def __init__(self, free):
        self.free, self.asked = free, 0

    def free_bytes(self, folder):
        self.asked += 1
        return self.free


def test_what_would_leave_too_little_room_is_refused_before_it_is_written_until_there_is_room(tmp_path):
    disk = Disk(10**9 + 10**6)
    log = Log(tmp_path, files=disk, min_free_bytes=10**9)
    fill(log, 1, 3)
    assert log.commit() == [("r1", "b1", 3)]
    fill(log, 4, 4)
    with pytest.raises(DiskFull, match=r"1\.00 GB are free.*min_free_gb"):
        fill(log, 5, 5, size=2_000_000)
    (name,) = list_segments(tmp_path)
    assert log.commit() == [("r1", "b1", 4)], "earlier fragments of the group are not affected"
    disk.free = 10**8
    with pytest.raises(DiskFull):
        fill(log, 5, 5, size=950_000)
    assert log.last("r1", "b1").seq == 4 and log.commit() == []
    disk.free = 10**10
    fill(log, 5, 5, size=2_000_000)
    assert log.commit() == [("r1", "b1", 5)]
    assert keys(LogReader(tmp_path).poll())[-1] == ("r1", "b1", 5) and list_segments(tmp_path) == [name]


def test_the_disk_is_asked_once_a_second_or_each_64_mib(tmp_path):
    disk, started = Disk(10**12), time.monotonic()
    log = Log(tmp_path, files=disk, min_free_bytes=10**9)
    fill(log, 1, 200, size=100)
    for seq in range(201, 281):
        fill(log, seq, seq, size=10**6)
    assert 2 <= disk.asked <= 2 + (time.monotonic() - started)


def test_append_does_not_depend_on_what_is_stored(tmp_path):
    log = Log(tmp_path)
    written = []
    for seq in range(1, 2001):
        fill(log, seq, seq, size=64)
        written.append(log._active.written)
    assert len(set(np.diff(written[100:120]))) == 1 and max(np.diff(written)) <= 320
