"""The real wire: ROUTER and DEALER sockets over TCP, encrypted and authenticated by CURVE.

A robot proves who it is by its key. The gateway's ZAP handler maps the key to a robot through ``keys/robots`` and
libzmq stamps every message of that connection with the name (User-Id): no message can claim to be of another robot.
Routing ids are libzmq's own and handover is off, so no connection can take another's replies.

Neither end is shared between threads; each may be made in one thread and used in another.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from fleet.errors import ConfigError, FleetError, GatewayUnreachable, IdentityError, PortInUse, ProtocolError
from fleet.identity import Credential, public_key_of, robot_of, server_keys
from fleet.transport import Peer
from fleet.wire import MAX_PAYLOAD_BYTES, Kind, Message, decode, encode

log = logging.getLogger(__name__)

ROBOT_HWM = 64  # messages a robot queues on the socket; everything else stays in its spool
SERVER_SEND_HWM = 16  # messages a slow robot can hold in the gateway's memory, at most a chunk of a release each
SERVER_RECEIVE_HWM = 32
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + 1024  # CURVE adds a few bytes to each frame
COPY_BELOW_BYTES = 64 * 1024
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 10_000
FIRST_RETRY_S, MAX_RETRY_S = 0.25, 4.0
REVOKED_CHECK_S = 0.5
BYE_GRACE_S = 0.2  # between a BYE and the cut, so that the BYE gets out
ZAP_DOMAIN = b"fleet"


def curve_keypair() -> tuple[str, str]:
    """A new CURVE key pair (public, secret) as Z85 text."""
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def _bound_socket(sock: zmq.Socket[bytes], send_hwm: int, receive_hwm: int) -> None:
    """Options that must be set before bind or connect."""
    options = {
        zmq.LINGER: 0,
        zmq.SNDHWM: send_hwm,
        zmq.RCVHWM: receive_hwm,
        zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
        zmq.HEARTBEAT_TIMEOUT: HEARTBEAT_TIMEOUT_MS,
        zmq.HEARTBEAT_TTL: HEARTBEAT_TIMEOUT_MS,
        zmq.HANDSHAKE_IVL: 10_000,
    }
    for option, value in options.items():
        sock.setsockopt(option, value)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)


class ZmqRobotLink:
    """The robot's end: dials the gateway of its credential and keeps dialling.

    A new connection needs a new HELLO; ``connects`` counts them, so that its user can tell.

    Attributes:
        state: "connecting", "connected", or "refused" when the gateway does not take this robot's key.
        last_error: Why it is not connected: IdentityError (not enrolled, or revoked) or GatewayUnreachable.
        connects: How often a connection came about.
    """

    def __init__(self, credential: Credential) -> None:
        self._credential = credential
        self._context = zmq.Context()
        self.state = "connecting"
        self.last_error: FleetError | None = None
        self.connects = 0
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._answered = False  # the TCP connection of this attempt was made
        self._retry_s, self._retry_at = FIRST_RETRY_S, 0.0
        self._dial()

    def send(self, message: Message) -> bool:
        """Queues a message. False while not connected, or when the queue is full.

        Raises:
            ProtocolError: The message is not of the wire's form.
        """
        self._watch()
        if self._socket is None or self.state != "connected":
            return False
        header, payload = encode(message)
        try:
            self._socket.send_multipart([header, payload], zmq.NOBLOCK, copy=len(payload) < COPY_BELOW_BYTES)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after ``timeout_s``.

        Raises:
            ProtocolError: The gateway sent something that this version cannot read.
        """
        deadline = time.monotonic() + timeout_s
        while not self._context.closed:
            self._watch()
            left = deadline - time.monotonic()
            if self._socket is None:
                if left <= 0:
                    return None
                time.sleep(min(left, 0.05))
                continue
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                if left <= 0:
                    return None
                self._wait(left)
                continue
            if len(frames) != 2:
                raise ProtocolError(f"the gateway sent {len(frames)} frames", rule="a message is exactly two frames")
            return decode(frames[0].bytes, frames[1].buffer)
        return None

    def close(self) -> None:
        """Closes the link; later ``send`` answers False and ``receive`` None."""
        self._hang_up()
        self._context.term()
        self.state = "connecting"

    def _dial(self) -> None:
        sock = self._context.socket(zmq.DEALER)
        _bound_socket(sock, ROBOT_HWM, ROBOT_HWM)
        sock.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits in the socket of a gateway that is not there
        sock.setsockopt(zmq.CONNECT_TIMEOUT, 5_000)
        sock.setsockopt(zmq.RECONNECT_IVL, 100)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        self._secure(sock)
        self._monitor = sock.get_monitor_socket()
        self._socket = sock
        sock.connect(self._credential.endpoint)

    def _secure(self, sock: zmq.Socket[bytes]) -> None:
        sock.curve_serverkey = self._credential.server_public.encode()
        sock.curve_publickey = self._credential.public.encode()
        sock.curve_secretkey = self._credential.secret.encode()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(0)
            self._socket.close(0)
            self._socket = self._monitor = None

    def _wait(self, timeout_s: float) -> None:
        poller = zmq.Poller()
        for sock in (self._socket, self._monitor):
            if sock is not None:
                poller.register(sock, zmq.POLLIN)
        poller.poll(max(int(timeout_s * 1000), 1))

    def _watch(self) -> None:
        """Follows what the socket's monitor says, and dials again when a refusal has rested long enough."""
        while self._monitor is not None and self._monitor.poll(0):
            self._note(zmq.Event(recv_monitor_message(self._monitor)["event"]))
        if self._socket is None and not self._context.closed and time.monotonic() >= self._retry_at:
            self._dial()

    def _note(self, event: zmq.Event) -> None:
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.state, self.last_error, self._retry_s = "connected", None, FIRST_RETRY_S
            self.connects += 1
            return
        if event == zmq.Event.CONNECTED:
            self._answered = True
            return
        if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
            self._turned_away()
            return
        where = self._credential.endpoint
        if event in (zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, zmq.Event.HANDSHAKE_FAILED_PROTOCOL):
            what = f"what answers at {where} is not the gateway of run {self._credential.run_id!r}"
            remedy = "check the address; after `fleet up` with new keys enrol the robot again"
            rule = "a gateway proves that it has the run's server key"
            self._down("connecting", GatewayUnreachable(what, rule=rule, remedy=remedy))
        if event == zmq.Event.DISCONNECTED and self.state == "connected":
            remedy = "none needed: the robot spools and dials again"
            self._down("connecting", GatewayUnreachable(f"the connection to {where} was lost", remedy=remedy))
        if event == zmq.Event.CONNECT_RETRIED:
            if not self._answered:
                remedy = "start it with `fleet up`, or check address and firewall; the robot spools and dials again"
                rule = "the gateway of the run listens there"
                self._down("connecting", GatewayUnreachable(f"nothing answers at {where}", rule=rule, remedy=remedy))
            self._answered = False

    def _turned_away(self) -> None:
        """The gateway refuses this key. The socket will never come back by itself, so a new one is made after a while."""
        robot_id = self._credential.robot_id
        what = f"the gateway at {self._credential.endpoint} does not take the key of robot {robot_id!r}"
        remedy = f"it was revoked, or never enrolled there; enrol it on the server: `fleet enroll {robot_id}`"
        self._down("refused", IdentityError(what, rule="only enrolled robots may connect", remedy=remedy))
        self._hang_up()
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(self._retry_s * 2, MAX_RETRY_S)

    def _down(self, state: str, error: FleetError) -> None:
        self.state, self.last_error = state, error


