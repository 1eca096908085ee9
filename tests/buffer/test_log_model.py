"""Log, retention and readers against a list of keys in memory, in any order of events that hypothesis finds."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.log import Log
from buffer.manifest import FILE_NAME, live_segments
from buffer.reader import LogReader
from buffer.retention import Limits, Upkeep
from fleet.robot import Source
from tests.faults.disk_model import Unsynced

SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))
ROBOTS, SEGMENT_BYTES = ("r1", "r2"), 20_000
FILES = Unsynced()


def is_protected(key):
    return key[1] // 4 % 3 == 0


class LogModel(RuleBasedStateMachine):
    """``order``: keys as they were appended and not lost. ``committed``: how many of them were acknowledged."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.order, self.committed, self.given_up = [], 0, set()
        self.readers = []

    @initialize()
    def open(self):
        self.log = Log(self.folder, files=FILES, segment_bytes=SEGMENT_BYTES)
        marks = {robot: self.log.high_water(robot, "b") for robot in ROBOTS}
        left = [key for key in self.order if key[1] <= marks[key[0]]]
        assert left == self.order[: len(left)] and len(left) >= self.committed, "the last ones may be gone, no others"
        assert not any(set(self.order[len(left) :]) & set(seen) for _, seen in self.readers), "a reader saw what was lost"
        assert not any(found.damaged for found in self.log.recovered)
        self.order, self.committed = left, len(left)

    @rule(robot=st.sampled_from(ROBOTS), size=st.sampled_from([0, 64, 3000, 30_000]), count=st.integers(1, 6))
    def append(self, robot, size, count):
        for _ in range(count):
            seq = self.log.last(robot, "b").seq + 1
            assert seq == 1 + sum(key[0] == robot for key in self.order)
            source = Source.OPERATOR if is_protected((robot, seq)) else Source.POLICY
            steps = [int(source == each) for each in Source]
            self.log.append(robot, "b", seq, "h", {"steps": size}, payload_of(robot, seq, size), episode=seq // 4, steps=steps)
            self.order.append((robot, seq))

    @rule()
    def commit(self):
        for robot, boot, seq in self.log.commit():
            assert boot == "b" and seq == self.log.high_water(robot, boot)
        self.committed = len(self.order)

    @rule()
    def close_and_open(self):
        self.log.close()
        self.open()

    @rule(cut=st.floats(0, 1), lose_state=st.booleans())
    def kill_and_open(self, cut, lose_state):
        """What was not fsynced may have lost its end."""
        active = self.log._active
        self.log._lock.release()
        if active is not None:
            os.truncate(active.name.path, active.committed + int(cut * (active.written - active.committed)))
            if lose_state:  # only a power loss takes it, and that ends the readers too
                active.name.state_path.unlink()
                self.readers.clear()
        self.open()

    @rule(damage=st.sampled_from(["remove", "cut", "flip"]))
    def damage_manifest(self, damage):
        path = self.folder / FILE_NAME
        if path.exists() and not self._any_retired():
            data = bytearray(path.read_bytes())
            if damage == "remove":
                path.unlink()
            elif damage == "cut":
                path.write_bytes(data[: len(data) // 2])
            else:
                data[len(data) // 2] ^= 1
                path.write_bytes(data)

    @rule(max_bytes=st.sampled_from([20_000, 60_000]), sweep=st.booleans())
    def retire(self, max_bytes, sweep):
        upkeep = Upkeep(FILES, self.folder)
        upkeep.sweep_strays()
        upkeep.sync(time.time_ns())
        before = set(keys_of(LogReader(self.folder)))
        upkeep.retire(Limits(max_bytes=max_bytes), time.time_ns())
        gone = before - set(keys_of(LogReader(self.folder)))
        assert not any(map(is_protected, gone)) and not upkeep.errors
        self.given_up |= gone
        if sweep:
            upkeep.sweep(0, time.time_ns())

    @precondition(lambda self: len(self.readers) < 3)
    @rule()
    def start_reader(self):
        self.readers.append((LogReader(self.folder), []))

    @rule(limit=st.sampled_from([None, 1, 5]), data=st.data())
    def poll(self, limit, data):
        if self.readers:
            reader, seen = data.draw(st.sampled_from(self.readers))
            found = keys_of(reader, limit)
            assert limit is None or len(found) <= limit
            seen += found
            assert len(set(seen)) == len(seen) and not reader.damaged
            place = {key: i for i, key in enumerate(self.order)}
            assert [place[key] for key in seen] == sorted(place[key] for key in seen), "in the order of the log"
            if limit is None:
                left_out = set(self.order[: self.committed]) - set(seen)
                assert left_out <= self.given_up, "a reader may miss only what was given up"

    @invariant()
    def marks_outlive_data(self):
        for robot in ROBOTS if hasattr(self, "log") else ():
            mark = sum(key[0] == robot for key in self.order[: self.committed])
            assert self.log.high_water(robot, "b") >= mark

    def _any_retired(self):
        from buffer.manifest import load_manifest

        manifest = load_manifest(self.folder)
        return manifest is None or bool(manifest.retired)

    def teardown(self):
        if hasattr(self, "log"):
            self.commit()
            found = keys_of(LogReader(self.folder))
            assert found == [key for key in self.order if key not in self.given_up], "a new reader sees what is kept, once"
            assert len({name.number for name in live_segments(self.folder)}) == len(live_segments(self.folder))
            self.log.close()
        for reader, _ in self.readers:
            reader.close()
        shutil.rmtree(self.folder)


def payload_of(robot, seq, size):
    return (f"{robot} {seq} ".encode() * (size // 5 + 1))[:size]


def keys_of(reader, limit=None):
    records = reader.poll(limit)
    for record in records:
        assert bytes(record.payload) == payload_of(record.robot_id, record.seq, record.tables["steps"])
    return [(record.robot_id, record.seq) for record in records]


TestLogModel = LogModel.TestCase
TestLogModel.settings = settings(
    max_examples=40 * SCALE, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
