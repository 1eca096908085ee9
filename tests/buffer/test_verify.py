import dataclasses
import shutil

import pytest

from buffer import sidecar
from buffer.labels import Label, append_labels
from buffer.log import Log
from buffer.manifest import Manifest, live_segments, load_manifest, store_manifest
from buffer.retention import Limits, Upkeep, prune
from buffer.segment import KIND_FRAGMENT, SegmentState, read_state_file, store_state
from buffer.verify import DAMAGED, DOUBLED, HEADER, MANIFEST_FAULT, MISSING, ORDER, REFUSED, SIDECAR, SPEC, STATE, verify
from fleet.files import Files
from fleet.record import scan
from tests.buffer.fragments import message
from tests.buffer.runs import OPERATOR, POLICY, Writer, fill, make_spec

FILES = Files()


def kinds(buffer):
    return [fault.kind for fault in verify(buffer).faults]


def fragments(name):
    data = name.path.read_bytes()[: read_state_file(name.state_path).length]
    return [record for record in scan(data, 0, len(data), name.salt) if record.kind == KIND_FRAGMENT]


def spoil(path, at, byte=0xFF):
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ byte]))


@pytest.fixture
def buffer(tmp_path):
    """A log of several segments with everything that a gateway's keeper adds."""
    fill(tmp_path)
    upkeep = Upkeep(FILES, tmp_path)
    upkeep.sync(0)
    for name in live_segments(tmp_path):
        sidecar.write(FILES, tmp_path, name)
    return tmp_path


def test_a_whole_log_has_no_faults_and_everything_is_counted(buffer):
    for at in (1, 2):
        append_labels(buffer, [Label("arm-0", "boot0", 0, "excluded", "true", "ann", at)])
    seen = []
    report = verify(buffer, lambda done, total: seen.append((done, total)))
    assert report.faults == []
    assert (report.steps, report.fragments, report.labels, report.boots) == (72, 26, 2, 3)
    assert (report.given_up, report.without_sidecar, report.open_segments) == (0, 2, 0)
    assert seen[-1][0] == seen[-1][1] == report.bytes > 0


def test_a_log_that_is_being_written_is_whole(tmp_path):
    writer = Writer(tmp_path)
    writer.episode("arm-1", "b", 0, [POLICY] * 20, closed=False)
    report = verify(tmp_path)
    assert report.faults == [] and report.open_segments == 1 and report.steps == 20
    writer.close()


@pytest.mark.parametrize("where", ["payload", "key"])
def test_a_flipped_byte_is_named_with_segment_offset_and_fragment(buffer, where):
    name = live_segments(buffer)[1]
    victim = fragments(name)[1]
    spoil(name.path, victim.payload_at + 100 if where == "payload" else victim.at + 50)
    faults = verify(buffer).faults
    assert faults.pop([fault.kind for fault in faults].index(SIDECAR)).segment.endswith(name.index_path.name)
    assert (faults[0].kind, faults[0].segment, faults[0].offset) == (DAMAGED, f"{buffer.name}/{name.path.name}", victim.at)
    named = faults[0] if where == "payload" else next(f for f in faults if f.kind == MISSING)
    assert (named.robot_id, named.boot_id, named.seq) == tuple(victim.key[k] for k in ("robot", "boot", "seq"))
    assert [f.kind for f in faults] == ([DAMAGED] if where == "payload" else [DAMAGED, MANIFEST_FAULT, MISSING])


def test_a_damaged_header_is_named(buffer):
    name = live_segments(buffer)[2]
    spoil(name.path, 50)
    assert HEADER in kinds(buffer)


def test_a_cut_file_is_named(buffer):
    name = live_segments(buffer)[0]
    with name.path.open("r+b") as file:
        file.truncate(fragments(name)[-1].at)
    faults = verify(buffer).faults
    assert faults[0].kind == DAMAGED and MISSING in [fault.kind for fault in faults]


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_segment_that_is_gone_is_damage_where_the_manifest_knows_it_else_given_up(buffer, with_manifest):
    name = live_segments(buffer)[1]
    lost = len(fragments(name))
    if not with_manifest:
        (buffer / "manifest.json").unlink()
    name.path.unlink()
    report = verify(buffer)
    if with_manifest:
        assert {DAMAGED, MISSING} == {fault.kind for fault in report.faults}
        assert sum(f.last_seq - f.seq + 1 for f in report.faults if f.kind == MISSING) == lost
    else:
        assert report.faults == [] and report.given_up == lost


def test_what_retention_gave_up_is_no_fault(buffer):
    before = verify(buffer)
    assert prune(buffer, Limits(max_bytes=1), dry_run=False)
    report = verify(buffer)
    assert report.faults == []
    assert report.given_up == before.fragments - report.fragments > 0
    assert any(entry.generation for entry in load_manifest(buffer).segments)


def append_raw(buffer, robot, boot, seq, episode, first_frame, sources, note=(0, 99, True, 0, 9, 0, 0, 0), **options):
    """A fragment that no ingest has looked at."""
    spec = options.setdefault("spec", make_spec(extra=4000))
    fields, payload = message(robot, boot, seq, episode, first_frame, sources, **options)
    log = Log(buffer)
    log.append(robot, boot, seq, spec.hash, fields["tables"], payload, note)
    log.commit()
    log.close()


