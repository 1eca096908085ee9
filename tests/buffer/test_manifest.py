import dataclasses

import pytest

from buffer.log import Log
from buffer.manifest import (
    Entry,
    Manifest,
    ManifestView,
    Retired,
    border_episodes,
    facts_of,
    live_segments,
    load_manifest,
    store_manifest,
)
from buffer.reader import LogReader
from buffer.retention import Upkeep
from buffer.segment import SegmentState, list_segments, pack_header, read_state_file, segment_name, store_state
from fleet.errors import DiskFull, StorageError
from fleet.files import Files
from fleet.robot import Source


def make_log(folder, num=40, robots=("r1",), size=9_000):
    log = Log(folder, segment_bytes=200_000)
    for seq in range(1, num + 1):
        for robot in robots:
            steps = [2, seq % 5 == 0, 0, 0]
            log.append(robot, "b1", seq, "h", {"steps": 64}, bytes(size), episode=seq // 10, steps=steps)
        log.commit()
    return log


def entered(folder):
    upkeep = Upkeep(Files(), folder)
    upkeep.sync(0)
    return upkeep


def test_facts_of_a_segment_come_from_the_headers_of_its_records(tmp_path):
    make_log(tmp_path, robots=("r1", "r2")).close()
    entries = [facts_of(n, read_state_file(n.state_path).length) for n in live_segments(tmp_path)]
    records = LogReader(tmp_path).poll()
    assert sum(e.num_fragments for e in entries) == len(records) == 80
    assert sum(e.num_steps for e in entries) == 80 * 2 + 16
    assert sum(e.by_source["operator"] for e in entries) == 16
    for e in entries:
        own = [r for r in records if r.segment.number == e.number]
        assert (e.first_recv_ns, e.last_recv_ns) == (own[0].recv_ns, own[-1].recv_ns)
        assert {(b.robot_id, b.first_seq, b.last_seq) for b in e.boots} == {
            (robot, min(s), max(s)) for robot in ("r1", "r2") if (s := [r.seq for r in own if r.robot_id == robot])
        }
        assert e.has_marks and not e.num_damaged and e.generation == 0 and e.kept_for is None
    guarded = {key for key, bits in border_episodes(entries) if bits & 1 << Source.OPERATOR}
    assert {key[2] for key in guarded} <= set(range(5)) and guarded


def test_a_manifest_comes_back_as_it_was_and_any_damage_is_seen(tmp_path):
    make_log(tmp_path).close()
    manifest = entered(tmp_path).manifest
    manifest = dataclasses.replace(manifest, retired=(Retired(9, "x.seg", 5, 7, "age"),))
    store_manifest(Files(), tmp_path, manifest)
    by_number = {entry.number: entry for entry in manifest.segments}
    assert load_manifest(tmp_path) == manifest and by_number[1].file == list_segments(tmp_path)[0].path.name
    data = manifest.to_bytes()
    for at in range(0, len(data), 7):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        assert Manifest.from_bytes(bytes(bad)) is None, at
        assert Manifest.from_bytes(data[:at]) is None
    assert load_manifest(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped", "empty", "of another log"])
def test_a_manifest_that_is_lost_or_damaged_is_made_anew(tmp_path, damage):
    make_log(tmp_path / "a").close()
    before, path = entered(tmp_path / "a").manifest, tmp_path / "a" / "manifest.json"
    data = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "of another log":
        make_log(tmp_path / "b", num=100).close()
        path.write_bytes(entered(tmp_path / "b").manifest.to_bytes())
    else:
        path.write_bytes({"cut": data[:-40], "flipped": data.replace(b"policy", b"polizy", 1), "empty": b""}[damage])
    seqs = [r.seq for r in LogReader(tmp_path / "a").poll()]
    assert seqs == list(range(1, 41)), "readers and writers do without"
    Log(tmp_path / "a").close()
    assert entered(tmp_path / "a").manifest == before == load_manifest(tmp_path / "a")


def test_only_sealed_segments_are_entered_and_those_once(tmp_path):
    log = make_log(tmp_path)
    upkeep = entered(tmp_path)
    names = live_segments(tmp_path)
    assert [e.number for e in upkeep.manifest.segments] == [n.number for n in names[:-1]]
    stored = (tmp_path / "manifest.json").stat().st_ino
    upkeep.sync(1)
    assert (tmp_path / "manifest.json").stat().st_ino == stored, "nothing new, nothing written"
    (tmp_path / "manifest.json").unlink()
    upkeep.sync(1)
    assert load_manifest(tmp_path) == upkeep.manifest, "but what somebody deleted is there again"
    log.close()
    upkeep.sync(2)
    assert [e.number for e in upkeep.manifest.segments] == [n.number for n in names]


def test_a_segment_that_cannot_be_read_keeps_the_others_from_nothing(tmp_path):
    make_log(tmp_path).close()
    victim = live_segments(tmp_path)[1]
    victim.path.unlink()
    victim.path.mkdir()  # opening it fails
    upkeep = Upkeep(Files(), tmp_path)
    upkeep.sync(0)
    assert isinstance(upkeep.errors[0], StorageError) and len(upkeep.manifest.segments) == len(live_segments(tmp_path)) - 1


def higher(folder, name, generation):
    """Another file with the number of ``name``."""
    salt = bytes([generation]) * 8
    new = segment_name(folder / f"{name.number:08d}-{salt.hex()}.seg")
    data = b"".join(pack_header(name.number, b"\x90", salt, generation=generation, kept_for=["demo"]))
    new.path.write_bytes(data)
    store_state(Files(), new, SegmentState(len(data), True))
    return new


def test_of_two_files_with_one_number_the_named_one_counts_else_the_higher_generation(tmp_path):
    make_log(tmp_path).close()
    first = live_segments(tmp_path)[0]
    manifest = entered(tmp_path).manifest
    new = higher(tmp_path, first, 1)
    assert live_segments(tmp_path)[0] == first, "as the manifest says"
    (tmp_path / "manifest.json").unlink()
    assert live_segments(tmp_path)[0] == new
    assert higher(tmp_path, first, 2) == live_segments(tmp_path)[0]
    gone = Manifest(manifest.segments[1:], (Retired(1, first.path.name, 0, 0, "age"),))
    store_manifest(Files(), tmp_path, gone)
    assert first not in live_segments(tmp_path)


def test_a_reader_knows_the_length_of_a_sealed_segment_whose_state_is_lost(tmp_path):
    make_log(tmp_path).close()
    entered(tmp_path)
    for name in live_segments(tmp_path):
        name.state_path.unlink()
    assert [r.seq for r in LogReader(tmp_path).poll()] == list(range(1, 41))


def test_the_view_of_a_reader_follows_and_keeps_the_last_good_one(tmp_path):
    view = ManifestView(tmp_path)
    assert view.refresh() == Manifest()
    make_log(tmp_path).close()
    manifest = entered(tmp_path).manifest
    assert view.refresh() == manifest and view.refresh() is view.manifest
    (tmp_path / "manifest.json").write_bytes(b"{")
    assert view.refresh() == manifest


def test_a_manifest_that_finds_no_room_leaves_the_old_one(tmp_path):
    class Full(Files):
        def write(self, fd, buffers):
            raise OSError(28, "No space left on device")

    make_log(tmp_path).close()
    before = entered(tmp_path).manifest
    with pytest.raises(DiskFull):
        store_manifest(Full(), tmp_path, Manifest())
    assert load_manifest(tmp_path) == before


def test_an_entry_is_plain_data(tmp_path):
    make_log(tmp_path).close()
    (entry, *_) = entered(tmp_path).manifest.segments
    assert Entry.from_dict(entry.to_dict() | {"boots": [list(dataclasses.astuple(b)) for b in entry.boots]}) == entry
