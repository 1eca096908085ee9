"""What retention takes and what it leaves, and that a kill at any instant of it loses and doubles nothing."""

import os
import shutil
import time

import pytest

from buffer.compaction import compact
from buffer.log import Log
from buffer.manifest import Entry, Manifest, facts_of, live_segments, load_manifest
from buffer.reader import LogReader
from buffer.retention import COMPACT, DROP, Limits, Upkeep, plan, prune
from buffer.segment import list_segments, read_header, read_state_file
from fleet.errors import DiskFull, RunFolderError
from fleet.files import Files
from fleet.robot import Source

POLICY, OPERATOR, DEMO = (1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 2)
HOUR_NS = 3600 * 10**9
LATER = Limits(max_age_ns=1)  # everything is too old


def append(log, seq, episode, steps=POLICY, robot="r1", tables=None, size=9_000):
    payload = bytes([seq % 251]) * size
    log.append(robot, "b1", seq, "h", tables or {"steps": 64}, payload, (episode, seq), episode=episode, steps=steps)


def make_log(folder, *, protected=(3, 7), num_episodes=12, fragments=4):
    """Several segments; of the episodes 0, 1, ... the ``protected`` ones have an operator's step in their third fragment."""
    log, seq = Log(folder, segment_bytes=200_000), 0
    for episode in range(num_episodes):
        for i in range(fragments):
            seq += 1
            append(log, seq, episode, OPERATOR if episode in protected and i == 2 else POLICY)
            log.commit()
    return log


def keys(folder):
    reader = LogReader(folder)
    found = [(r.robot_id, r.seq) for r in reader.poll()]
    assert not reader.damaged
    reader.close()
    return found


