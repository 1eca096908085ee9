"""The gateway over the in-memory twin: what robots may do, what is refused, and when it acknowledges."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.errors import DiskFull, FragmentRefused, PolicyError, ReleaseError
from fleet.journal import Journal, read_journal
from fleet.server.gateway import MAX_BOOTS, Gateway
from fleet.server.membership import Membership
from fleet.server.pulls import MAX_PULLS
from fleet.spec import Feature, RobotSpec
from fleet.transport import MemoryHub
from fleet.wire import FIELDS, PROTOCOLS, Kind, Message

SPEC = RobotSpec("toy", 20.0, {"action": Feature("float32", (2,)), "observation.state": Feature("float32", (4,))})
BOOT, OTHER_BOOT = "0123456789abcdef", "fedcba9876543210"


class Ingest:
    """Keeps fragments in lists: offered ones, and of those the durable ones."""

    def __init__(self):
        self.open, self.durable, self.trouble, self.commits = [], [], {}, 0

    def admit(self, robot_id, boot_id, spec):
        self._fail("admit")
        return max((seq for robot, boot, seq in self.durable if (robot, boot) == (robot_id, boot_id)), default=0)

    def offer(self, robot_id, fields, payload):
        self._fail("offer")
        if bytes(payload) == b"poison":
            raise FragmentRefused("a poisoned fragment", rule="no poison")
        if bytes(payload) == b"fault":
            raise RuntimeError("a fault of ours")
        self.open.append((robot_id, fields["boot_id"], fields["seq"]))

    def commit(self):
        self.commits += 1
        group, self.open = self.open, []
        self._fail("commit")
        self.durable += group
        return list({(robot, boot): (robot, boot, seq) for robot, boot, seq in group}.values())

    def _fail(self, where):
        if where in self.trouble:
            raise self.trouble[where]


class Releases:
    def __init__(self):
        self.pieces, self.version, self.reads = {}, None, 0

    def newest(self):
        return self.version

    def read(self, what, id):
        self.reads += 1
        if (what, id) not in self.pieces:
            raise ReleaseError(f"there is no {what} {id}")
        return self.pieces[what, id]


class Fleet:
    """A gateway with its handlers, and robots on the in-memory twin."""

    def __init__(self, tmp_path, **more):
        self.hub, self.ingest, self.releases, self.membership = MemoryHub(500), Ingest(), Releases(), Membership(10.0)
        self.journal_path = tmp_path / "gateway.jsonl"
        self.gateway = Gateway(
            self.hub,
            run_id="run-1",
            tasks={"reach": {"instruction": "reach the target"}},
            settings={"heartbeat_s": 1.0},
            ingest=self.ingest,
            releases=self.releases,
            membership=self.membership,
            journal=Journal(self.journal_path),
            commit_s=0.0,
            **more,
        )

    def turn(self, num=1):
        for _ in range(num):
            self.gateway.run_once(0)

    def tick(self):
        self.gateway._next_tick = 0.0
        self.turn()

    def robot(self, robot_id="arm-1", boot_id=BOOT):
        link = self.hub.connect(robot_id)
        assert self.hello(link, boot_id).kind == Kind.WELCOME
        return link

    def hello(self, link, boot_id=BOOT, **changes):
        link.send(hello(boot_id, **changes))
        self.turn()
        return answers(link)[0]

    def facts(self, kind):
        return [fact for fact in read_journal(self.journal_path) if fact["kind"] == kind]

    def count(self, name, **labels):
        return self.gateway.metrics.registry.get_sample_value(f"{name}_total", labels) or 0


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


def hello(boot_id=BOOT, **changes):
    fields = {
        "protocols": list(PROTOCOLS),
        "software": "1.0",
        "boot_id": boot_id,
        "spec": SPEC.to_dict(),
        "spec_hash": SPEC.hash,
    }
    return Message(Kind.HELLO, {**fields, **changes})


def fragment(seq, payload=b"steps", boot_id=BOOT):
    return Message(Kind.FRAGMENT, {"boot_id": boot_id, "seq": seq, "spec_hash": SPEC.hash, "tables": {}}, payload)


def heartbeat(**metrics):
    return Message(Kind.HEARTBEAT, {"time_ns": time.time_ns(), "mono_ns": 7, "metrics": metrics})


def answers(link, *kinds):
    found = []
    while (message := link.receive(0)) is not None:
        if not kinds or message.kind in kinds:
            found.append(message)
    return found


def acks(link):
    return [message.fields["seq"] for message in answers(link, Kind.ACK)]


def byes(link):
    return [message.fields for message in answers(link, Kind.BYE)]


# Acknowledging


def test_welcome_says_all_that_a_robot_needs(fleet):
    link = fleet.hub.connect("arm-1")
    welcome = fleet.hello(link).fields
    assert welcome["run_id"] == "run-1" and welcome["boot_id"] == BOOT and welcome["seq"] == 0
    assert welcome["tasks"]["reach"]["instruction"] == "reach the target" and welcome["settings"] == {"heartbeat_s": 1.0}
    assert abs(welcome["time_ns"] - time.time_ns()) < 5e9
    assert [fact["event"] for fact in fleet.facts("member")] == ["joined"]


def test_acknowledged_after_the_commit_and_once_for_the_group(fleet):
    link = fleet.robot()
    for seq in (1, 2, 3):
        link.send(fragment(seq))
    fleet.turn()
    assert fleet.ingest.durable == [("arm-1", BOOT, seq) for seq in (1, 2, 3)]
    assert acks(link) == [3] and fleet.ingest.commits == 1


def test_no_acknowledgement_without_the_commit(fleet):
    link = fleet.robot()
    fleet.ingest.trouble["commit"] = DiskFull("no room")
    link.send(fragment(1))
    fleet.turn()
    assert acks(link) == [] and fleet.ingest.durable == []


def test_duplicates_are_acknowledged_again_and_not_kept_twice(fleet):
    link = fleet.robot()
    for seq in (1, 2, 1, 2):
        link.send(fragment(seq))
        fleet.turn()
    assert fleet.ingest.durable == [("arm-1", BOOT, 1), ("arm-1", BOOT, 2)]
    assert acks(link) == [1, 2, 2, 2]
    assert fleet.count("fleet_duplicates", robot="arm-1") == 2


def test_a_duplicate_in_the_open_group_is_not_acknowledged_early(fleet):
    link = fleet.robot()
    fleet.ingest.trouble["commit"] = DiskFull("no room")
    link.send(fragment(1))
    link.send(fragment(1))
    fleet.turn()
    assert acks(link) == []


def test_an_acknowledgement_that_found_no_room_is_sent_later(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.hub._bound = 1
    link = fleet.hub.connect("arm-1")
    link.send(hello())
    fleet.turn()  # WELCOME fills the robot's queue
    link.send(fragment(1))
    fleet.turn(3)
    assert [message.kind for message in answers(link)] == [Kind.WELCOME]
    fleet.turn()
    assert acks(link) == [1]


def test_a_gap_is_refused_and_the_robot_goes_on_from_the_mark(fleet):
    link = fleet.robot()
    for seq in (1, 3, 4, 5):
        link.send(fragment(seq))
    fleet.turn()
    answered = answers(link)
    refusals = [m.fields for m in answered if m.kind == Kind.BYE]
    assert len(refusals) == 1 and refusals[0]["error"]["code"] == "fragment_refused" and refusals[0]["seq"] == 3
    assert "fragment 3" in refusals[0]["error"]["what"] and "after 1" in refusals[0]["error"]["what"]
    assert fleet.hello(link).fields["seq"] == 1
    for seq in (2, 3, 4, 5):
        link.send(fragment(seq))
    fleet.turn()
    assert acks(link) == [5]
    assert [seq for _, _, seq in fleet.ingest.durable] == [1, 2, 3, 4, 5]


def test_the_mark_in_welcome_covers_what_came_just_before(fleet):
    """An older connection's fragments, taken in within the same turn, are not asked for again."""
    old = fleet.robot()
    old.send(fragment(1))
    new = fleet.hub.connect("arm-1")
    new.send(hello())
    fleet.turn()
    assert answers(new, Kind.WELCOME)[0].fields["seq"] == 1


