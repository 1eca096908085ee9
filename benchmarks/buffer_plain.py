"""The project's wire without encryption, as the peers run theirs. For measuring only: the product has no such switch.

``python -m benchmarks.buffer_plain RUN_FOLDER`` is the shard process (``buffer.main``) behind it. A robot is named by
its routing id, which nobody proves; it must be enrolled nevertheless.
"""

from __future__ import annotations

from typing import Any

import zmq

import buffer.main
import fleet.transport_zmq
from fleet.identity import public_key_of
from fleet.transport_zmq import ZmqRobotLink, ZmqServerLink


class PlainRobotLink(ZmqRobotLink):
    """The robot's end, in the clear."""

    def _secure(self, sock: Any) -> None:
        sock.setsockopt(zmq.ROUTING_ID, self._credential.robot_id.encode())


class PlainServerLink(ZmqServerLink):
    """The gateway's end, in the clear: believes what a robot says of itself."""

    def _secure(self, sock: Any) -> None:
        pass

    def _identity_of(self, routing_id: bytes, frame: zmq.Frame) -> tuple[str, str]:
        robot_id = routing_id.decode()
        return robot_id, str(public_key_of(self._keys, robot_id))


if __name__ == "__main__":
    fleet.transport_zmq.ZmqServerLink = PlainServerLink  # type: ignore[misc]
    buffer.main.main()
