"""Who is in the fleet: events in, facts out."""

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fleet.server.membership import MAX_METRICS, Membership, clean_metrics

SECOND = 1_000_000_000


def said(events):
    return [(event.robot_id, event.event) for event in events]


def hello(membership, robot_id="arm-1", boot_id="b1", now_s=0.0):
    return said(membership.hello(robot_id, boot_id, "1.0", now_s=now_s, time_ns=int(now_s * SECOND)))


def test_joins_once_is_lost_in_silence_and_joins_again():
    membership = Membership(lost_after_s=10)
    assert hello(membership) == [("arm-1", "joined")]
    assert hello(membership, now_s=1) == []
    assert said(membership.sweep(10.9)) == []
    assert said(membership.sweep(11.1)) == [("arm-1", "lost")]
    assert said(membership.sweep(30)) == []
    assert membership.members["arm-1"].state == "lost" and membership.num_live == 0
    assert hello(membership, now_s=31) == [("arm-1", "joined")]


def test_any_sign_of_life_counts_for_robots_that_said_hello_only():
    membership = Membership(lost_after_s=10)
    assert membership.seen("arm-1", now_s=0, time_ns=0) == []
    assert membership.heartbeat("arm-1", 0, {}, now_s=0, time_ns=0) == []
    assert membership.members == {}
    hello(membership)
    membership.seen("arm-1", now_s=9, time_ns=9)
    assert membership.sweep(15) == []


def test_leaving_is_not_losing():
    membership = Membership(lost_after_s=10)
    hello(membership)
    assert said(membership.bye("arm-1")) == [("arm-1", "left")]
    assert membership.bye("arm-1") == [] and membership.sweep(100) == []
    assert membership.bye("nobody") == []


def test_the_clock_offset_is_that_of_the_fastest_heartbeat():
    membership = Membership()
    hello(membership)
    for delay_s in (0.4, 0.01, 0.2):
        membership.heartbeat("arm-1", 105 * SECOND, {}, now_s=1, time_ns=int((100 + delay_s) * SECOND))
    assert membership.members["arm-1"].clock_offset_ns == int(4.99 * SECOND)
    for _ in range(16):  # the clock was set back: the old estimate is forgotten
        membership.heartbeat("arm-1", 90 * SECOND, {}, now_s=1, time_ns=100 * SECOND)
    assert membership.members["arm-1"].clock_offset_ns == -10 * SECOND
    hello(membership, boot_id="b2")
    membership.heartbeat("arm-1", 50 * SECOND, {}, now_s=1, time_ns=100 * SECOND)
    assert membership.members["arm-1"].clock_offset_ns == -50 * SECOND


def test_the_version_comes_from_heartbeats_and_loads():
    membership = Membership()
    hello(membership)
    membership.loaded("arm-1", 4)
    assert membership.members["arm-1"].version == 4
    membership.heartbeat("arm-1", 0, {"version": 5.0, "spool": 2}, now_s=0, time_ns=0)
    view = membership.members["arm-1"].view()
    assert (view["version"], view["spool"], view["state"], view["boot_id"], view["software"]) == (5, 2, "live", "b1", "1.0")


def test_a_robot_cannot_speak_for_the_gateway():
    membership = Membership()
    hello(membership, now_s=7)
    membership.heartbeat("arm-1", 0, {"last_seen_ns": 1e30, "state": 3}, now_s=7, time_ns=7 * SECOND)
    view = membership.members["arm-1"].view()
    assert view["last_seen_ns"] == 7 * SECOND and view["state"] == "live"


@given(
    st.dictionaries(st.text(max_size=60) | st.integers(), st.none() | st.integers() | st.floats() | st.text() | st.booleans())
)
def test_metrics_from_the_network_are_few_finite_numbers(metrics):
    clean = clean_metrics({**metrics, **{f"m{n}": n for n in range(100)}})
    assert len(clean) <= MAX_METRICS
    assert all(isinstance(name, str) and len(name) <= 48 and math.isfinite(value) for name, value in clean.items())


class Machine(RuleBasedStateMachine):
    """Joined and ended strictly take turns, whatever happens in whatever order."""

    def __init__(self):
        super().__init__()
        self.membership, self.now, self.live = Membership(lost_after_s=10), 0.0, {}

    def take(self, events):
        for event in events:
            joined = event.event == "joined"
            assert self.live.get(event.robot_id, False) != joined
            self.live[event.robot_id] = joined

    robots = st.sampled_from(["a", "b"])

    @rule(robot=robots)
    def hello(self, robot):
        self.take(self.membership.hello(robot, "b1", "1", now_s=self.now, time_ns=0))

    @rule(robot=robots)
    def heartbeat(self, robot):
        self.take(self.membership.heartbeat(robot, 0, {}, now_s=self.now, time_ns=0))

    @rule(robot=robots)
    def bye(self, robot):
        self.take(self.membership.bye(robot))

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds):
        self.now += seconds
        self.take(self.membership.sweep(self.now))

    @invariant()
    def agrees(self):
        assert sum(self.live.values()) == self.membership.num_live


TestMachine = Machine.TestCase
