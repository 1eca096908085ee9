import errno
import logging
import threading
import time

import pytest

from buffer.keeper import Keeper
from buffer.log import Log
from buffer.manifest import live_segments, load_manifest
from buffer.reader import LogReader
from buffer.retention import Limits
from buffer.segment import list_segments
from fleet.files import Files
from fleet.journal import Journal, read_journal
from fleet.metrics import GATEWAY, Metrics
from fleet.robot import Source
from tests.buffer import runs
from tests.buffer.fragments import fragment, make_spec

P, O = Source.POLICY, Source.OPERATOR  # noqa: E741


def fill(log, first, last, source=P, spec=None):
    spec = spec or make_spec(extra=8_000)
    log.add_spec(spec)
    for seq in range(first, last + 1):
        directory, payload = fragment("r1", "b1", seq, 0, [source], spec=spec)
        steps = [int(source == s) for s in Source]
        log.append("r1", "b1", seq, spec.hash, directory, payload, episode=seq, steps=steps)
        log.commit()


def seqs(folder):
    return [r.seq for r in LogReader(folder).poll()]


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "log", segment_bytes=200_000)
    yield log
    log.close()


def test_a_round_enters_indexes_retires_and_after_the_grace_unlinks(tmp_path, log):
    folder, metrics = tmp_path / "log", Metrics(GATEWAY)
    journal = Journal(tmp_path / "gateway.jsonl")
    fill(log, 1, 20)
    fill(log, 21, 21, O)
    fill(log, 22, 60)
    keeper = Keeper(folder, Limits(), grace_s=0, journal=journal, metrics=metrics)
    keeper.round()
    sealed = live_segments(folder)[:-1]
    assert [e.file for e in load_manifest(folder).segments] == [n.path.name for n in sealed] and len(sealed) > 3
    assert all(name.index_path.exists() for name in sealed) and not live_segments(folder)[-1].index_path.exists()
    assert seqs(folder) == list(range(1, 61))
    keeper = Keeper(folder, Limits(max_age_ns=1), grace_s=0, journal=journal, metrics=metrics)
    keeper.round()
    assert seqs(folder)[0] == 21 and seqs(folder)[1:] == list(range(seqs(folder)[1], 61))
    assert list_segments(folder) == live_segments(folder) and len(live_segments(folder)) == 2
    assert len(list(folder.glob("*.index"))) <= 1
    keeper.round()
    assert [n.index_path.exists() for n in live_segments(folder)] == [True, False], "what was compacted is indexed too"
    lines = [line for line in read_journal(tmp_path / "gateway.jsonl") if line["kind"] == "retired"]
    assert {(line["action"], line["why"]) for line in lines} == {("drop", "age"), ("compact", "age")}
    assert metrics.registry.get_sample_value("fleet_buffer_stored_bytes") > 0 and keeper.num_errors == 0
    assert metrics.registry.get_sample_value("fleet_disk_free_bytes") > 0


@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_a_sidecar_that_is_lost_or_damaged_is_made_anew(tmp_path, log, damage):
    folder = tmp_path / "log"
    fill(log, 1, 40)
    Keeper(folder, Limits()).round()
    victim = live_segments(folder)[0].index_path
    before = victim.read_bytes()
    if damage == "lost":
        victim.unlink()
    else:
        victim.write_bytes(before[: len(before) // 2] + b"\0" * (len(before) - len(before) // 2))
    Keeper(folder, Limits()).round()
    assert victim.read_bytes() == before


def test_what_a_killed_process_left_half_done_is_tidied_up_once(tmp_path, log):
    folder = tmp_path / "log"
    fill(log, 1, 20)
    strays = ["00000001-aaaaaaaaaaaaaaaa.partial", "manifest.json.partial", "00000009-00aa00aa00aa00aa.state", "x.index"]
    for name in strays:
        (folder / name).write_bytes(b"half")
    Keeper(folder, Limits()).round()
    assert not any((folder / name).exists() for name in strays) and seqs(folder) == list(range(1, 21))


class BadFiles(Files):
    """Fails to replace files; says how much room there is."""

    def __init__(self):
        self.free, self.error = 10**12, OSError(5, "Input/output error")

    def replace(self, source, target):
        if self.error is not None:
            raise self.error
        super().replace(source, target)

    def free_bytes(self, folder):
        return self.free


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ZeroDivisionError("a defect")])
def test_errors_are_counted_and_said_once_and_the_next_round_goes_on(tmp_path, log, caplog, error):
    folder, files, metrics = tmp_path / "log", BadFiles(), Metrics(GATEWAY)
    fill(log, 1, 20)
    files.error = error
    keeper = Keeper(folder, Limits(), files=files, metrics=metrics)
    for _ in range(3):
        keeper.round()
    assert keeper.num_errors == metrics.registry.get_sample_value("fleet_keeper_errors_total") >= 3
    assert sum("keeper, enter" in r.message for r in caplog.records) == 1
    fill(log, 21, 40)
    files.error = None
    keeper.round()
    errors = keeper.num_errors
    keeper.round()
    assert keeper.num_errors == errors and load_manifest(folder).segments and seqs(folder) == list(range(1, 41))


