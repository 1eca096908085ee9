import dataclasses
import random

import numpy as np
import pytest

from buffer import sidecar
from buffer.manifest import live_segments
from buffer.sampler import Sampler
from buffer.segment import list_segments, read_state_file
from fleet.batch import BatchNeeds
from fleet.files import Files
from fleet.journal import Journal, read_journal
from fleet.record import parse
from fleet.robot import Source
from tests.buffer import runs
from tests.buffer.sampler_model import STATE, TASKS, Recorder, assert_same

NEEDS = BatchNeeds(64, 4, (STATE,), {tuple(Source): 1.0}, offsets=(-2, 0), replay=("replay.seed",))


@pytest.fixture
def recorded(tmp_path):
    """A log of several sealed segments, closed."""
    recorder = Recorder(tmp_path, extra=5000, segment_bytes=1)
    for episode in range(8):
        for part in range(3):
            recorder.fragment(
                episode % 2,
                episode,
                [0, 1, 0, 3],
                task=TASKS[episode % 2],
                opened={"seed": episode} if part == 0 else None,
                closed="success" if part == 2 else None,
                new_chunk=episode,
            )
            recorder.commit()
    recorder.close()
    assert len(list_segments(tmp_path)) >= 3
    return tmp_path


def part_of(folder, name):
    return sidecar.load(name, read_state_file(name.state_path).length)


def sample(folder, **options):
    sampler = Sampler(folder, TASKS, 3, **options)
    sampler.poll()
    return sampler, sampler.batch(NEEDS, 1)


def test_a_sidecar_holds_what_a_scan_finds(recorded):
    plain, batch = sample(recorded)
    for name in list_segments(recorded):
        assert part_of(recorded, name) is None
        assert sidecar.write(Files(), recorded, name)
        part, scanned = part_of(recorded, name), scan(name)
        for field in dataclasses.fields(part):
            a, b = getattr(part, field.name), getattr(scanned, field.name)
            if isinstance(b, dict) and field.name != "refused":
                assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)
            else:
                assert a == b, field.name
    quick, same = sample(recorded)
    assert_same(batch, same)
    assert quick.position == plain.position and quick.index.episodes.keys == plain.index.episodes.keys


def scan(name):
    from buffer.parts import PartBuilder
    from buffer.reader import map_segment

    segment = map_segment(name)
    builder = PartBuilder(segment.address, len(segment.bytes))
    for record in sidecar.records_of(segment, read_state_file(name.state_path).length)[0]:
        builder.add(record)
    return builder.build()


def test_segments_are_not_read_where_a_sidecar_is(recorded):
    for name in list_segments(recorded):
        sidecar.write(Files(), recorded, name)
    untouched, _ = sample(recorded)
    for name in list_segments(recorded):
        with name.path.open("r+b") as file:  # headers of the records are gone, rows are where they were
            data = bytearray(file.read())
            for at in range(0, len(data) - 64, 64):
                if data[at : at + 4] == b"FLR1":
                    data[at : at + 4] = b"GONE"
            file.seek(0)
            file.write(data)
    sampler, batch = sample(recorded)
    assert sampler.num_steps() == untouched.num_steps() and batch.actions_BHA.any()


def test_a_damaged_or_foreign_sidecar_is_passed_over(recorded, scale):
    _, batch = sample(recorded)
    names, rng = list_segments(recorded), random.Random(0)
    for name in names:
        sidecar.write(Files(), recorded, name)
    name = names[1]
    path, length = name.index_path, read_state_file(name.state_path).length
    whole = path.read_bytes()
    for _ in range(60 * scale):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        else:
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        part = sidecar.load(name, length)
        assert part is None or checked(bytes(data), name) == checked(whole, name)
    path.write_bytes(names[0].index_path.read_bytes())
    assert sidecar.load(name, length) is None, "another segment's"
    path.write_bytes(whole)
    assert sidecar.load(name, length) is not None and sidecar.load(name, length - 64) is None, "of another length"
    path.write_bytes(b"")
    assert_same(sample(recorded)[1], batch)


def checked(data, name):
    """The bytes of a sidecar without the zeros that fill up to multiples of 64: a bit that flips there changes nothing."""
    record = parse(data, 0, len(data), name.salt)
    key_end = 44 + int.from_bytes(data[12:16], "little")  # fleet/record.py
    return data[:key_end], data[record.payload_at : record.payload_at + record.payload_length]


def test_an_unsealed_segment_has_no_sidecar(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(0, 0, [0, 0], opened={})
    recorder.commit()
    (name,) = list_segments(tmp_path)
    assert not sidecar.write(Files(), tmp_path, name) and not name.index_path.exists()
    recorder.close()
    assert sidecar.write(Files(), tmp_path, name)


def test_a_damaged_fragment_is_left_out_of_the_sidecar_and_counted(recorded):
    name = list_segments(recorded)[1]
    from buffer.reader import map_segment

    records, _ = sidecar.records_of(map_segment(name), read_state_file(name.state_path).length)
    with name.path.open("r+b") as file:
        file.seek(records[0].payload_at + records[0].payload_length - 8)
        file.write(b"\x5a" * 8)
    assert sidecar.write(Files(), recorded, name)
    part = part_of(recorded, name)
    assert (part.num_damaged, part.num_records) == (1, len(records) - 1)
    sampler, _ = sample(recorded)
    assert sampler.damaged == 1


def test_steps_of_a_sealed_segment_are_reported_only_by_a_sampler_that_had_caught_up(tmp_path):
    recorder, journal = Recorder(tmp_path / "log"), Journal(tmp_path / "learner.jsonl")
    recorder.fragment(0, 0, [0, 0], opened={})
    recorder.commit()
    recorder.close()
    follower = Sampler(tmp_path / "log", TASKS, 0, journal)
    follower.poll()
    assert list(read_journal(tmp_path / "learner.jsonl")) == [], "a resumed learner says nothing of old steps"
    recorder.open()
    recorder.fragment(0, 0, [0, 0, 0])
    recorder.commit()
    recorder.close()
    follower.poll()
    (line,) = read_journal(tmp_path / "learner.jsonl")
    assert (line["kind"], line["robot"], line["seq"], len(line["latency_ms"])) == ("sampleable", "r0", 2, 3)


def test_a_fragment_that_changed_is_left_out_however_it_is_read(tmp_path):
    runs.fill(tmp_path)
    name = live_segments(tmp_path)[0]
    sampler = Sampler(tmp_path, ["reach"], 0)
    whole, at = sampler.poll(), int(sampler.index.places["observation.state"].view[0])
    sampler.close()
    data = bytearray(name.path.read_bytes())
    data[at] ^= 1
    name.path.write_bytes(data)
    for limit in (None, 5):  # sealed segments at once, or a few fragments at a time
        sampler = Sampler(tmp_path, ["reach"], 0)
        while sampler.poll(limit) and limit:
            pass
        assert (sampler.num_steps(), sampler.damaged) == (whole - 3, 1), limit
        sampler.close()
