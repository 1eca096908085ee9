"""Hostile, broken and unlucky connections against a real gateway on real sockets."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import zmq

from fleet.identity import create_run_keys, enroll, revoke, server_keys
from fleet.schema import encode_fragment, steps_schema
from fleet.server.gateway import Gateway
from fleet.server.membership import Membership
from fleet.server.registry import Registry, RegistryServer
from fleet.spec import Feature, RobotSpec
from fleet.transport_zmq import ZmqRobotLink, ZmqServerLink, curve_keypair
from fleet.wire import MAX_PAYLOAD_BYTES, PROTOCOLS, Kind, Message, encode

SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))
ROOT = Path(__file__).resolve().parents[2]
SPEC = RobotSpec("toy", 20.0, {"action": Feature("float32", (2,)), "observation.state": Feature("float32", (4,))})
BOOT = "0123456789abcdef"
HELLO = Message(
    Kind.HELLO,
    {"protocols": list(PROTOCOLS), "software": "1", "boot_id": BOOT, "spec": SPEC.to_dict(), "spec_hash": SPEC.hash},
)


def fragment(seq, payload=b"steps", tables=None, boot_id=BOOT):
    return Message(Kind.FRAGMENT, {"boot_id": boot_id, "seq": seq, "spec_hash": SPEC.hash, "tables": tables or {}}, payload)


class MemoryIngest:
    """Counts what it is given; durable at once."""

    def __init__(self):
        self.group, self.durable = [], {}

    def admit(self, robot_id, boot_id, spec):
        return len(self.durable.get((robot_id, boot_id), []))

    def offer(self, robot_id, fields, payload):
        self.group.append((robot_id, fields["boot_id"], fields["seq"]))

    def commit(self):
        for robot_id, boot_id, seq in self.group:
            self.durable.setdefault((robot_id, boot_id), []).append(seq)
        group, self.group = self.group, []
        return group


class Chunks:
    def newest(self):
        return None

    def read(self, what, id):
        return bytes(4_000_000)


class Server:
    """A gateway in a thread of its own, on a free port."""

    def __init__(self, folder, view=None):
        self.keys = folder / "keys"
        create_run_keys(self.keys)
        self.link = ZmqServerLink("tcp://127.0.0.1:0", self.keys)
        self.ingest, self.membership = MemoryIngest(), Membership(5.0)
        self.gateway = Gateway(
            self.link,
            run_id="run-1",
            tasks={},
            settings={},
            ingest=self.ingest,
            releases=Chunks(),
            membership=self.membership,
            view=view,
        )
        self.link.on_malformed = self.gateway.count_malformed
        self.opened, self.stop = [], threading.Event()
        self.thread = threading.Thread(target=self.gateway.run, args=(self.stop,))
        self.thread.start()

    def enroll(self, robot_id):
        return enroll(self.keys, robot_id, self.link.endpoint, "run-1")

    def robot(self, robot_id):
        return self.dial(self.enroll(robot_id))

    def dial(self, credential):
        self.opened.append(Robot(credential))
        return self.opened[-1]

    def raw(self, credential, **options):
        """A socket with the robot's own keys, for what no link of ours would send."""
        self.opened.append(Raw(credential, **options))
        return self.opened[-1]

    def refused(self, robot_id, code="protocol"):
        value = self.gateway.metrics.registry.get_sample_value("fleet_refused_total", {"robot": robot_id, "code": code})
        return value or 0

    def close(self):
        for each in self.opened:
            each.close()
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.link.close()


class Robot:
    """The least that a robot does: HELLO, send from the mark, keep what is not acknowledged, say HELLO again."""

    def __init__(self, credential):
        self.link, self.mark, self.sent, self.greeted = ZmqRobotLink(credential), 0, 0, 0.0
        self.welcome, self.byes, self.connects = False, [], 0

    def pump(self, last_seq, make=fragment):
        """One turn towards having fragments up to ``last_seq`` acknowledged."""
        if self.link.connects != self.connects:
            self.welcome, self.connects, self.greeted = False, self.link.connects, 0.0
        if not self.welcome and time.monotonic() - self.greeted > 0.2 and self.link.send(HELLO):
            self.greeted = time.monotonic()
        while self.welcome and self.sent < min(last_seq, self.mark + 16) and self.link.send(make(self.sent + 1)):
            self.sent += 1
        message = self.link.receive(0.01)
        while message is not None:
            if message.kind == Kind.WELCOME:
                self.welcome, self.mark = True, message.fields["seq"]
                self.sent = self.mark
            elif message.kind == Kind.ACK:
                self.mark = max(self.mark, message.fields["seq"])
            elif message.kind == Kind.BYE:
                self.welcome = False
                self.byes.append(message.fields["error"])
            message = self.link.receive(0)

    def deliver(self, last_seq, timeout_s=10.0, make=fragment):
        wait_for(lambda: self.pump(last_seq, make) or self.mark >= last_seq, timeout_s)

    def close(self):
        self.link.close()