def test_two_robots_with_the_same_numbers_do_not_mix(fleet):
    one, two = fleet.robot("arm-1"), fleet.robot("arm-2")
    for seq in (1, 2):
        one.send(fragment(seq))
    two.send(fragment(1))
    fleet.turn()
    assert (acks(one), acks(two)) == ([2], [1])
    assert sorted(fleet.ingest.durable) == [("arm-1", BOOT, 1), ("arm-1", BOOT, 2), ("arm-2", BOOT, 1)]


def test_boots_of_one_robot_count_for_themselves(fleet):
    link = fleet.robot(boot_id=OTHER_BOOT)
    link.send(fragment(1, boot_id=OTHER_BOOT))
    fleet.turn()
    assert fleet.hello(link, BOOT).kind == Kind.ACK
    link.send(fragment(1))
    fleet.turn()
    assert sorted(fleet.ingest.durable) == [("arm-1", BOOT, 1), ("arm-1", OTHER_BOOT, 1)]


def test_boots_that_are_open_at_once_are_bounded(fleet):
    link = fleet.robot()
    for number in range(MAX_BOOTS + 5):
        assert fleet.hello(link, f"{number:016x}").kind == Kind.WELCOME
    assert len(fleet.gateway._lives["arm-1"].boots) == MAX_BOOTS