def episodes_kept(found, fragments=4):
    return sorted({(seq - 1) // fragments for _, seq in found})


def entry(number, length=100, age_h=0.0, now_ns=0, by_source=None, **more):
    facts = {
        "num_labels": 0,
        "num_damaged": 0,
        "has_marks": True,
        "first_recv_ns": 0,
        "last_recv_ns": now_ns - int(age_h * HOUR_NS),
    }
    by_source = by_source or {"policy": 10}
    counts = {"generation": 0, "num_fragments": 5, "num_steps": sum(by_source.values()), "by_source": by_source}
    return Entry(number=number, file=f"{number:08d}", length=length, **{**facts, **counts, **more})


def test_the_plan_takes_the_oldest_first_and_no_more_than_it_must():
    now = 10**18
    entries = [entry(n, age_h=10 - n, now_ns=now) for n in range(1, 6)]
    assert plan(entries, Limits(), now, 10**9) == []
    assert [(a.kind, a.entry.number, a.why) for a in plan(entries, Limits(max_bytes=350), now, 500)] == [
        (DROP, 1, "bytes"),
        (DROP, 2, "bytes"),
    ]
    assert [(a.entry.number, a.why) for a in plan(entries, Limits(max_age_ns=7 * HOUR_NS + 1), now, 500)] == [
        (1, "age"),
        (2, "age"),
    ]
    assert plan(entries, Limits(max_bytes=500), now, 500) == []


def test_the_plan_compacts_what_holds_something_protected_and_leaves_the_damaged_and_the_finished():
    now = 10**18
    mixed = entry(1, by_source={"policy": 6, "operator": 4}, now_ns=now)
    damaged, done = entry(2, num_damaged=1, now_ns=now), entry(3, kept_for=("demo", "operator"), now_ns=now)
    labels, plain = entry(4, num_labels=1, now_ns=now), entry(5, now_ns=now)
    actions = plan([mixed, damaged, done, labels, plain], Limits(max_bytes=1), now, 500)
    assert [(a.kind, a.entry.number, a.frees) for a in actions] == [(COMPACT, 1, 60), (COMPACT, 4, 100), (DROP, 5, 100)]
    assert [a.kind for a in plan([mixed], Limits(max_bytes=1, protect=("demo",)), now, 500)] == [DROP]


def test_whole_episodes_with_a_protected_step_are_kept_across_segments_and_all_others_go(tmp_path):
    log = make_log(tmp_path, num_episodes=16)
    before, upkeep = keys(tmp_path), Upkeep(Files(), tmp_path)
    upkeep.sync(time.time_ns())
    assert len(upkeep.manifest.segments) >= 3
    parts = [(b.first_seq, b.last_seq) for e in upkeep.manifest.segments for b in e.boots]
    assert any(first <= 14 <= last for first, last in parts) and not any(first <= 13 <= 15 <= last for first, last in parts), (
        "episode 3 begins in one segment and its operator comes in the next"
    )
    done = upkeep.retire(LATER, time.time_ns())
    assert {a.kind for a in done} == {DROP, COMPACT}
    after = keys(tmp_path)
    untouched = {n.number for n in live_segments(tmp_path)} - {e.number for e in upkeep.manifest.segments}
    newest = facts_of(live_segments(tmp_path)[-1], 10**9)
    kept = {("r1", seq) for seq in range(1, 65) if (seq - 1) // 4 in (3, 7) or seq >= newest.boots[0].first_seq}
    assert after == sorted(kept) and set(after) < set(before) and len(untouched) == 1
    assert upkeep.retire(LATER, time.time_ns()) == [], "what is left is left"
    assert log.high_water("r1", "b1") == 64
    append(log, 65, 16)
    log.commit()
    assert keys(tmp_path) == [*after, ("r1", 65)]
    log.close()


def test_an_episode_is_kept_whose_operator_came_in_the_segment_that_is_being_written(tmp_path):
    log = make_log(tmp_path, protected=(), num_episodes=3)
    append(log, 13, 3)
    append(log, 14, 3)
    log.commit()
    append(log, 15, 3)
    append(log, 16, 3, OPERATOR)
    log.commit()
    upkeep = Upkeep(Files(), tmp_path)
    upkeep.sync(1)
    assert upkeep.manifest.segments[-1].boots[0].last_seq == 14, "the episode goes on in the segment that is not sealed"
    assert [a.kind for a in upkeep.retire(LATER, time.time_ns())] == [COMPACT]
    assert [seq for _, seq in keys(tmp_path)] == [13, 14, 15, 16]
    log.close()


def test_what_is_kept_is_the_same_bytes_and_the_header_has_the_marks_of_the_original(tmp_path):
    make_log(tmp_path).close()
    before = {r.seq: bytes(r.payload) for r in LogReader(tmp_path).poll()}
    headers = {n.number: read_header(n).marks for n in live_segments(tmp_path)}
    upkeep = Upkeep(Files(), tmp_path)
    upkeep.sync(1)
    upkeep.retire(LATER, time.time_ns())
    for name in live_segments(tmp_path):
        assert read_header(name).marks == headers[name.number] and read_state_file(name.state_path).sealed
    assert {r.seq: bytes(r.payload) for r in LogReader(tmp_path).poll()}.items() <= before.items()
    again = [e for e in upkeep.manifest.segments if e.generation]
    assert again and all(e.kept_for == ("demo", "operator") for e in again)
    assert all(e == facts_of(n, e.length) for e, n in zip(upkeep.manifest.segments, live_segments(tmp_path), strict=True))
    # Less is protected now: what was compacted before is given up as well.
    upkeep.retire(Limits(max_age_ns=1, protect=("demo",)), time.time_ns())
    assert [n.number for n in live_segments(tmp_path)] == [max(headers)]


def test_files_are_unlinked_after_the_grace_and_forgotten_after_that(tmp_path):
    make_log(tmp_path).close()
    upkeep, before = Upkeep(Files(), tmp_path), list_segments(tmp_path)
    upkeep.sync(0)
    upkeep.retire(LATER, time.time_ns())
    retired = upkeep.manifest.retired
    upkeep.sweep(10**9, retired[0].retired_ns + 10**8)
    assert set(before) < set(list_segments(tmp_path)) and set(before) & set(live_segments(tmp_path)) == {before[-1]}
    upkeep.sweep(10**9, retired[0].retired_ns + 10**9)
    assert list_segments(tmp_path) == live_segments(tmp_path) and load_manifest(tmp_path).retired == ()
    assert {p.name for p in tmp_path.iterdir() if p.suffix in (".state", ".partial")} == {
        n.state_path.name for n in live_segments(tmp_path)
    }


def test_marks_outlive_all_data(tmp_path):
    log = make_log(tmp_path, protected=())
    append(log, 1, 0, robot="old")
    log.commit()
    log.close()
    assert prune(tmp_path, LATER, dry_run=False)
    assert len(live_segments(tmp_path)) == 1
    for _ in range(3):
        log = Log(tmp_path)
        assert (log.high_water("r1", "b1"), log.high_water("old", "b1"), log.last("r1", "b1").note) == (48, 1, (11, 48))
        log.close()
        assert prune(tmp_path, LATER, dry_run=False) == []


def test_a_segment_before_the_newest_stays_where_the_newest_header_is_damaged(tmp_path):
    make_log(tmp_path, protected=()).close()
    *_, before, newest = live_segments(tmp_path)
    with newest.path.open("r+b") as file:
        file.write(b"\0" * 30)
    prune(tmp_path, LATER, dry_run=False)
    assert live_segments(tmp_path) == [before, newest]
    log = Log(tmp_path)
    assert log.high_water("r1", "b1") == 48, "of its header the one before knows, of its fragments they themselves"
    log.close()


def test_damage_in_what_is_to_be_kept_leaves_the_segment_as_it_is(tmp_path):
    make_log(tmp_path).close()
    victim = next(r for r in LogReader(tmp_path).poll() if r.seq == 15)  # the operator's fragment of episode 3
    with victim.segment.name.path.open("r+b") as file:
        file.seek(victim.payload_at + 100)
        file.write(b"\xff\x00\xff")
    prune(tmp_path, LATER, dry_run=False)
    assert victim.segment.name in live_segments(tmp_path)
    assert {e.number: e for e in load_manifest(tmp_path).segments}[victim.segment.number].num_damaged == 1
    assert prune(tmp_path, LATER, dry_run=False) == []


def test_labels_are_never_given_up(tmp_path):
    log = make_log(tmp_path, protected=(), num_episodes=4)
    append(log, 17, 3, (), tables={"labels": 64}, size=64)
    log.commit()
    for seq in range(18, 60):
        append(log, seq, seq)
        log.commit()
    log.close()
    prune(tmp_path, LATER, dry_run=False)
    assert keys(tmp_path)[0] == ("r1", 17)


def test_prune_says_what_it_would_do_and_is_refused_while_a_writer_is_there(tmp_path):
    log = make_log(tmp_path)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    planned = prune(tmp_path, LATER)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before and planned
    with pytest.raises(RunFolderError, match="in use"):
        prune(tmp_path, LATER, dry_run=False)
    log.close()
    done = prune(tmp_path, LATER, dry_run=False)
    told, real = ({a.entry.number: a for a in actions} for actions in (planned, done))
    assert all(real[number].kind == action.kind and real[number].frees <= action.frees for number, action in told.items())


def test_by_bytes_the_log_ends_up_within_its_limit(tmp_path):
    make_log(tmp_path, protected=(5,)).close()
    total = sum(e.length for e in Upkeep(Files(), tmp_path).manifest.segments) or sum(
        read_state_file(n.state_path).length for n in live_segments(tmp_path)
    )
    prune(tmp_path, Limits(max_bytes=total // 2), dry_run=False)
    left = sum(read_state_file(n.state_path).length for n in live_segments(tmp_path))
    assert total // 5 < left <= total // 2


class Killed(BaseException):
    """The process is killed at this call."""


class KilledAt(Files):
    """Stops before its n-th call that changes something."""

    def __init__(self, calls):
        self.left = calls

    def _call(self):
        if self.left == 0:
            raise Killed
        self.left -= 1


def _counted(name):
    def call(self, *args):
        self._call()
        return getattr(Files, name)(self, *args)

    return call


for _name in ("open_new", "open_existing", "reserve", "write", "write_at", "fsync", "fsync_dir", "replace", "unlink"):
    setattr(KilledAt, _name, _counted(_name))


def test_a_kill_at_any_call_loses_nothing_that_is_kept_and_doubles_nothing(tmp_path):
    make_log(tmp_path / "whole", num_episodes=9).close()
    before = keys(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "done")
    prune(tmp_path / "done", LATER, dry_run=False)
    end, calls = keys(tmp_path / "done"), 0
    assert 0 < len(end) < len(before)
    while True:
        folder = tmp_path / f"cut{calls}"
        shutil.copytree(tmp_path / "whole", folder)
        try:
            prune(folder, LATER, dry_run=False, files=KilledAt(calls))
            break
        except Killed:
            pass
        for lost in (False, True):
            if lost:
                (folder / "manifest.json").unlink(missing_ok=True)
            found = keys(folder)
            assert len(found) == len(set(found)) and set(end) <= set(found) <= set(before) and found == sorted(found), calls
        log = Log(folder)
        assert log.high_water("r1", "b1") == 36 and keys(folder) == found
        append(log, 37, 9)
        log.commit()
        log.close()
        prune(folder, LATER, dry_run=False)
        left = keys(folder)
        assert [k for k in left if k in end] == [k for k in end if k in left] and len(left) == len(set(left)), calls
        protected = {("r1", seq) for seq in range(1, 37) if (seq - 1) // 4 in (3, 7)}
        assert protected <= set(left) and ("r1", 37) in left, calls
        live = live_segments(folder)
        assert list_segments(folder) == live and not list(folder.glob("*.partial"))
        assert len(list(folder.glob("*.state"))) == len(live), calls
        shutil.rmtree(folder)
        calls += 1
    assert calls > 30


class Full(Files):
    """No room for anything new."""

    def write(self, fd, buffers):
        raise OSError(28, "No space left on device")


def test_no_room_for_a_compaction_leaves_the_log_as_it_was(tmp_path):
    make_log(tmp_path).close()
    upkeep = Upkeep(Files(), tmp_path)
    upkeep.sync(1)
    before = sorted(p.name for p in tmp_path.iterdir())
    mixed = next(e for e in upkeep.manifest.segments if "operator" in e.by_source)
    with pytest.raises(DiskFull, match="compacting"):
        compact(Full(), tmp_path, mixed, ("operator",), 1 << Source.OPERATOR, ())
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_reader_that_drops_what_is_retired_has_what_counts_and_another_one_sees_each_once(tmp_path):
    log = make_log(tmp_path)
    follower, once = LogReader(tmp_path, replacements=True), LogReader(tmp_path)
    held: dict[int, list[int]] = {}

    def follow(limit=None):
        records = follower.poll(limit)
        for number in follower.take_retired():
            held.pop(number, None)
        for record in records:
            held.setdefault(record.segment.number, []).append(record.seq)

    seen = []
    follow(7)
    seen += once.poll(7)
    upkeep = Upkeep(Files(), tmp_path)
    for episode in range(12, 24):
        upkeep.sync(1)
        upkeep.retire(LATER, time.time_ns())
        upkeep.sweep(0, time.time_ns())
        follow(3)
        seen += once.poll(3)
        seq = log.high_water("r1", "b1")
        for i in range(1, 5):
            append(log, seq + i, episode, OPERATOR if episode == 15 else POLICY)
            log.commit()
    for _ in range(60):
        follow(5)
        seen += once.poll(5)
    numbers = [r.seq for r in seen]
    assert numbers == sorted(set(numbers)) and {s for s in numbers if (s - 1) // 4 in (3, 7, 15)} == {
        s for s in range(1, 97) if (s - 1) // 4 in (3, 7, 15)
    }
    assert sorted(s for part in held.values() for s in part) == [seq for _, seq in keys(tmp_path)]
    assert all(bytes(r.payload[:1])[0] == r.seq % 251 for r in seen), "files that are gone stay readable"
    log.close()


def test_a_file_that_is_unlinked_after_the_listing_is_read_in_its_place_as_what_is_left_of_it(tmp_path):
    make_log(tmp_path).close()
    once, follower = LogReader(tmp_path), LogReader(tmp_path, replacements=True)
    for reader in (once, follower):
        assert [r.seq for r in reader.poll(3)] == [1, 2, 3]
        os.utime(tmp_path, ns=(1, 1))
        reader.poll(1)  # of a folder that was changed long ago the listing holds
    prune(tmp_path, LATER, dry_run=False)
    os.utime(tmp_path, ns=(1, 1))
    assert [r.seq for r in once.poll()] == [*range(5, 15), 15, 16, *range(29, 33), *range(43, 49)]
    seen = [r.seq for r in follower.poll()]
    assert follower.take_retired() == [] and seen == list(range(5, 15))
    seen = [r.seq for r in follower.poll()]
    assert follower.take_retired() == [1]
    assert seen == [13, 14, 15, 16, *range(29, 33), *range(43, 49)]


def test_a_lost_manifest_brings_back_no_file_that_a_compaction_replaced(tmp_path):
    make_log(tmp_path).close()
    upkeep = Upkeep(Files(), tmp_path)
    upkeep.sync(1)
    upkeep.retire(LATER, time.time_ns())
    compacted = [e.file for e in upkeep.manifest.segments if e.generation]
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes().replace(b"operator", b"overator", 1))):
        damage(tmp_path / "manifest.json")
        assert load_manifest(tmp_path) is None
        assert set(compacted) <= {n.path.name for n in live_segments(tmp_path)}
        again = Upkeep(Files(), tmp_path)
        again.sync(2)
        assert load_manifest(tmp_path) == again.manifest != Manifest()
        assert {r.why for r in again.manifest.retired} == {"superseded"}
        assert all(entry.length for entry in again.manifest.segments)
