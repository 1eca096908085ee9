import errno

import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from fleet.errors import FragmentRefused, StorageError
from fleet.files import Files
from fleet.journal import Journal, read_journal
from fleet.robot import Source
from fleet.schema import build_table, encode_fragment
from tests.buffer.fragments import episode_row, make_rows, make_spec, message

P, O = Source.POLICY, Source.OPERATOR  # noqa: E741
R, B = "r1", "b" * 16


@pytest.fixture
def ingest(tmp_path):
    log = Log(tmp_path / "buffer")
    ingest = Ingest(log, Journal(tmp_path / "gateway.jsonl"))
    ingest.admit(R, B, make_spec())
    yield ingest
    log.close()


def assert_refused(ingest, fields, payload, rule, robot=R):
    before = ingest._log.last(robot, fields["boot_id"])
    with pytest.raises(FragmentRefused, match=rule) as caught:
        ingest.offer(robot, fields, payload)
    assert ingest._log.last(robot, fields["boot_id"]) == before
    return caught.value


def stored(tmp_path):
    return [(r.robot_id, r.boot_id, r.seq) for r in LogReader(tmp_path / "buffer").poll()]


def test_bytes_are_stored_as_they_came(ingest, tmp_path):
    fields, payload = message(R, B, 1, 0, 0, [P] * 5, opened=True)
    ingest.offer(R, fields, payload)
    assert ingest.commit() == [(R, B, 1)]
    (record,) = LogReader(tmp_path / "buffer").poll()
    assert bytes(record.payload) == payload and record.tables == fields["tables"] and record.spec_hash == make_spec().hash


def test_duplicates_are_acknowledged_again_and_stored_once(ingest, tmp_path):
    first = message(R, B, 1, 0, 0, [P] * 5)
    ingest.offer(R, *first)
    ingest.offer(R, *first)
    assert ingest.commit() == [(R, B, 1)]
    ingest.offer(R, *first)
    assert ingest.commit() == [(R, B, 1)] and ingest.commit() == []
    assert stored(tmp_path) == [(R, B, 1)] and ingest.stats.duplicates == 2 and ingest.stats.fragments == 1


@pytest.mark.parametrize("seq", [-1, 0, 2, 3])
def test_numbers_without_their_predecessor_are_refused(ingest, seq):
    assert assert_refused(ingest, *message(R, B, seq, 0, 0, [P]), "gapless").rule == "gapless"
    assert ingest.stats.refused == 1
    ingest.offer(R, *message(R, B, 1, 0, 0, [P]))


def test_an_unknown_spec_is_refused(ingest):
    fields, payload = message(R, B, 1, 0, 0, [P])
    assert_refused(ingest, {**fields, "spec_hash": "f" * 16}, payload, "HELLO")


def test_another_robots_steps_are_refused(ingest):
    ingest.admit("r2", B, make_spec())
    assert_refused(ingest, *message(R, B, 1, 0, 0, [P]), "belongs to", robot="r2")


@pytest.mark.parametrize(
    ("second", "rule"),
    [
        ((0, 6, [P]), "without a gap"),
        ((0, 4, [P]), "without a gap"),
        ((1, 3, [P]), "without a gap"),
        ((0, 5, [9]), "source 9"),
    ],
)
def test_frames_that_jump_are_refused(ingest, second, rule):
    ingest.offer(R, *message(R, B, 1, 0, 0, [P] * 5, opened=True))
    assert_refused(ingest, *message(R, B, 2, *second), rule)
    ingest.offer(R, *message(R, B, 2, 0, 5, [P]))


def test_an_episode_does_not_go_on_after_its_end(ingest):
    ingest.offer(R, *message(R, B, 1, 4, 0, [P] * 5, opened=True, closed=True))
    assert_refused(ingest, *message(R, B, 2, 4, 5, [P]), "does not go on")
    assert_refused(ingest, *message(R, B, 2, 4, 5, [], closed=True), "closed, once")
    assert_refused(ingest, *message(R, B, 2, 3, 0, [P]), "count up")
    ingest.offer(R, *message(R, B, 2, 5, 0, [P]))


def test_steps_of_two_episodes_in_one_fragment_are_refused(ingest):
    spec = make_spec()
    rows = make_rows(R, B, 0, 0, [P]) + make_rows(R, B, 1, 0, [P])
    directory, payload = encode_fragment({"steps": build_table("steps", spec, rows)})
    assert_refused(ingest, {"boot_id": B, "seq": 1, "spec_hash": spec.hash, "tables": directory}, payload, "one episode")