# Disk full


def test_full_disk_at_commit_is_told_and_nothing_is_lost(fleet):
    one, two = fleet.robot("arm-1"), fleet.robot("arm-2")
    fleet.ingest.trouble["commit"] = DiskFull("no room", remedy="make room")
    for link in (one, two):
        link.send(fragment(1))
    fleet.turn()
    for link in (one, two):
        said = byes(link)
        assert len(said) == 1 and said[0]["error"]["code"] == "disk_full" and said[0]["boot_id"] == BOOT
    fleet.ingest.trouble.clear()
    one.send(fragment(2))
    fleet.turn()
    assert fleet.ingest.durable == [], "the second must not be kept while the first is not"
    answers(one)
    for link in (one, two):
        assert fleet.hello(link).fields["seq"] == 0
        link.send(fragment(1))
    fleet.turn()
    assert acks(one) == acks(two) == [1]
    assert sorted(fleet.ingest.durable) == [("arm-1", BOOT, 1), ("arm-2", BOOT, 1)]


@pytest.mark.parametrize("where", ["offer", "admit"])
def test_full_disk_elsewhere_is_told_and_the_gateway_goes_on(fleet, where):
    link, other = fleet.robot("arm-1"), fleet.robot("arm-2")
    fleet.ingest.trouble[where] = DiskFull("no room")
    link.send(fragment(1) if where == "offer" else hello())
    fleet.turn()
    assert [bye["error"]["code"] for bye in byes(link)] == ["disk_full"]
    fleet.ingest.trouble.clear()
    other.send(fragment(1))
    fleet.turn()
    assert acks(other) == [1]
    assert fleet.hello(link).fields["seq"] == 0


def test_full_disk_is_said_once_in_an_interval(fleet, caplog):
    link = fleet.robot()
    fleet.ingest.trouble["offer"] = DiskFull("no room")
    for _ in range(20):
        link.send(fragment(1))
        fleet.turn()
        fleet.hello(link)
    assert sum("cannot be stored" in record.message for record in caplog.records) == 1


def test_a_group_that_ingest_dropped_without_a_word_is_asked_for_again(fleet):
    link = fleet.robot()
    fleet.ingest.commit = lambda: []
    link.send(fragment(1))
    fleet.turn()
    assert [bye["boot_id"] for bye in byes(link)] == [BOOT]


# Refusing


@pytest.mark.parametrize("message", [fragment(1), heartbeat(), Message(Kind.PULL, {"what": "manifest", "id": "1"})])
def test_hello_comes_first(fleet, message):
    link = fleet.hub.connect("arm-1")
    for _ in range(5):
        link.send(message)
    fleet.turn()
    said = byes(link)
    assert len(said) == 1 and said[0]["error"]["code"] == "protocol" and "before HELLO" in said[0]["error"]["what"]
    assert fleet.ingest.durable == [] and fleet.facts("refused")[0]["robot"] == "arm-1"
    assert fleet.hello(link).kind == Kind.WELCOME