class Raw:
    def __init__(self, credential, routing_id=None, immediate=True, receive_hwm=1000):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IMMEDIATE, int(immediate))
        self.socket.setsockopt(zmq.RCVHWM, receive_hwm)
        if routing_id is not None:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.curve_serverkey = credential.server_public.encode()
        self.socket.curve_publickey, self.socket.curve_secretkey = credential.public.encode(), credential.secret.encode()
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(credential.endpoint)

    def send(self, *frames):
        assert self.socket.poll(5000, zmq.POLLOUT)
        self.socket.send_multipart(frames, zmq.NOBLOCK)

    def receive(self, timeout_s=5.0):
        return self.socket.recv_multipart() if self.socket.poll(int(timeout_s * 1000)) else None

    def was_cut(self, timeout_s=5.0):
        return bool(self.monitor.poll(int(timeout_s * 1000)))

    def close(self):
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        self.context.term()


def wait_for(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.close()


@pytest.fixture
def bystander(server):
    """A good robot that must be served before and after whatever happens to others."""
    robot = server.robot("bystander")
    robot.deliver(1)
    connects = robot.link.connects
    yield robot
    robot.deliver(5)
    assert server.ingest.durable["bystander", BOOT] == [1, 2, 3, 4, 5]
    assert robot.link.connects == connects and robot.byes == [], "nobody else's fault may reach this connection"


# Who may speak


def test_nothing_of_an_unknown_key_gets_through(server, bystander):
    real = server.enroll("arm-1")
    public, secret = curve_keypair()
    forged = type(real)(**{**real.__dict__, "public": public, "secret": secret})
    polite, rude = server.dial(forged), server.raw(forged, immediate=False)
    for _ in range(10):
        rude.send(*encode(HELLO))
        rude.send(*encode(fragment(1)))
    wait_for(lambda: polite.pump(1) or polite.link.state == "refused")
    assert polite.link.last_error.code == "identity"
    assert rude.receive(0.5) is None
    assert set(server.membership.members) == {"bystander"} and set(server.ingest.durable) == {("bystander", BOOT)}


def test_another_robots_public_key_is_worth_nothing_without_its_secret(server, bystander):
    real = server.enroll("arm-1")
    thief = server.raw(type(real)(**{**real.__dict__, "secret": curve_keypair()[1]}), immediate=False)
    thief.send(*encode(HELLO))
    assert thief.receive(0.5) is None
    assert "arm-1" not in server.membership.members


def test_strangers_on_the_port_harm_nobody(server, bystander):
    host, port = server.link.endpoint.removeprefix("tcp://").split(":")
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.setsockopt(zmq.LINGER, 0)
    plain.connect(server.link.endpoint)
    plain.send_multipart(encode(HELLO))
    noise = []
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" + bytes(8) + b"\x7f" + os.urandom(500), b""):
        noise.append(socket.create_connection((host, int(port))))
        noise[-1].sendall(data)
    bystander.deliver(2)
    assert not plain.poll(300) and set(server.membership.members) == {"bystander"}
    plain.close(0)
    context.term()
    for each in noise:
        each.close()


def test_a_robot_that_claims_anothers_name_is_still_itself(server, bystander):
    liar = server.raw(server.enroll("arm-1"))
    liar.socket.setsockopt(zmq.METADATA, b"X-User-Id:bystander")
    for message in (HELLO, fragment(1)):
        claim = Message(message.kind, {**message.fields, "robot_id": "bystander", "User-Id": "bystander"}, message.payload)
        liar.send(*encode(claim))
    wait_for(lambda: server.ingest.durable.get(("arm-1", BOOT)) == [1])
    assert server.ingest.durable["bystander", BOOT] == [1]


def test_a_robot_that_takes_anothers_routing_id_gets_nothing_of_it(server):
    first = server.raw(server.enroll("arm-1"), routing_id=b"same")
    first.send(*encode(HELLO))
    assert first.receive() is not None
    second = server.raw(server.enroll("arm-2"), routing_id=b"same")
    second.send(*encode(HELLO))
    assert second.receive(0.5) is None and "arm-2" not in server.membership.members
    first.send(*encode(fragment(1)))
    assert first.receive() is not None and second.receive(0.1) is None


def test_revoking_cuts_the_live_connection_and_refuses_the_next(server, bystander):
    robot = server.robot("arm-1")
    robot.deliver(1)
    revoke(server.keys, "arm-1")
    wait_for(lambda: robot.pump(10**6) or robot.link.state == "refused")
    taken = len(server.ingest.durable["arm-1", BOOT])
    for _ in range(30):
        robot.pump(10**6)
    assert len(server.ingest.durable["arm-1", BOOT]) == taken and robot.link.connects == 1


def test_a_new_key_ends_the_connections_of_the_old_one(server, bystander):
    old = server.robot("arm-1")
    old.deliver(1)
    revoke(server.keys, "arm-1")
    new = server.robot("arm-1")
    new.deliver(2)
    wait_for(lambda: old.pump(1) or old.link.state == "refused")
    new.deliver(3)
    assert new.link.connects == 1


def test_a_robot_enrolled_while_the_gateway_runs_is_served(server, bystander):
    robot = server.robot("arm-1")
    robot.deliver(1)
    revoke(server.keys, "arm-1")
    wait_for(lambda: robot.pump(1) or robot.link.state == "refused")
    (server.keys / "robots" / "arm-1.pub").write_text(robot.link._credential.public)  # the same key is let in again
    robot.deliver(2)
    assert robot.link.state == "connected" and robot.link.last_error is None


# What enrolled robots may send


@pytest.mark.parametrize(
    "frames",
    [
        (b"garbage", b""),
        (os.urandom(5000), os.urandom(5000)),
        (b"", b""),
        (b"alone",),
        (*encode(HELLO), b"third"),
        tuple(b"part" for _ in range(300)),
        (b"\xdd\xff\xff\xff\xff", b""),
        (b"\x91" * 60_000, b""),
        (bytes(65 * 1024), b""),
    ],
    ids=["garbage", "random", "empty", "one-frame", "three-frames", "300-frames", "huge-list", "deep-list", "long-header"],
)
def test_what_is_not_a_message_is_counted_and_its_sender_cut(server, bystander, frames):
    bad = server.raw(server.enroll("arm-1"))
    bad.send(*frames)
    said = bad.receive()
    assert said is not None and b"protocol" in said[0], "it is told why"
    assert bad.was_cut()
    assert server.link.malformed == {"arm-1": 1} and server.refused("arm-1") == 1


def test_a_robot_that_was_cut_off_may_come_back_and_do_better(server, bystander):
    credential = server.enroll("arm-1")
    bad = server.raw(credential)
    bad.send(b"garbage", b"")
    assert bad.was_cut()
    server.dial(credential).deliver(3)


def test_an_oversize_frame_ends_its_connection_only(server, bystander):
    bad = server.raw(server.enroll("arm-1"))
    header, _ = encode(fragment(1))
    bad.send(header, bytes(MAX_PAYLOAD_BYTES + 4096))
    assert bad.was_cut()
    assert ("arm-1", BOOT) not in server.ingest.durable


def test_a_robot_that_does_not_read_blocks_nobody(server, bystander):
    slow = server.raw(server.enroll("arm-1"), receive_hwm=1)
    slow.send(*encode(HELLO))
    for n in range(60):
        slow.send(*encode(Message(Kind.PULL, {"what": "chunk", "id": str(n)})))

    def sent():
        return server.gateway.metrics.registry.get_sample_value("fleet_pulls_bytes_total", {"robot": "arm-1"}) or 0

    wait_for(lambda: sent() > 0)
    before = -1
    while before != sent():  # until the gateway can send it no more
        before = sent()
        time.sleep(0.3)
    assert before <= 25 * 4_000_000, "what a robot does not read must not pile up in the gateway"
    quick = server.robot("arm-2")
    started = time.monotonic()
    quick.deliver(20)
    assert time.monotonic() - started < 2.0
    turns, receive = [], server.link.receive
    server.link.receive = lambda timeout_s: (turns.append(1), receive(timeout_s))[1]
    time.sleep(0.5)
    assert len(turns) < 200, "waiting for a slow reader must not burn a core"


def test_a_robot_that_floods_and_never_reads_blocks_nobody(server, bystander):
    flood = server.raw(server.enroll("arm-1"))
    flood.send(*encode(HELLO))
    header, payload = encode(Message(Kind.HEARTBEAT, {"time_ns": 0, "mono_ns": 0, "metrics": {}}))
    stop = time.monotonic() + 1.0
    while time.monotonic() < stop:
        for _ in range(100):
            if flood.socket.poll(0, zmq.POLLOUT):
                flood.socket.send_multipart([header, payload], zmq.NOBLOCK)
    started = time.monotonic()
    server.robot("arm-2").deliver(5)
    assert time.monotonic() - started < 3.0


# Ends and restarts

GATEWAY_PROCESS = """
import sys, threading
from pathlib import Path
from buffer.ingest import Ingest
from buffer.log import Log
from fleet.server.gateway import Gateway
from fleet.server.membership import Membership
from fleet.server.releases import ReleaseStore
from fleet.transport_zmq import ZmqServerLink
folder, bind = Path(sys.argv[1]), sys.argv[2]
link = ZmqServerLink(bind, folder / "keys")
ingest = Ingest(Log(folder / "buffer"))
gateway = Gateway(link, run_id="run-1", tasks={}, settings={}, ingest=ingest, releases=ReleaseStore(folder / "releases"),
                  membership=Membership())
print(link.endpoint, flush=True)
gateway.run(threading.Event())
"""


def start_gateway(folder, bind):
    process = subprocess.Popen(
        [sys.executable, "-c", GATEWAY_PROCESS, str(folder), bind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def real_fragment(robot_id, seq):
    """Three steps of episode 0, seq by seq."""
    count = 3
    frames = range((seq - 1) * count, seq * count)
    values = {
        "robot_id": [robot_id] * count,
        "boot_id": [BOOT] * count,
        "episode_id": [0] * count,
        "frame_index": list(frames),
        "time_ns": [time.time_ns()] * count,
        "mono_ns": [time.monotonic_ns()] * count,
        "task": ["reach"] * count,
        "source": [0] * count,
        "operator_id": [""] * count,
        "intervention": [False] * count,
        "chunk_id": [-1] * count,
        "chunk_index": [-1] * count,
        "next.reward": [0.0] * count,
        "next.terminated": [False] * count,
        "next.truncated": [False] * count,
        "action": [[0.0, 0.0]] * count,
        "observation.state": [[float(seq)] * 4] * count,
    }
    tables, payload = encode_fragment({"steps": pa.RecordBatch.from_pydict(values, schema=steps_schema(SPEC))})
    return fragment(seq, payload, tables)


def test_killed_gateways_come_back_and_nothing_is_lost_doubled_or_mixed(tmp_path):
    create_run_keys(tmp_path / "keys")
    (tmp_path / "releases").mkdir()
    process, endpoint = start_gateway(tmp_path, "tcp://127.0.0.1:0")
    robots = {name: Robot(enroll(tmp_path / "keys", name, endpoint, "run-1")) for name in ("arm-1", "arm-2")}
    acknowledged = dict.fromkeys(robots, 0)
    try:
        for round_number in range(1, 3 + 2 * SCALE):
            deadline = time.monotonic() + 20
            while min(robot.mark for robot in robots.values()) < 40 * round_number:
                assert time.monotonic() < deadline, "robots did not get on"
                for name, robot in robots.items():
                    robot.pump(10**6, lambda seq, name=name: real_fragment(name, seq))
            process.send_signal(signal.SIGKILL)  # in the middle of sending
            process.wait()
            acknowledged = {name: robot.mark for name, robot in robots.items()}
            process.stdout.close()
            process, again = start_gateway(tmp_path, endpoint)
            assert again == endpoint
        for name, robot in robots.items():
            robot.deliver(acknowledged[name] + 5, 20, lambda seq, name=name: real_fragment(name, seq))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for robot in robots.values():
            robot.close()
    kept = json.loads(subprocess.check_output([sys.executable, "-c", READ_KEYS, str(tmp_path / "buffer")], cwd=ROOT, text=True))
    for name, robot in robots.items():
        mine = [seq for who, boot, seq in kept if (who, boot) == (name, BOOT)]
        assert mine == list(range(1, len(mine) + 1)), "each number once, in order"
        assert len(mine) >= robot.mark
    assert {who for who, _, _ in kept} == set(robots)


READ_KEYS = """
import json, sys
from pathlib import Path
from buffer.reader import LogReader
records = LogReader(Path(sys.argv[1])).poll()
print(json.dumps([(r.robot_id, r.boot_id, r.seq) for r in records]))
"""


def test_the_gateway_goes_on_when_the_registry_is_killed(tmp_path):
    registry_server = RegistryServer(tmp_path / "registry")
    registry = Registry(registry_server.url)
    server = Server(tmp_path, view=registry)
    try:
        robot = server.robot("arm-1")
        robot.deliver(1)
        wait_for(lambda: "arm-1" in registry.robots())
        os.kill(registry_server.pid, signal.SIGKILL)
        registry_server.process.wait()
        slowest = 0.0
        for seq in range(2, 30):
            started = time.monotonic()
            robot.deliver(seq)
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.05)
        assert slowest < 0.5 and robot.link.connects == 1
        wait_for(lambda: not registry.reachable)
        registry_server = RegistryServer(tmp_path / "registry")
        wait_for(lambda: registry.reachable)
        server.gateway._next_view = 0.0
        wait_for(lambda: registry.robots()["arm-1"]["last_seen_ns"] > time.time_ns() - 5_000_000_000)
    finally:
        server.close()
        registry.close()
        registry_server.stop()


def test_the_server_key_of_a_run_is_not_in_any_credential(server):
    credential = server.enroll("arm-1")
    public, secret = server_keys(server.keys)
    assert credential.server_public == public and secret not in credential.__dict__.values()
