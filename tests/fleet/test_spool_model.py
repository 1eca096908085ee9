"""The spool against a list in memory, in any order of events that hypothesis finds; the gateway is a set of marks."""

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fleet.errors import DiskFull
from fleet.robot import Source
from fleet.schema import decode_fragment
from fleet.spool import Spool
from tests.buffer.fragments import fragment, make_spec
from tests.faults.disk_model import Unsynced

SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))
SPEC, FILES, BIG = make_spec(), Unsynced(), 1 << 40


class SpoolModel(RuleBasedStateMachine):
    """``items``: by boot what was appended, its number minus one being its place. ``stored``: by boot how many the gateway
    has. ``dropped``: what was given up for want of room."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.items, self.stored, self.sent, self.dropped = {}, {}, {}, set()

    @initialize()
    def open(self):
        self.spool = Spool(self.folder / "spool", max_bytes=BIG, files=FILES)
        self.items[self.spool.boot_id], self.stored[self.spool.boot_id] = [], 0
        self.episode = self.frame = 0
        waiting = [boot for boot, items in self.items.items() if len(items) > self.stored[boot]]
        assert set(waiting) <= set(self.spool.boots())
        for boot in self.spool.boots():
            self.rewind_boot(boot)

    @rule(source=st.sampled_from([Source.POLICY, Source.OPERATOR]), closed=st.booleans(), room=st.sampled_from([BIG, 20_000]))
    def append(self, source, closed, room):
        boot = self.spool.boot_id
        options = {"opened": self.frame == 0, "closed": closed, "spec": SPEC}
        item = fragment("r1", boot, self.episode, self.frame, [source], **options)
        before, self.spool._max_bytes = self._dropped_now(), room
        try:
            seq = self.spool.append(SPEC.hash, *item, self.episode)
            self.items[boot].append((dict(item[0]), bytes(item[1])))
            assert seq == len(self.items[boot]), "gapless"
            self.frame += 1
        except DiskFull:
            closed = True
        self.dropped |= self._dropped_now() - before
        if closed:
            self.episode, self.frame = self.episode + 1, 0

    @rule()
    def flush(self):
        self.spool.flush()

    @rule(most=st.integers(1, 12))
    def send(self, most):
        for _ in range(most):
            item = self.spool.next_unsent()
            if item is None:
                assert all(self.sent[boot] >= len(self.items[boot]) for boot in self.spool.boots()), "something is left to send"
                return
            self.sent[item.boot_id] += 1
            assert item.seq == self.sent[item.boot_id], "each boot in order"
            self._check(item)

    @rule(back=st.integers(0, 3))
    def acknowledge(self, back):
        for boot in self.spool.boots():
            self.stored[boot] = max(self.stored[boot], self.sent[boot] - back)
            self.spool.acknowledge(boot, self.stored[boot])

    @rule()
    def rewind(self):
        """A new connection."""
        for boot in self.spool.boots():
            self.rewind_boot(boot)

    def rewind_boot(self, boot):
        self.spool.rewind(boot, self.stored[boot])
        self.sent[boot] = self.stored[boot]

    @rule(killed=st.booleans())
    def restart(self, killed):
        if killed:
            self.spool._lock.release()
        else:
            self.spool.close()
        self.open()

    @invariant()
    def counts_agree(self):
        if hasattr(self, "spool"):
            waiting = sum(len(self.items[boot]) - self.stored[boot] for boot in self.items)
            assert self.spool.num_pending == waiting and self.spool.damaged == 0
            assert (self.spool.bytes_pending == 0) == (not self._live())

    def _live(self):
        """What waits and was not dropped."""
        waiting = {(boot, seq + 1) for boot, items in self.items.items() for seq in range(self.stored[boot], len(items))}
        return waiting - self.dropped

    def _dropped_now(self):
        return {(boot.boot_id, entry.seq) for boot in self.spool._boots for entry in boot.entries if entry.dropped}

    def _check(self, item):
        if (item.boot_id, item.seq) in self.dropped:
            tables = decode_fragment(item.tables, item.payload).tables
            assert set(tables) == {"episodes"} and tables["episodes"].column("event").to_pylist() == ["dropped"]
        else:
            assert (dict(item.tables), bytes(item.payload)) == self.items[item.boot_id][item.seq - 1]

    def teardown(self):
        if hasattr(self, "spool"):
            self.restart(killed=True)
            self.send(10**6)
            for boot in self.spool.boots():
                self.spool.acknowledge(boot, len(self.items[boot]))
            self.spool.close()
            assert not list((self.folder / "spool").rglob("*.spool"))
        shutil.rmtree(self.folder)


TestSpoolModel = SpoolModel.TestCase
TestSpoolModel.settings = settings(
    max_examples=40 * SCALE, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
