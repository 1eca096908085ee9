import functools
import os
import random
import shutil
import time

import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from fleet.robot import Source
from fleet.spool import Spool
from tests.buffer.fragments import fragment, make_spec, message
from tests.faults import spool_writer
from tests.faults.forked import Forked

SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))
P, SPEC, BIG = Source.POLICY, make_spec(), 1 << 40


def drain(spool):
    found = []
    while (item := spool.next_unsent()) is not None:
        found.append(item)
    return found


def run_and_kill(folder, rng):
    """(boot, numbers given) of a writer that was killed; None where it did not come to say its boot."""
    process = Forked(functools.partial(spool_writer.work, folder))
    lines = [process.said.readline().split() for _ in range(rng.choice([0, 1, 2, 9]))]
    time.sleep(rng.uniform(0, rng.choice([0.003, 0.03])))
    lines += process.kill()
    return (lines[0][1], [int(line[1]) for line in lines[1:]]) if lines else (None, [])


@pytest.mark.timeout(300)
def test_kill_and_reopen_resends_everything_under_the_same_numbers(tmp_path):
    rng, given, log = random.Random(3), {}, Log(tmp_path / "buffer")
    ingest, spec = Ingest(log), make_spec(extra=20_000)
    for _ in range(20 * SCALE):
        boot, numbers = run_and_kill(tmp_path / "spool", rng)
        assert boot not in given, "a boot's name was used again"
        given.update({boot: numbers} if boot else {})
        spool = Spool(tmp_path / "spool", max_bytes=BIG)
        # Sends a part, is acknowledged less, and stops: the next start must go on from there.
        for name in spool.boots():
            spool.rewind(name, ingest.admit("r1", name, spec))
        for g in drain(spool)[: rng.randrange(1, 400)]:
            ingest.offer(
                "r1", {"boot_id": g.boot_id, "seq": g.seq, "spec_hash": g.spec_hash, "tables": dict(g.tables)}, g.payload
            )
        for _, name, seq in ingest.commit():
            spool.acknowledge(name, seq - rng.randrange(3))
        spool.close()
    spool = Spool(tmp_path / "spool", max_bytes=BIG)
    for g in drain(spool):
        ingest.offer("r1", {"boot_id": g.boot_id, "seq": g.seq, "spec_hash": g.spec_hash, "tables": dict(g.tables)}, g.payload)
    for _, name, seq in ingest.commit():
        spool.acknowledge(name, seq)
    assert spool.num_pending == 0 and spool.damaged == 0 and spool.dropped_steps == 0
    assert not list((tmp_path / "spool").rglob("*.spool")), "what was acknowledged is gone from the disk"
    stored = [(r.boot_id, r.seq) for r in LogReader(tmp_path / "buffer").poll()]
    assert len(stored) == len(set(stored))
    for boot, numbers in given.items():
        mine = [seq for name, seq in stored if name == boot]
        assert mine == list(range(1, len(mine) + 1)) and len(mine) >= len(numbers), "written once means sent"
    assert any(given.values())
    spool.close()
    log.close()


def make_boot(folder, episodes=3):
    spool = Spool(folder, max_bytes=BIG)
    for episode in range(episodes):
        for i in range(3):
            item = fragment("r1", spool.boot_id, episode, i, [P], opened=i == 0, closed=i == 2)
            spool.append(SPEC.hash, *item, episode)
    spool.close()
    return spool.boot_id, sorted(folder.rglob("*.spool"))


def send_to_ingest(spool, folder, start=0):
    log = Log(folder)
    ingest = Ingest(log)
    for name in spool.boots():
        spool.rewind(name, max(start, ingest.admit("r1", name, SPEC)))
    for g in drain(spool):
        ingest.offer("r1", {"boot_id": g.boot_id, "seq": g.seq, "spec_hash": g.spec_hash, "tables": dict(g.tables)}, g.payload)
    ingest.commit()
    log.close()
    return ingest.stats.steps["r1", "policy"]


