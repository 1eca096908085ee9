"""Serves releases to robots a piece at a time, each robot in its turn, so that ingest never waits for a large release."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Protocol

from fleet.errors import FleetError, ProtocolError, ReleaseError
from fleet.transport import Peer
from fleet.wire import Kind, Message

MAX_PULLS = 64  # requests of one robot that wait
TURN_BYTES = 8 * 1024 * 1024


class ReleaseSource(Protocol):
    """Where releases are read."""

    def newest(self) -> int | None:
        """The newest version, None while there is none. Called many times a second."""
        ...

    def read(self, what: str, id: str) -> bytes:
        """A "manifest" or a "chunk". ``id`` comes from the network.

        Raises:
            ReleaseError: There is no such thing.
        """
        ...


class Pulls:
    """Requests of all robots, each robot's in order and bounded, robots in turn.

    Args:
        send: ``ServerLink.send``.
        sent: Called with (robot_id, bytes) for each piece sent.
    """

    def __init__(self, source: ReleaseSource, send: Callable[[Peer, Message], bool], sent: Callable[[str, int], None]) -> None:
        self._source, self._send, self._sent = source, send, sent
        self._waiting: collections.OrderedDict[Peer, collections.deque[tuple[str, str]]] = collections.OrderedDict()
        self._ready: dict[Peer, Message] = {}  # read, but its robot's queue is full: not read a second time

    def ask(self, peer: Peer, what: str, id: str) -> None:
        """Queues a request; one that waits already is not queued twice.

        Raises:
            ProtocolError: The robot has too many requests waiting.
        """
        queue = self._waiting.setdefault(peer, collections.deque())
        if (what, id) in queue:
            return
        if len(queue) >= MAX_PULLS:
            raise ProtocolError(f"{len(queue) + 1} requests wait", rule=f"at most {MAX_PULLS}, then wait for answers")
        queue.append((what, id))

    def forget(self, peer: Peer) -> None:
        """The connection is over."""
        self._waiting.pop(peer, None)
        self._ready.pop(peer, None)

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def serve(self) -> bool:
        """Answers at most one request of each robot, about ``TURN_BYTES`` in all. False when nothing could be sent."""
        left, progress = TURN_BYTES, False
        for peer in list(self._waiting):
            if left <= 0:
                break
            queue = self._waiting[peer]
            message = self._ready.pop(peer, None) or self._read(*queue[0])
            self._waiting.move_to_end(peer)
            if not self._send(peer, message):
                self._ready[peer] = message
                continue
            progress = True
            left -= len(message.payload)
            self._sent(peer.robot_id, len(message.payload))
            queue.popleft()
            if not queue:
                del self._waiting[peer]
        return progress

    def _read(self, what: str, id: str) -> Message:
        fields = {"what": what, "id": id}
        try:
            return Message(Kind.CHUNK, fields, self._source.read(what, id))
        except FleetError as error:
            return Message(Kind.CHUNK, {**fields, "error": error.to_fields()})
        except OSError as error:
            failed = ReleaseError(f"{what} {id[:80]} cannot be read: {error}", remedy="ask again later")
            return Message(Kind.CHUNK, {**fields, "error": failed.to_fields()})