def test_versions_that_do_not_meet_are_refused_with_both_named(fleet):
    link = fleet.hub.connect("arm-1")
    error = fleet.hello(link, protocols=[7, 9], software="9.0").fields["error"]
    assert error["code"] == "protocol" and "'9.0'" in error["what"] and "7 to 9" in error["what"]
    assert f"{PROTOCOLS[0]} to {PROTOCOLS[1]}" in error["rule"] and error["remedy"] == "update the gateway"
    assert fleet.hello(link, protocols=[0, 0]).fields["error"]["remedy"] == "update the robot"
    assert fleet.hello(link, protocols=[0, 7]).kind == Kind.WELCOME


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"spec_hash": "0" * 16}, "spec", "spec_hash is"),
        ({"spec": {"robot_type": "toy"}}, "spec", "cannot be read"),
        (
            {"spec": {"robot_type": "t", "control_hz": 1, "features": {"action": {"dtype": "float32", "shape": [1e400]}}}},
            "spec",
            "",
        ),
        (
            {"spec": {"robot_type": "t", "control_hz": 1, "features": {"x" * 50_000: {"dtype": "u", "shape": [1]}}}},
            "spec",
            "feature",
        ),
        ({"boot_id": "../../etc"}, "protocol", "boot_id"),
        ({"boot_id": "x" * 60_000}, "protocol", "boot_id"),
        ({"protocols": [1]}, "protocol", "protocols"),
        ({"protocols": ["1", "2"]}, "protocol", "protocols"),
    ],
)
def test_a_hello_out_of_the_rules_is_refused(fleet, changes, code, words):
    link = fleet.hub.connect("arm-1")
    error = fleet.hello(link, **changes).fields["error"]
    assert error["code"] == code and words in error["what"] and len(error["what"]) <= 1000
    assert fleet.count("fleet_refused", robot="arm-1", code=code) == 1
    assert fleet.membership.members == {}


def test_a_robot_that_the_policy_cannot_drive_is_refused(tmp_path):
    def accepts(spec):
        raise PolicyError("robot type 'toy' has 2 joints", rule="the policy drives 7")

    fleet = Fleet(tmp_path, accepts=accepts)
    error = fleet.hello(fleet.hub.connect("arm-1")).fields["error"]
    assert error == {"code": "policy", "what": "robot type 'toy' has 2 joints", "rule": "the policy drives 7", "remedy": ""}


@pytest.mark.parametrize(("payload", "code"), [(b"poison", "fragment_refused"), (b"fault", "error")])
def test_a_refused_fragment_harms_nobody_else(fleet, payload, code):
    bad, good = fleet.robot("arm-1"), fleet.robot("arm-2")
    bad.send(fragment(1))
    bad.send(fragment(2, payload))
    bad.send(fragment(3))
    good.send(fragment(1))
    fleet.turn()
    answered = answers(bad)
    said = [m.fields for m in answered if m.kind == Kind.BYE]
    assert [(bye["error"]["code"], bye["seq"]) for bye in said] == [(code, 2)]
    assert [m.fields["seq"] for m in answered if m.kind == Kind.ACK] in ([], [1])
    assert acks(good) == [1]
    assert fleet.facts("refused")[0]["error"]["code"] == code
    assert fleet.hello(bad).fields["seq"] == 1


@pytest.mark.parametrize("kind", [Kind.WELCOME, Kind.ACK, Kind.CHUNK, Kind.COMMAND])
def test_what_only_gateways_send_is_refused(fleet, kind):
    link = fleet.robot()
    values = {str: "x", int: 1, dict: {}, list: []}
    link.send(Message(kind, {name: values[form] for name, form in FIELDS[kind].items()}))
    fleet.turn()
    assert [bye["error"]["what"] for bye in byes(link)] == [f"a robot sent {kind.name}"]


# Connections


def test_the_newest_connection_of_a_robot_counts(fleet):
    old, new = fleet.robot(), fleet.hub.connect("arm-1")
    fleet.hello(new)
    assert "took over" in byes(old)[0]["error"]["what"]
    old.send(fragment(1))
    fleet.turn()
    assert fleet.ingest.durable == []
    new.send(fragment(1))
    fleet.turn()
    assert acks(new) == [1] and acks(old) == []
    assert [fact["event"] for fact in fleet.facts("member")] == ["joined", "replaced"]
    old.send(Message(Kind.BYE, {"error": {}}))
    new.send(fragment(2))
    fleet.turn()
    assert acks(new) == [2] and fleet.membership.num_live == 1