@dataclasses.dataclass
class _Connection:
    """One live connection: whose it is, by which key, and its TCP socket as (descriptor, address of the peer)."""

    robot_id: str
    key: str
    fd: int
    address: object


class ZmqServerLink:
    """The gateway's end: listens, and talks to enrolled keys only.

    Args:
        bind: ``tcp://HOST:PORT``; port 0 takes a free one, see ``endpoint``.
        keys: ``keys`` of the run folder. Enrolment counts from the next handshake, revocation within ``REVOKED_CHECK_S``.

    Attributes:
        endpoint: The address with the actual port.
        malformed: By robot, how many messages were not of the wire's form.
        on_malformed: Called with (robot_id, error) for each of them, before its sender is cut.

    Raises:
        PortInUse: Another process listens there.
        ConfigError: The address cannot be listened on.
        IdentityError: ``keys`` has no server key.
    """

    def __init__(self, bind: str, keys: Path) -> None:
        self._server_keys = server_keys(keys)
        self._keys, self._context = keys, zmq.Context()
        self._zap = _ZapHandler(self._context, keys)
        sock = self._context.socket(zmq.ROUTER)
        _bound_socket(sock, SERVER_SEND_HWM, SERVER_RECEIVE_HWM)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 0)
        sock.setsockopt(zmq.BACKLOG, 512)
        self._secure(sock)
        self._socket = sock
        try:
            sock.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise _bind_error(bind, error) from None
        self.endpoint = bytes(sock.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
        self.malformed: collections.Counter[str] = collections.Counter()
        self.on_malformed: Callable[[str, ProtocolError], None] = lambda robot_id, error: None
        self._connections: dict[bytes, _Connection] = {}
        self._deaf: collections.OrderedDict[bytes, None] = collections.OrderedDict()  # what they still send is dropped
        self._to_cut: collections.deque[tuple[float, _Connection]] = collections.deque()
        self._next_check = 0.0

    def receive(self, timeout_s: float) -> tuple[Peer, Message] | None:
        """The next valid message, or None after ``timeout_s``. The payload is a view on the received frame."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            self._housekeep(now)
            if not self._socket.poll(0):
                if now >= deadline:
                    return None
                self._socket.poll(max(int(min(deadline - now, BYE_GRACE_S) * 1000), 1))
                continue
            item = self._receive_one()
            if item is not None:
                return item

    def send(self, peer: Peer, message: Message) -> bool:
        """Queues a message for one connection. False when it is gone, was cut, or does not read fast enough.

        Raises:
            ProtocolError: The message is not of the wire's form.
        """
        if peer.connection in self._deaf:
            return False
        return self._send(peer.connection, message)

    def disconnect(self, robot_id: str) -> None:
        """Cuts every live connection of a robot at once; what it sent and was not received yet is dropped."""
        for routing_id, connection in list(self._connections.items()):
            if connection.robot_id == robot_id:
                self._cut(routing_id, connection)

    def close(self) -> None:
        """Closes the socket and all connections. Robots dial again."""
        self._socket.close(0)
        self._context.term()
        self._zap.join()

    def _secure(self, sock: zmq.Socket[bytes]) -> None:
        public, secret = self._server_keys
        sock.curve_server = 1
        sock.curve_publickey, sock.curve_secretkey = public.encode(), secret.encode()
        sock.zap_domain = ZAP_DOMAIN

    def _receive_one(self) -> tuple[Peer, Message] | None:
        routing_id = self._socket.recv(zmq.NOBLOCK)
        frames: list[zmq.Frame] = []
        num_frames = 0
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            num_frames += 1
            if num_frames <= 2:
                frames.append(frame)
        if routing_id in self._deaf or not frames:
            return None
        connection = self._connection_of(routing_id, frames[0])
        try:
            if num_frames != 2:
                raise ProtocolError(f"a message of {num_frames} frames", rule="a message is exactly two frames")
            return Peer(connection.robot_id, routing_id), decode(frames[0].bytes, frames[1].buffer)
        except ProtocolError as error:
            self._turn_out(routing_id, connection, error)
            return None

    def _connection_of(self, routing_id: bytes, frame: zmq.Frame) -> _Connection:
        known = self._connections.get(routing_id)
        if known is None:
            fd = int(frame.get(zmq.SRCFD))
            known = _Connection(*self._identity_of(routing_id, frame), fd, _peer_address(fd))
            self._connections[routing_id] = known
        return known

    def _identity_of(self, routing_id: bytes, frame: zmq.Frame) -> tuple[str, str]:
        """The robot and its key, as libzmq has them from the ZAP handler; nothing that a robot says counts."""
        return str(frame.get("User-Id")), str(frame.get("Fleet-Key"))

    def _turn_out(self, routing_id: bytes, connection: _Connection, error: ProtocolError) -> None:
        self.malformed[connection.robot_id] += 1
        log.warning("robot %s is cut off: %s", connection.robot_id, error)
        self._send(routing_id, Message(Kind.BYE, {"error": error.to_fields()}))
        self._make_deaf(routing_id)
        self._to_cut.append((time.monotonic() + BYE_GRACE_S, connection))
        self.on_malformed(connection.robot_id, error)

    def _send(self, routing_id: bytes, message: Message) -> bool:
        header, payload = encode(message)
        try:
            self._socket.send_multipart([routing_id, header, payload], zmq.NOBLOCK, copy=len(payload) < COPY_BELOW_BYTES)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def _make_deaf(self, routing_id: bytes) -> None:
        self._deaf[routing_id] = None
        while len(self._deaf) > 4096:  # routing ids are never reused; the oldest have long fallen silent
            self._deaf.popitem(last=False)

    def _cut(self, routing_id: bytes, connection: _Connection) -> None:
        self._make_deaf(routing_id)
        self._connections.pop(routing_id, None)
        _shut_down(connection)

    def _housekeep(self, now: float) -> None:
        while self._to_cut and self._to_cut[0][0] <= now:
            _shut_down(self._to_cut.popleft()[1])
        if now < self._next_check:
            return
        self._next_check = now + REVOKED_CHECK_S
        enrolled: dict[str, str | None] = {}
        for routing_id, connection in list(self._connections.items()):
            robot_id = connection.robot_id
            if robot_id not in enrolled:
                enrolled[robot_id] = public_key_of(self._keys, robot_id)
            if enrolled[robot_id] != connection.key:
                log.warning("robot %s is cut off: its key is no longer enrolled", robot_id)
                self._cut(routing_id, connection)
            elif connection.address is None or _peer_address(connection.fd) != connection.address:
                del self._connections[routing_id]  # it has gone by itself


class _ZapHandler(threading.Thread):
    """Answers libzmq's question whether a key may connect: yes for enrolled robots, with the robot's name."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Path) -> None:
        super().__init__(name="zap", daemon=True)
        self._keys = keys
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")  # bound before the ROUTER is: without a handler libzmq lets all in
        self.start()

    def run(self) -> None:
        try:
            while True:
                request = self._socket.recv_multipart()
                self._socket.send_multipart(self._answer(request))
        except zmq.ContextTerminated:
            self._socket.close(0)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        version, request_id, domain, address, _, mechanism, *credentials = request
        robot_id, key, status, text = None, "", b"400", b"not enrolled"
        if domain == ZAP_DOMAIN and mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            key = z85.encode(credentials[0]).decode("ascii")
            try:
                robot_id = robot_of(self._keys, key)
            except OSError as error:
                log.error("keys cannot be read: %s", error)
                status, text = b"300", b"keys cannot be read"  # temporary: the robot tries again
        if robot_id is None:
            log.info("a key that is not enrolled was refused, from %s", address.decode("ascii", "replace"))
            return [version, request_id, status, text, b"", b""]
        return [version, request_id, b"200", b"OK", robot_id.encode(), _property(b"Fleet-Key", key.encode())]


def _property(name: bytes, value: bytes) -> bytes:
    """One ZMTP metadata property."""
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def _peer_address(fd: int) -> object:
    """Address of the other end of a TCP socket that belongs to libzmq; None when it is not one (any more)."""
    try:
        copy = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None
    with copy:
        try:
            return copy.getpeername()
        except OSError:
            return None


def _shut_down(connection: _Connection) -> None:
    """Ends a TCP connection under libzmq. The address is compared, because the descriptor may be another's by now."""
    try:
        copy = socket.socket(fileno=os.dup(connection.fd))
    except OSError:
        return  # gone already
    with copy:
        try:
            if copy.getpeername() == connection.address:
                copy.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # gone already


def _bind_error(bind: str, error: zmq.ZMQError) -> FleetError:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"{bind} is in use",
            rule="one gateway listens on one address",
            remedy="stop the other process (is this run up already?), or set another port; port 0 takes a free one",
        )
    return ConfigError(
        f"cannot listen on {bind!r}: {error}",
        rule="tcp://ADDRESS:PORT of this machine",
        remedy="use tcp://0.0.0.0:PORT for all networks",
    )