def test_mutated_bytes_are_refused(ingest):
    fields, payload = message(R, B, 1, 0, 0, [P] * 5)
    for data in (payload[:-64], bytes(payload) + bytes(64), bytes(len(payload))):
        assert_refused(ingest, fields, data, ".")
    assert ingest.stats.refused == 3


def test_dropped_numbers_pass_and_end_their_episode(ingest):
    directory, payload = encode_fragment({"episodes": build_table("episodes", make_spec(), [episode_row(0, "dropped")])})
    fields = {"boot_id": B, "spec_hash": make_spec().hash, "tables": directory}
    ingest.offer(R, {**fields, "seq": 1}, payload)
    ingest.offer(R, {**fields, "seq": 2}, payload)
    assert_refused(ingest, *message(R, B, 3, 0, 0, [P]), "does not go on")
    ingest.offer(R, *message(R, B, 3, 1, 0, [P]))


def test_order_is_remembered_over_a_restart(ingest, tmp_path):
    ingest.offer(R, *message(R, B, 1, 0, 0, [P, O, O], opened=True))
    ingest.commit()
    ingest._log.close()
    again = Ingest(Log(tmp_path / "buffer"), Journal(tmp_path / "again.jsonl"))
    assert again.admit(R, B, make_spec()) == 1
    assert_refused(again, *message(R, B, 2, 0, 4, [P]), "without a gap")
    again.offer(R, *message(R, B, 2, 0, 3, [O], closed=True))
    again.commit()
    (episode,) = [line for line in read_journal(tmp_path / "again.jsonl") if line["kind"] == "episode"]
    assert episode["operator_steps"] == 3 and episode["source"] == "operator" and episode["length"] == 4
    again._log.close()


def test_the_journal_has_a_latency_for_each_step_and_a_line_for_each_episode(ingest, tmp_path):
    ingest.offer(R, *message(R, B, 1, 0, 0, [P] * 5, opened=True))
    ingest.offer(R, *message(R, B, 2, 0, 5, [P] * 2 + [O], closed=True))
    assert not (tmp_path / "gateway.jsonl").read_text(), "nothing is durable before the commit"
    ingest.commit()
    lines = list(read_journal(tmp_path / "gateway.jsonl"))
    durable = [line for line in lines if line["kind"] == "durable"]
    assert [(line["seq"], len(line["latency_ms"])) for line in durable] == [(1, 5), (2, 3)]
    assert all(0 <= ms < 10_000 for line in durable for ms in line["latency_ms"])
    (episode,) = [line for line in lines if line["kind"] == "episode"]
    assert (episode["robot"], episode["boot"], episode["outcome"], episode["operator_steps"]) == (R, B, "success", 1)
    assert episode["source"] == "policy" and episode["task"] == "reach"
    assert ingest.stats.steps == {(R, "policy"): 7, (R, "operator"): 1}


def test_a_hello_without_a_fragment_leaves_no_spec_behind(ingest):
    ingest.admit("r9", "c" * 16, make_spec(state_size=9))
    ingest.offer(R, *message(R, B, 1, 0, 0, [P]))
    ingest.commit()
    assert [spec.hash for spec in ingest._log.specs()] == [make_spec().hash]


class FailsOnce(Files):
    """Whose next fsync of a file fails when ``failing`` is set."""

    failing = False

    def fsync(self, fd):
        if self.failing:
            self.failing = False
            raise OSError(errno.EIO, "Input/output error")
        super().fsync(fd)


def test_what_a_failed_append_took_along_is_counted_once_when_it_comes_again(tmp_path):
    files = FailsOnce()
    ingest = Ingest(Log(tmp_path / "buffer", files=files, segment_bytes=1), Journal(tmp_path / "gateway.jsonl"))
    ingest.admit(R, B, make_spec())
    first = message(R, B, 1, 0, 0, [P] * 5, opened=True, closed=True)
    ingest.offer(R, *first)
    files.failing = True
    with pytest.raises(StorageError):  # it needs another segment, and the first one's end is not confirmed
        ingest.offer(R, *message(R, B, 2, 1, 0, [P] * 2000))
    ingest.offer(R, *first)
    assert ingest.commit() == [(R, B, 1)] and stored(tmp_path) == [(R, B, 1)]
    assert ingest.stats.fragments == 1 and ingest.stats.steps == {(R, "policy"): 5}
    assert [line["kind"] for line in read_journal(tmp_path / "gateway.jsonl")] == ["durable", "episode"]
    ingest._log.close()