def test_leaving_and_falling_silent_are_told_apart(tmp_path):
    fleet = Fleet(tmp_path)
    one, two = fleet.robot("arm-1"), fleet.robot("arm-2")
    one.send(Message(Kind.BYE, {"error": {}}))
    fleet.turn()
    fleet.membership.members["arm-2"].last_seen_s -= 11
    fleet.tick()
    assert [(fact["robot"], fact["event"]) for fact in fleet.facts("member")] == [
        ("arm-1", "joined"),
        ("arm-2", "joined"),
        ("arm-1", "left"),
        ("arm-2", "lost"),
    ]
    answers(two)
    two.send(heartbeat())
    fleet.turn()
    assert byes(two), "a robot that was given up must be told to introduce itself again"
    assert fleet.hello(two).kind == Kind.WELCOME and fleet.facts("member")[-1]["event"] == "joined"


def test_heartbeats_carry_numbers_both_ways(fleet):
    link = fleet.robot()
    fleet.releases.version = 4
    fleet.tick()
    answers(link)
    link.send(heartbeat(version=3, spool=12))
    fleet.turn()
    answer = answers(link, Kind.HEARTBEAT)[0].fields
    assert answer["mono_ns"] == 7 and answer["metrics"] == {"release": 4} and abs(answer["time_ns"] - time.time_ns()) < 5e9
    fleet.gateway._show()
    value = fleet.gateway.metrics.registry.get_sample_value
    assert value("fleet_robot_version_lag", {"robot": "arm-1"}) == 1
    assert value("fleet_robot_spool_depth", {"robot": "arm-1"}) == 12


def test_the_state_of_robots_is_shown_in_the_view(tmp_path):
    class View(dict):
        put = dict.__setitem__

    view = View()
    fleet = Fleet(tmp_path, view=view)
    link = fleet.robot()
    link.send(heartbeat(version=3, spool=12, steps=100))
    fleet.turn()
    fleet.gateway._next_view = 0.0
    fleet.tick()
    state = view["arm-1"]
    assert (state["state"], state["version"], state["spool"], state["steps"]) == ("live", 3, 12, 100)
    assert abs(state["last_seen_ns"] - time.time_ns()) < 5e9 and abs(state["clock_offset_ms"]) < 5000


# Releases


def test_everyone_is_told_of_a_new_release_once(fleet):
    links = [fleet.robot(f"arm-{n}") for n in range(3)]
    fleet.releases.version = 1
    for _ in range(3):
        fleet.tick()
    late = fleet.robot("late")
    fleet.tick()
    for link in [*links, late]:
        told = answers(link, Kind.EVENT)
        assert [(m.fields["event"], m.fields["version"]) for m in told] == [("release", 1)]


def test_pulls_are_served_and_what_is_missing_is_said(fleet):
    link = fleet.robot()
    fleet.releases.pieces = {("manifest", "1"): b"{}", ("chunk", "aa"): b"weights"}
    for what, id in (("manifest", "1"), ("chunk", "aa"), ("chunk", "bb")):
        link.send(Message(Kind.PULL, {"what": what, "id": id}))
    fleet.turn(4)
    chunks = answers(link, Kind.CHUNK)
    assert [(m.fields["what"], m.fields["id"], bytes(m.payload)) for m in chunks] == [
        ("manifest", "1", b"{}"),
        ("chunk", "aa", b"weights"),
        ("chunk", "bb", b""),
    ]
    assert "error" not in chunks[1].fields and chunks[2].fields["error"]["code"] == "release"
    assert fleet.count("fleet_pulls_bytes", robot="arm-1") == len(b"{}weights")


def test_ingest_goes_on_while_large_releases_are_pulled(fleet):
    sender = fleet.robot("arm-0")
    fleet.releases.pieces["chunk", "a"] = bytes(4_000_000)
    for puller in [fleet.robot(f"arm-{n}") for n in range(1, 20)]:
        puller.send(Message(Kind.PULL, {"what": "chunk", "id": "a"}))
    sender.send(fragment(1))
    fleet.turn()
    assert acks(sender) == [1]
    assert fleet.releases.reads <= 3, "one turn serves a bounded number of bytes"


def test_robots_are_served_in_turn(fleet):
    greedy, modest = fleet.robot("arm-1"), fleet.robot("arm-2")
    for n in range(20):
        fleet.releases.pieces["chunk", str(n)] = bytes(1000)
        greedy.send(Message(Kind.PULL, {"what": "chunk", "id": str(n)}))
    modest.send(Message(Kind.PULL, {"what": "chunk", "id": "0"}))
    fleet.turn()
    assert len(answers(modest, Kind.CHUNK)) == 1 and len(answers(greedy, Kind.CHUNK)) == 1


