import errno
import os

import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from fleet.errors import DiskFull, RunFolderError
from fleet.files import Files
from fleet.robot import Source
from fleet.schema import decode_fragment
from fleet.spool import Spool
from tests.buffer.fragments import fragment, make_spec

P, O = Source.POLICY, Source.OPERATOR  # noqa: E741
SPEC = make_spec()
BIG = 1 << 40


def add(spool, episode, first, sources, **options):
    return spool.append(SPEC.hash, *fragment("r1", spool.boot_id, episode, first, sources, **options), episode)


def add_episode(spool, episode, source=P, fragments=3):
    for i in range(fragments):
        add(spool, episode, i * 5, [source] * 5, opened=i == 0, closed=i == fragments - 1)


def drain(spool):
    found = []
    while (item := spool.next_unsent()) is not None:
        found.append(item)
    return found


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.spool"))


def test_fragments_come_in_order_and_go_when_acknowledged(tmp_path):
    spool = Spool(tmp_path, max_bytes=BIG)
    sent = [fragment("r1", spool.boot_id, 0, i, [P]) for i in range(4)]
    assert [spool.append(SPEC.hash, *item, 0) for item in sent] == [1, 2, 3, 4]
    got = drain(spool)
    assert [(g.boot_id, g.seq, g.spec_hash) for g in got] == [(spool.boot_id, seq, SPEC.hash) for seq in (1, 2, 3, 4)]
    assert [(dict(g.tables), g.payload) for g in got] == sent
    assert spool.num_pending == 4 and spool.bytes_pending > sum(len(p) for _, p in sent)
    spool.acknowledge(spool.boot_id, 3)
    spool.acknowledge(spool.boot_id, 2)
    assert spool.num_pending == 1 and drain(spool) == []
    spool.acknowledge(spool.boot_id, 4)
    assert (spool.num_pending, spool.bytes_pending) == (0, 0)
    spool.close()
    assert files(tmp_path) == []


def test_rewind_sends_again_from_the_high_water_mark_and_unsend_acknowledges_nothing(tmp_path):
    spool = Spool(tmp_path, max_bytes=BIG)
    for i in range(5):
        add(spool, 0, i, [P])
    drain(spool)
    spool.unsend(spool.boot_id, 4)
    assert [g.seq for g in drain(spool)] == [4, 5] and spool.num_pending == 5
    spool.rewind(spool.boot_id, 2)
    assert [g.seq for g in drain(spool)] == [3, 4, 5] and spool.num_pending == 3


def test_earlier_boots_are_sent_first_and_a_new_boot_has_a_new_name(tmp_path):
    boots = []
    for _ in range(3):
        spool = Spool(tmp_path, max_bytes=BIG)
        boots.append(spool.boot_id)
        add(spool, 0, 0, [P])
        add(spool, 0, 1, [P])
        spool.close()
    spool = Spool(tmp_path, max_bytes=BIG)
    assert spool.boots() == [*boots, spool.boot_id] and len(set(spool.boots())) == 4
    add(spool, 0, 0, [P])
    keys = [(g.boot_id, g.seq) for g in drain(spool)]
    assert keys == [(boot, seq) for boot in boots for seq in (1, 2)] + [(spool.boot_id, 1)]
    spool.acknowledge(boots[0], 2)
    spool.rewind(boots[1], 2)
    assert spool.boots() == [boots[2], spool.boot_id] and len(files(tmp_path)) == 2


def test_acknowledged_files_go_while_the_robot_works(tmp_path):
    spool = Spool(tmp_path, max_bytes=BIG)
    for episode in range(20):
        add_episode(spool, episode)
        spool.acknowledge(spool.boot_id, episode * 3 + 3)
        assert len(files(tmp_path)) <= 1
    long = fragment("r1", spool.boot_id, 20, 0, [P], spec=make_spec(extra=60_000))
    for _ in range(100):
        spool.acknowledge(spool.boot_id, spool.append(SPEC.hash, *long, 20))
        assert sum(p.stat().st_size for p in tmp_path.rglob("*.spool")) < 400_000, "also within one long episode"


def test_a_second_opener_is_refused(tmp_path):
    spool = Spool(tmp_path, max_bytes=BIG)
    with pytest.raises(RunFolderError, match=str(os.getpid())):
        Spool(tmp_path, max_bytes=BIG)
    spool.close()
    Spool(tmp_path, max_bytes=BIG).close()


def events(item):
    tables = decode_fragment(item.tables, item.payload).tables
    return tables["episodes"].column("event").to_pylist() if "episodes" in tables and "steps" not in tables else []