def test_every_cut_of_the_last_file_keeps_what_lies_before(tmp_path):
    make_boot(tmp_path / "spool")
    last = max((tmp_path / "spool").rglob("*.spool"))
    size = last.stat().st_size
    kept = []
    for cut in range(size, -1, -max(10 // SCALE, 1)):
        os.truncate(last, cut)
        spool = Spool(tmp_path / "spool", max_bytes=BIG)
        got = [g.seq for g in drain(spool)]
        assert got == list(range(1, len(got) + 1)) and len(got) >= 6 and spool.damaged == 0
        kept.append(len(got))
        spool.close()
        if len(got) == 6:
            break
    assert kept[0] == 9 and set(kept) == {6, 7, 8, 9}


def test_a_damaged_fragment_costs_the_rest_of_its_episode_only(tmp_path):
    for place, lost in ((0.1, 3), (0.5, 2), (0.9, 1)):
        folder = tmp_path / str(place)
        _, files = make_boot(folder / "spool")
        data = bytearray(files[1].read_bytes())
        data[int(len(data) * place)] ^= 0xFF
        files[1].write_bytes(data)
        spool = Spool(folder / "spool", max_bytes=BIG)
        assert len(spool.boots()) == 2 and spool.num_pending == 9 and spool.damaged <= 1
        assert send_to_ingest(spool, folder / "buffer") == 9 - lost, "the gateway takes all numbers, without the lost steps"
        assert spool.dropped_steps == lost - 1
        spool.acknowledge(spool.boots()[0], 9)
        assert (spool.num_pending, spool.bytes_pending) == (0, 0)
        spool.close()


def test_damage_while_the_robot_works_does_not_stop_it(tmp_path):
    spool = Spool(tmp_path / "spool", max_bytes=BIG)
    for i in range(3):
        spool.append(SPEC.hash, *fragment("r1", spool.boot_id, 0, i, [P], opened=i == 0), 0)
    (file,) = (tmp_path / "spool").rglob("*.spool")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    for i in range(2):
        spool.append(SPEC.hash, *fragment("r1", spool.boot_id, 1, i, [P], opened=i == 0), 1)
    assert send_to_ingest(spool, tmp_path / "buffer") == 3 and (spool.damaged, spool.dropped_steps) == (1, 1)
    spool.acknowledge(spool.boot_id, 5)
    assert (spool.num_pending, spool.bytes_pending) == (0, 0)
    spool.close()


def test_a_hole_that_the_gateway_has_a_part_of_is_taken(tmp_path):
    """The gateway had stored a fragment that was not flushed here; a power loss then took it and the one behind it."""
    boot, files = make_boot(tmp_path / "spool", episodes=2)
    data = bytearray(files[1].read_bytes())
    whole = len(data)
    data[: whole * 6 // 10] = bytes(whole * 6 // 10)  # two of three
    files[1].write_bytes(data)
    spool, log = Spool(tmp_path / "spool", max_bytes=BIG), Log(tmp_path / "buffer")
    ingest = Ingest(log)
    ingest.admit("r1", boot, SPEC)
    for seq in range(1, 5):
        ingest.offer("r1", *message("r1", boot, seq, (seq - 1) // 3, (seq - 1) % 3, [P], opened=seq in (1, 4), closed=seq == 3))
    ingest.commit()
    log.close()
    assert send_to_ingest(spool, tmp_path / "buffer") == 0 and [r.seq for r in LogReader(tmp_path / "buffer").poll()][-1] == 6
    spool.close()


def test_a_restart_in_the_middle_of_what_was_given_up_sends_none_of_it(tmp_path):
    """The gateway has the note for a lost fragment; the rest of its episode, whole on the disk, must not follow."""
    for damage_while_running in (False, True):
        folder = tmp_path / str(damage_while_running)
        spool, log = Spool(folder / "spool", max_bytes=BIG), Log(folder / "buffer")
        ingest, boot = Ingest(log), spool.boot_id
        for i in range(4):
            spool.append(SPEC.hash, *fragment("r1", boot, 0, i, [P], opened=i == 0, closed=i == 3), 0)
        if not damage_while_running:
            spool.close()
        (file,) = (folder / "spool").rglob("*.spool")
        data = bytearray(file.read_bytes())
        data[len(data) * 4 // 10] ^= 0xFF  # in the second of four
        file.write_bytes(data)
        for stored in (2, 3, 4):
            if stored > 2 or not damage_while_running:
                spool = Spool(folder / "spool", max_bytes=BIG)
            spool.rewind(boot, ingest.admit("r1", boot, SPEC))
            for g in drain(spool)[: stored - log.high_water("r1", boot)]:
                fields = {"boot_id": g.boot_id, "seq": g.seq, "spec_hash": g.spec_hash, "tables": dict(g.tables)}
                ingest.offer("r1", fields, g.payload)
            for _, name, seq in ingest.commit():
                spool.acknowledge(name, seq)
            assert log.high_water("r1", boot) == stored
            spool.close()
        assert ingest.stats.steps["r1", "policy"] == 1 and not list((folder / "spool").rglob("*.spool"))
        log.close()


def test_a_flipped_bit_costs_the_rest_of_its_episode_at_most(tmp_path, scale):
    rng = random.Random(6)
    boot, files = make_boot(tmp_path / "whole")
    for trial in range(30 * scale):
        folder = tmp_path / f"t{trial}"
        shutil.copytree(tmp_path / "whole", folder / "spool")
        victim = folder / "spool" / rng.choice(files).relative_to(tmp_path / "whole")
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        spool = Spool(folder / "spool", max_bytes=BIG)
        stored = send_to_ingest(spool, folder / "buffer")
        tail = spool.num_pending < 9  # of the newest file a damaged header at the end looks like a torn one
        assert 6 <= stored <= 9 and spool.damaged <= 1 and (spool.num_pending == 9 or (tail and stored == spool.num_pending))
        spool.acknowledge(boot, 9)
        assert (spool.num_pending, spool.bytes_pending) == (0, 0)
        spool.close()
        shutil.rmtree(folder)