def test_a_disk_that_is_nearly_full_is_warned_of_when_it_begins_and_when_it_ends(tmp_path, log, caplog):
    caplog.set_level(logging.WARNING)
    files, journal = BadFiles(), Journal(tmp_path / "gateway.jsonl")
    files.error = None
    keeper = Keeper(tmp_path / "log", Limits(), warn_free_bytes=10**9, files=files, journal=journal)
    for files.free in (10**10, 10**8, 10**8, 10**10):
        keeper.round()
    assert [line["low"] for line in read_journal(tmp_path / "gateway.jsonl") if line["kind"] == "disk"] == [True, False]
    assert ["no longer" in r.message for r in caplog.records if "nearly full" in r.message] == [False, True]


def test_protected_data_beyond_the_limit_is_said(tmp_path, log, caplog):
    fill(log, 1, 40, O)
    keeper = Keeper(tmp_path / "log", Limits(max_bytes=100_000))
    for _ in range(3):
        keeper.round()
    assert sum("protected" in r.message for r in caplog.records) == 1 and seqs(tmp_path / "log") == list(range(1, 41))


def test_the_thread_works_beside_a_writer_and_readers_and_ends(tmp_path, log):
    folder, spec = tmp_path / "log", make_spec(extra=8_000)
    keeper = Keeper(folder, Limits(max_bytes=500_000), grace_s=0.02, interval_s=0.005)
    keeper.start()
    follower, held, seq, end_s = LogReader(folder, replacements=True), {}, 0, time.monotonic() + 1.5
    while time.monotonic() < end_s:
        fill(log, seq + 1, seq + 3, O if seq % 60 == 0 else P, spec)
        seq += 3
        records = follower.poll()
        for number in follower.take_retired():
            held.pop(number)
        for record in records:
            held.setdefault(record.segment.number, []).append(record.seq)
        time.sleep(0.001)
    keeper.close()
    records = follower.poll()
    for number in follower.take_retired():
        held.pop(number)
    for record in records:
        held.setdefault(record.segment.number, []).append(record.seq)
    left = seqs(folder)
    assert sorted(s for part in held.values() for s in part) == left and left[-1] == seq == log.high_water("r1", "b1")
    operator = [s for first in range(1, seq, 3) if (first - 1) % 60 == 0 for s in range(first, first + 3)]
    assert set(operator) <= set(left) and len(left) < seq and keeper.num_errors == 0
    assert not any(t.name == "keeper" and t.is_alive() for t in threading.enumerate())


def test_a_sidecar_for_which_there_was_no_room_is_made_later(tmp_path):
    class Full(Files):
        full = True

        def write_atomic(self, path, data):
            if path.suffix == ".index" and self.full:
                raise OSError(errno.ENOSPC, "no space")
            super().write_atomic(path, data)

    runs.fill(tmp_path)
    files = Full()
    keeper = Keeper(tmp_path, Limits(), files=files)
    for files.full in (True, True, False):
        keeper.round()
    assert all(name.index_path.exists() for name in live_segments(tmp_path)) and keeper.num_errors == 2