def test_a_full_spool_drops_whole_closed_unsent_policy_episodes_first(tmp_path):
    spool = Spool(tmp_path, max_bytes=BIG)
    add_episode(spool, 0, P)
    assert spool.next_unsent().seq == 1, "of this episode something was sent"
    add_episode(spool, 1, O)
    add_episode(spool, 2, P)
    add_episode(spool, 3, P)
    spool._max_bytes = spool.bytes_pending + 100
    add_episode(spool, 4, P)
    gone = {item.seq for item in drain(spool) if events(item) == ["dropped"]}
    assert gone == {7, 8, 9} and spool.dropped_steps == 15 and spool.bytes_pending <= spool._max_bytes
    spool.unsend(spool.boot_id, 2)
    add_episode(spool, 5, P)
    add_episode(spool, 6, P)
    spool.unsend(spool.boot_id, 2)
    gone = {item.seq for item in drain(spool) if events(item) == ["dropped"]}
    assert gone == {7, 8, 9, 10, 11, 12, 13, 14, 15}, "the operator's episode 1 outlives younger ones"
    before = drain_all(spool)
    spool.close()
    again = Spool(tmp_path, max_bytes=BIG)
    assert [(g.seq, events(g)) for g in drain(again)] == before, "a restart knows what was dropped"
    assert again.num_pending == 21


def drain_all(spool):
    spool.unsend(spool.boot_id, 1)
    return [(g.seq, events(g)) for g in drain(spool)]


def test_a_spool_with_drops_is_taken_by_the_gateways_ingest(tmp_path):
    spool = Spool(tmp_path / "spool", max_bytes=BIG)
    for episode in range(6):
        add_episode(spool, episode)
        spool._max_bytes = spool.bytes_pending if episode == 2 else spool._max_bytes
    log = Log(tmp_path / "buffer")
    ingest = Ingest(log)
    ingest.admit("r1", spool.boot_id, SPEC)
    for g in drain(spool):
        ingest.offer("r1", {"boot_id": g.boot_id, "seq": g.seq, "spec_hash": g.spec_hash, "tables": dict(g.tables)}, g.payload)
    assert ingest.commit() == [("r1", spool.boot_id, 18)] and spool.dropped_steps == 45
    assert len(LogReader(tmp_path / "buffer").poll()) == 18 and ingest.stats.steps["r1", "policy"] == 45


def test_when_nothing_can_be_dropped_the_open_episode_ends_here(tmp_path):
    spool = Spool(tmp_path, max_bytes=BIG)
    add(spool, 0, 0, [P] * 5, opened=True)
    spool._max_bytes = spool.bytes_pending + 10
    with pytest.raises(DiskFull, match="nothing of them can be dropped"):
        add(spool, 0, 5, [P] * 5)
    spool._max_bytes = BIG
    with pytest.raises(DiskFull, match="no gaps"):
        add(spool, 0, 10, [P] * 5)
    assert add(spool, 1, 0, [P], opened=True) == 2, "numbers stay gapless"


class FullDisk(Files):
    """Takes ``room`` more bytes; a write beyond that stores a part and fails."""

    room = 1 << 40

    def write(self, fd, buffers):
        data = b"".join(bytes(b) for b in buffers)
        taken, self.room = data[: self.room], max(self.room - len(data), 0)
        super().write(fd, [taken])
        if len(taken) < len(data):
            raise OSError(errno.ENOSPC, "no space")


def test_a_full_disk_refuses_and_goes_on_when_there_is_room(tmp_path):
    disk = FullDisk()
    spool = Spool(tmp_path, max_bytes=BIG, files=disk)
    add(spool, 0, 0, [P], opened=True)
    disk.room = 1000
    with pytest.raises(DiskFull, match="no room for spooling"):
        add(spool, 0, 1, [P])
    disk.room = 1 << 40
    assert add(spool, 1, 0, [P], opened=True) == 2
    spool.close()
    again = Spool(tmp_path, max_bytes=BIG)
    assert [g.seq for g in drain(again)] == [1, 2] and again.damaged == 0 and again.dropped_steps == 0


def test_a_failed_fsync_leaves_the_file_alone(tmp_path):
    class Failing(Files):
        broken = False

        def fsync(self, fd):
            if self.broken:
                raise OSError(errno.EIO, "io")
            super().fsync(fd)

    disk = Failing()
    spool = Spool(tmp_path, max_bytes=BIG, files=disk)
    add(spool, 0, 0, [P])
    disk.broken = True
    with pytest.raises(Exception, match="never acknowledged"):
        spool.flush()
    disk.broken = False
    add(spool, 0, 1, [P])
    spool.flush()
    assert len(files(tmp_path)) == 2 and [g.seq for g in drain(spool)] == [1, 2]