def test_a_robot_that_does_not_read_blocks_nobody_and_is_read_for_once(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.hub._bound = 3
    slow, other = fleet.robot("arm-1"), fleet.robot("arm-2")
    fleet.releases.pieces = {("chunk", str(n)): bytes(10) for n in range(8)}
    for n in range(3):
        slow.send(Message(Kind.PULL, {"what": "chunk", "id": str(n)}))
        fleet.turn()
    slow.send(Message(Kind.PULL, {"what": "chunk", "id": "3"}))
    fleet.turn(50)
    assert fleet.releases.reads == 4
    other.send(Message(Kind.PULL, {"what": "chunk", "id": "5"}))
    other.send(fragment(1))
    fleet.turn(2)
    assert {m.kind for m in answers(other)} == {Kind.CHUNK, Kind.ACK}
    assert len(answers(slow, Kind.CHUNK)) == 3
    fleet.turn()
    assert len(answers(slow, Kind.CHUNK)) == 1


def test_too_many_waiting_pulls_are_refused(fleet):
    link = fleet.robot()
    for n in range(MAX_PULLS + 1):
        link.send(Message(Kind.PULL, {"what": "chunk", "id": str(n)}))
    fleet.turn()
    assert [bye["error"]["code"] for bye in byes(link)] == ["protocol"]
    assert fleet.gateway._pulls.num_waiting == 0


def test_an_endless_name_is_refused(fleet):
    link = fleet.robot()
    link.send(Message(Kind.PULL, {"what": "chunk", "id": "a" * 60_000}))
    fleet.turn()
    assert [bye["error"]["code"] for bye in byes(link)] == ["protocol"]


def test_a_loaded_release_is_journalled_by_our_clock(fleet):
    link = fleet.robot()
    created_ns = time.time_ns()
    ahead_ns = 3_600_000_000_000
    fields = heartbeat().fields
    link.send(Message(Kind.HEARTBEAT, {**fields, "time_ns": time.time_ns() + ahead_ns}))
    fleet.turn()
    loaded_ns = created_ns + 500_000_000 + ahead_ns
    link.send(Message(Kind.EVENT, {"event": "release_loaded", "version": 5, "created_ns": created_ns, "time_ns": loaded_ns}))
    link.send(Message(Kind.EVENT, {"event": "release_loaded", "version": "5"}))
    fleet.turn()
    fact = fleet.facts("loaded")[0]
    assert fact["version"] == 5 and 400 < fact["latency_ms"] < 1500
    assert fleet.membership.members["arm-1"].version == 5
    assert len(fleet.facts("loaded")) == 1 and byes(link)


# Hostile fields

scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
dicts = st.dictionaries(st.text(max_size=8), values, max_size=4)
features = st.dictionaries(
    st.sampled_from(["action", "observation.state", "x"]),
    st.fixed_dictionaries({}, optional={name: values for name in ("dtype", "shape", "unit", "low", "high", "codec")}),
)
typed = {
    str: st.text(max_size=40) | st.sampled_from([BOOT, "release_loaded", "chunk"]),
    int: st.integers(-(2**63), 2**64 - 1),
    list: st.lists(values, max_size=3),
    dict: dicts | st.fixed_dictionaries({"robot_type": values, "control_hz": values, "features": features | values}),
}


@st.composite
def messages(draw):
    kind = draw(st.sampled_from(list(Kind)))
    fields = {name: draw(typed[form]) for name, form in FIELDS[kind].items()}
    extra = draw(st.dictionaries(st.sampled_from(["version", "created_ns", "time_ns", "robot_id"]), values, max_size=3))
    return Message(kind, {**extra, **fields}, draw(st.binary(max_size=50)))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(messages(), min_size=1, max_size=8), st.booleans())
def test_whatever_a_robot_sends_the_others_are_served(tmp_path_factory, sent, welcomed):
    fleet = Fleet(tmp_path_factory.mktemp("fuzz"))
    good = fleet.robot("good")
    bad = fleet.robot("bad") if welcomed else fleet.hub.connect("bad")
    for message in sent:
        bad.send(message)
    good.send(fragment(1))
    fleet.turn(3)
    fleet.tick()
    fleet.gateway._show()
    assert acks(good) == [1]
    assert fleet.ingest.durable.count(("good", BOOT, 1)) == 1
