"""The two ends of a connection as small protocols, with an in-memory twin for tests.

The robot's end never blocks in ``send``: a full queue is an answer (False), because the spool keeps the data.
Who a peer is comes from the connection itself (``Peer.robot_id``), never from a message.
``fleet/transport_zmq.py`` is the real one.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import time
from typing import Protocol

from fleet.wire import Message, decode, encode


@dataclasses.dataclass(frozen=True)
class Peer:
    """An authenticated connection: the robot behind it, and which of its connections this is."""

    robot_id: str
    connection: bytes


class RobotLink(Protocol):
    """The robot's end. ``connects`` counts the connections that came about: each needs a HELLO of its own."""

    connects: int

    def send(self, message: Message) -> bool:
        """Queues a message. False when the queue is full or the link is closed: try again later."""
        ...

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after ``timeout_s``."""
        ...

    def close(self) -> None: ...


class ServerLink(Protocol):
    """The gateway's end."""

    def receive(self, timeout_s: float) -> tuple[Peer, Message] | None:
        """The next valid message. Frames that are not one are counted, and their sender is cut off."""
        ...

    def send(self, peer: Peer, message: Message) -> bool:
        """Queues a message for one connection. False when it is gone or its queue is full."""
        ...

    def disconnect(self, robot_id: str) -> None:
        """Cuts every live connection of a robot, at once."""
        ...

    def close(self) -> None: ...


class _Queue:
    """A bounded queue with a timeout on the reading side."""

    def __init__(self, bound: int) -> None:
        self._items: collections.deque[tuple[Peer, tuple[bytes, bytes]]] = collections.deque()
        self._bound, self._ready = bound, threading.Condition()

    def put(self, peer: Peer, message: Message) -> bool:
        header, payload = encode(message)
        with self._ready:
            if len(self._items) >= self._bound:
                return False
            self._items.append((peer, (header, bytes(payload))))
            self._ready.notify()
            return True

    def get(self, timeout_s: float) -> tuple[Peer, Message] | None:
        deadline = time.monotonic() + timeout_s
        with self._ready:
            while not self._items:
                left = deadline - time.monotonic()
                if left <= 0 or not self._ready.wait(left):
                    return None
            peer, frames = self._items.popleft()
        return peer, decode(*frames)


class MemoryHub:
    """A ServerLink whose robots are in the same process. ``connect(robot_id)`` gives the other end."""

    def __init__(self, bound: int = 1000) -> None:
        self._inbox, self._bound = _Queue(bound), bound
        self._robots: dict[Peer, MemoryLink] = {}
        self._numbers = itertools.count(1)

    def connect(self, robot_id: str) -> MemoryLink:
        peer = Peer(robot_id, str(next(self._numbers)).encode())
        link = MemoryLink(self, peer, self._bound)
        self._robots[peer] = link
        return link

    def receive(self, timeout_s: float) -> tuple[Peer, Message] | None:
        return self._inbox.get(timeout_s)

    def send(self, peer: Peer, message: Message) -> bool:
        link = self._robots.get(peer)
        return link is not None and link.inbox.put(peer, message)

    def disconnect(self, robot_id: str) -> None:
        for peer in [p for p in self._robots if p.robot_id == robot_id]:
            self._robots.pop(peer).open = False

    def close(self) -> None:
        for peer in list(self._robots):
            self.disconnect(peer.robot_id)


class MemoryLink:
    """The robot's end of a MemoryHub."""

    def __init__(self, hub: MemoryHub, peer: Peer, bound: int) -> None:
        self._hub, self._peer, self.inbox, self.open = hub, peer, _Queue(bound), True
        self.connects = 1

    def send(self, message: Message) -> bool:
        return self.open and self._hub._inbox.put(self._peer, message)

    def receive(self, timeout_s: float) -> Message | None:
        item = self.inbox.get(timeout_s)
        return None if item is None else item[1]

    def close(self) -> None:
        self._hub.disconnect(self._peer.robot_id)
