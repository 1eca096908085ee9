"""The two ends of a connection: the same tests on the in-memory twin and on ZeroMQ."""

import time

import pytest

from fleet.errors import ConfigError, PortInUse, ProtocolError
from fleet.identity import create_run_keys, enroll, revoke
from fleet.transport import MemoryHub
from fleet.transport_zmq import ZmqRobotLink, ZmqServerLink
from fleet.wire import MAX_PAYLOAD_BYTES, Kind, Message

BOOT = "0123456789abcdef"


def fragment(seq, payload=b"payload"):
    return Message(Kind.FRAGMENT, {"boot_id": BOOT, "seq": seq, "spec_hash": "00", "tables": {}}, payload)


def ack(seq):
    return Message(Kind.ACK, {"boot_id": BOOT, "seq": seq})


class MemoryWire:
    def __init__(self, tmp_path):
        self.server = MemoryHub(bound=64)

    def robot(self, robot_id):
        return self.server.connect(robot_id)

    def close(self):
        self.server.close()


class ZmqWire:
    def __init__(self, tmp_path):
        self.keys, self.links = tmp_path / "keys", []
        create_run_keys(self.keys)
        self.server = ZmqServerLink("tcp://127.0.0.1:0", self.keys)
        self.credentials = {}

    def robot(self, robot_id):
        if robot_id not in self.credentials:
            self.credentials[robot_id] = enroll(self.keys, robot_id, self.server.endpoint, "run-1")
        self.links.append(ZmqRobotLink(self.credentials[robot_id]))
        return self.links[-1]

    def close(self):
        for link in self.links:
            link.close()
        self.server.close()


@pytest.fixture(params=[MemoryWire, ZmqWire], ids=["memory", "zmq"])
def wire(request, tmp_path):
    wire = request.param(tmp_path)
    yield wire
    wire.close()


@pytest.fixture
def zmq_wire(tmp_path):
    wire = ZmqWire(tmp_path)
    yield wire
    wire.close()