def test_a_fragment_that_is_there_twice_is_named(buffer):
    append_raw(buffer, "arm-0", "boot0", 3, 0, 6, [POLICY] * 3)
    fault = next(fault for fault in verify(buffer).faults if fault.kind == DOUBLED)
    assert (fault.robot_id, fault.boot_id, fault.seq) == ("arm-0", "boot0", 3)


def test_a_gap_without_damage_is_named(buffer):
    append_raw(buffer, "arm-0", "boot0", 15, 9, 0, [POLICY] * 3, opened=True)
    fault = next(fault for fault in verify(buffer).faults if fault.kind == MISSING)
    assert (fault.robot_id, fault.boot_id, fault.seq, fault.last_seq) == ("arm-0", "boot0", 13, 14)


def test_frames_out_of_order_are_named(buffer):
    append_raw(buffer, "arm-0", "boot0", 13, 9, 5, [POLICY] * 3, opened=True)
    assert kinds(buffer) == [ORDER]


def test_a_lost_or_wrong_spec_is_named(buffer):
    append_raw(buffer, "arm-9", "b", 1, 0, 0, [POLICY] * 3, opened=True, note=(0, 3, True, 0, 3, 0, 0, 0), spec=make_spec(5))
    assert kinds(buffer) == [SPEC]
    for path in (buffer / "specs").iterdir():
        path.write_text("{}")
    assert set(kinds(buffer)) == {SPEC}


def test_arrow_that_is_not_what_the_spec_says_is_named(buffer):
    spec = make_spec(extra=4000)
    fields, payload = message("arm-9", "b", 1, 0, 0, [OPERATOR] * 2, spec=make_spec(5), opened=True)
    log = Log(buffer)
    log.append("arm-9", "b", 1, spec.hash, fields["tables"], payload)
    log.append("arm-9", "b", 2, spec.hash, {"steps": 64}, b"\x01" * 64)
    log.commit()
    log.close()
    assert kinds(buffer) == [REFUSED, REFUSED]


def test_a_lost_state_a_bad_sidecar_and_a_bad_manifest_are_named(buffer):
    names = live_segments(buffer)
    names[0].state_path.unlink()
    spoil(names[1].index_path, 500)
    shutil.copy(names[3].index_path, names[2].index_path)
    assert sorted(kinds(buffer)) == [SIDECAR, SIDECAR, STATE]
    (buffer / "manifest.json").write_text("{}")
    assert MANIFEST_FAULT in kinds(buffer)


def test_a_manifest_that_says_something_else_is_named(buffer):
    manifest = load_manifest(buffer)
    wrong = dataclasses.replace(manifest.segments[0], num_steps=1)
    store_manifest(FILES, buffer, Manifest((wrong, *manifest.segments[1:])))
    assert kinds(buffer) == [MANIFEST_FAULT]


def test_a_state_that_says_less_leaves_a_gap(buffer):
    """The length that counts was written too short: acknowledged fragments at the end are not seen by readers."""
    name = live_segments(buffer)[1]
    store_state(FILES, name, SegmentState(fragments(name)[-1].at, True))
    assert MISSING in kinds(buffer)


def test_the_lost_end_of_a_boot_that_sent_nothing_more_is_named(tmp_path):
    """Only the marks in the header of a later segment know of it."""
    writer = Writer(tmp_path)
    writer.episode("arm-0", "a", 0, [POLICY] * 9)
    writer.episode("arm-1", "b", 0, [POLICY] * 60)
    writer.close()
    last = [record for record in fragments(live_segments(tmp_path)[0]) if record.key["robot"] == "arm-0"][-1]
    names = live_segments(tmp_path)
    store_state(FILES, names[0], SegmentState(last.at, True))
    names[2].path.unlink()  # as retention does it: nothing of what is lost was in there
    lost = [(fault.kind, fault.robot_id, fault.seq) for fault in verify(tmp_path).faults]
    assert (MISSING, "arm-0", last.key["seq"]) in lost


def test_a_boot_that_began_after_retention_took_something_away_lost_nothing_by_it(tmp_path):
    writer = Writer(tmp_path)
    writer.episode("arm-0", "a", 0, [POLICY] * 60)
    writer.episode("arm-1", "b", 0, [POLICY] * 9)
    writer.close()
    names = live_segments(tmp_path)
    names[0].path.unlink()  # as retention does it
    name, first = next((n, r) for n in names[1:] for r in fragments(n) if r.key["robot"] == "arm-1")
    spoil(name.path, first.at + 50)
    report = verify(tmp_path)
    assert [fault.kind for fault in report.faults] == [DAMAGED, MISSING]
    assert (report.faults[1].robot_id, report.faults[1].seq) == ("arm-1", 1)
    assert report.given_up > 0


def test_the_lost_state_of_the_last_segment_is_named_too(tmp_path):
    fill(tmp_path)
    live_segments(tmp_path)[-1].state_path.unlink()
    assert kinds(tmp_path) == [STATE]