def push(link, message, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not link.send(message):
        assert time.monotonic() < deadline, "the message was never taken"
        time.sleep(0.002)


def test_a_message_arrives_whole_with_its_sender(wire):
    robot = wire.robot("arm-1")
    push(robot, fragment(1, b"\x00" * 100_000))
    peer, message = wire.server.receive(5)
    assert peer.robot_id == "arm-1"
    assert message.kind == Kind.FRAGMENT and message.fields["seq"] == 1
    assert bytes(message.payload) == b"\x00" * 100_000


def test_answers_go_to_the_connection_that_asked(wire):
    robots = {name: wire.robot(name) for name in ("arm-1", "arm-2", "arm-3")}
    peers = {}
    for seq, robot in enumerate(robots.values(), 1):
        push(robot, fragment(seq))
    for _ in robots:
        peer, message = wire.server.receive(5)
        peers[peer.robot_id] = (peer, message.fields["seq"])
    for peer, seq in peers.values():
        assert wire.server.send(peer, ack(seq))
    for seq, robot in enumerate(robots.values(), 1):
        assert robot.receive(5).fields["seq"] == seq
        assert robot.receive(0) is None


def test_order_is_kept(wire):
    robot = wire.robot("arm-1")
    for seq in range(1, 41):
        push(robot, fragment(seq))
    assert [wire.server.receive(5)[1].fields["seq"] for _ in range(40)] == list(range(1, 41))


def test_two_connections_of_one_robot_are_two_peers(wire):
    first, second = wire.robot("arm-1"), wire.robot("arm-1")
    push(first, fragment(1))
    one, _ = wire.server.receive(5)
    push(second, fragment(2))
    two, _ = wire.server.receive(5)
    assert one.robot_id == two.robot_id == "arm-1" and one != two
    wire.server.send(one, ack(1))
    assert first.receive(5).fields["seq"] == 1 and second.receive(0.05) is None


def test_waiting_for_nothing_ends_in_time(wire):
    robot = wire.robot("arm-1")
    for receive in (robot.receive, wire.server.receive):
        started = time.monotonic()
        assert receive(0.1) is None
        assert 0.09 <= time.monotonic() - started < 1.0


def test_send_never_blocks_when_nobody_reads(wire):
    robot = wire.robot("arm-1")
    push(robot, fragment(1))
    wire.server.receive(5)
    slowest, answers = 0.0, []
    for seq in range(2, 1000):
        started = time.monotonic()
        answers.append(robot.send(fragment(seq, b"\x00" * 200_000)))
        slowest = max(slowest, time.monotonic() - started)
        if not answers[-1]:
            break
    assert not answers[-1] and any(answers)
    assert slowest < 0.5


def test_disconnect_cuts_every_connection_of_that_robot_only(wire):
    first, second, other = wire.robot("arm-1"), wire.robot("arm-1"), wire.robot("arm-2")
    peers = []
    for robot in (first, second, other):
        push(robot, fragment(1))
        peers.append(wire.server.receive(5)[0])
    wire.server.disconnect("arm-1")
    assert [wire.server.send(peer, ack(1)) for peer in peers] == [False, False, True]
    assert other.receive(5).fields["seq"] == 1
    assert first.receive(0.05) is None and second.receive(0.05) is None


def test_sending_to_a_peer_that_has_gone_says_so(wire):
    robot = wire.robot("arm-1")
    push(robot, fragment(1))
    peer, _ = wire.server.receive(5)
    robot.close()
    deadline = time.monotonic() + 5
    while wire.server.send(peer, ack(1)):
        assert time.monotonic() < deadline
        wire.server.receive(0.01)


def test_a_closed_link_answers_no(wire):
    robot = wire.robot("arm-1")
    robot.close()
    assert robot.send(fragment(1)) is False
    assert robot.receive(0.01) is None


def test_a_message_that_is_too_large_is_refused_by_its_sender(wire):
    robot = wire.robot("arm-1")
    push(robot, fragment(1))
    peer, _ = wire.server.receive(5)
    with pytest.raises(ProtocolError, match="at most"):
        robot.send(fragment(2, bytes(MAX_PAYLOAD_BYTES + 1)))
    with pytest.raises(ProtocolError, match="ACK carries"):
        wire.server.send(peer, Message(Kind.ACK, {"boot_id": BOOT}))


def test_the_largest_message_passes(zmq_wire):
    robot = zmq_wire.robot("arm-1")
    push(robot, fragment(1, bytes(MAX_PAYLOAD_BYTES)))
    assert len(zmq_wire.server.receive(10)[1].payload) == MAX_PAYLOAD_BYTES


def test_state_tells_enrolled_from_refused_from_silence(zmq_wire, tmp_path):
    robot = zmq_wire.robot("arm-1")
    push(robot, fragment(1))
    assert robot.state == "connected" and robot.last_error is None and robot.connects == 1

    revoke(zmq_wire.keys, "arm-1")
    refused = zmq_wire.robot("arm-1")
    deadline = time.monotonic() + 5
    while refused.state != "refused" and time.monotonic() < deadline:
        refused.receive(0.05)
    assert refused.state == "refused"
    assert refused.last_error.code == "identity" and "fleet enroll arm-1" in refused.last_error.remedy

    zmq_wire.server.close()
    deadline = time.monotonic() + 5
    while "nothing answers" not in str(robot.last_error) and time.monotonic() < deadline:
        robot.receive(0.05)
    assert robot.state == "connecting" and robot.last_error.code == "gateway_unreachable"
    assert f"nothing answers at {zmq_wire.server.endpoint}" in str(robot.last_error)


def test_a_gateway_of_another_run_is_not_taken_for_ours(zmq_wire, tmp_path):
    create_run_keys(tmp_path / "other")
    zmq_wire.credentials["arm-1"] = enroll(tmp_path / "other", "arm-1", zmq_wire.server.endpoint, "run-2")
    robot = zmq_wire.robot("arm-1")
    deadline = time.monotonic() + 5
    while robot.last_error is None and time.monotonic() < deadline:
        robot.receive(0.05)
    assert robot.last_error.code == "gateway_unreachable" and "is not the gateway of run 'run-2'" in robot.last_error.what


def test_port_in_use_names_the_address(zmq_wire):
    with pytest.raises(PortInUse) as caught:
        ZmqServerLink(zmq_wire.server.endpoint, zmq_wire.keys)
    assert zmq_wire.server.endpoint in caught.value.what and caught.value.remedy
    push(zmq_wire.robot("arm-1"), fragment(1))
    assert zmq_wire.server.receive(5) is not None


@pytest.mark.parametrize("bind", ["nonsense", "tcp://256.1.1.1:70000", "tcp://127.0.0.1"])
def test_address_that_cannot_be_listened_on_names_it(zmq_wire, bind):
    with pytest.raises(ConfigError, match="cannot listen on"):
        ZmqServerLink(bind, zmq_wire.keys)
