"""One robot that sends as fast as it can: ``python -m benchmarks.buffer_client CREDENTIAL SPOOL|- plain|curve CODEC STEPS``.

Says ``ready`` when it is connected, waits for a line, sends ``STEPS`` steps and says ``done`` when the last of them is
acknowledged, that is, durable at the gateway. Encodes each fragment from per-step arrays, as the actor does. With a
SPOOL folder it writes and fsyncs each fragment there first, as the actor does; ``-``: none, as the peers have none.
"""

from __future__ import annotations

import collections
import itertools
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.fragments import encode_rows
from actors.mailbox import Mailbox
from actors.main import KEPT_BYTES
from actors.uplink import Uplink
from benchmarks.buffer_data import WARM_STEPS, Robot
from benchmarks.buffer_plain import PlainRobotLink
from fleet.identity import Credential
from fleet.memory import keep_freed_memory
from fleet.spool import Spool, SpooledFragment
from fleet.transport_zmq import ZmqRobotLink

WINDOW = 24  # fragments that wait for their acknowledgement
STUCK_S = 30.0


class MemorySpool:
    """A spool without a disk: what is not acknowledged stays in memory. Loses everything with its process."""

    def __init__(self) -> None:
        self.boot_id = secrets.token_hex(8)
        self._kept: collections.deque[SpooledFragment] = collections.deque()
        self._last = self._sent = 0

    @property
    def num_pending(self) -> int:
        return len(self._kept)

    def append(self, spec_hash: str, directory: Mapping[str, int], payload: Any, episode_id: int) -> int:
        self._last += 1
        self._kept.append(SpooledFragment(self.boot_id, self._last, spec_hash, directory, payload))
        return self._last

    def flush(self) -> None:
        pass

    def next_unsent(self) -> SpooledFragment | None:
        if self._sent == self._last:
            return None
        self._sent += 1
        return self._kept[self._sent - self._kept[0].seq]

    def unsend(self, boot_id: str, seq: int) -> None:
        self._sent = min(self._sent, seq - 1)

    def acknowledge(self, boot_id: str, seq: int) -> None:
        while self._kept and self._kept[0].seq <= seq:
            self._kept.popleft()

    def rewind(self, boot_id: str, high_water: int) -> None:
        self.acknowledge(boot_id, high_water)
        self._sent = min(high_water, self._last)

    def boots(self) -> list[str]:
        return [self.boot_id]


def connect(credential: Credential, spool: Any, robot: Robot, folder: Path, *, plain: bool) -> Uplink:
    """An uplink that was welcomed. ``folder``: for releases."""
    link = (PlainRobotLink if plain else ZmqRobotLink)(credential)
    uplink = Uplink(link, spool, robot.spec, Mailbox(folder, credential.release_public), lambda tasks, settings: None, dict)
    while not uplink.connected:
        uplink.run_once(0.01)
    return uplink


def send(uplink: Uplink, spool: Any, robot: Robot, steps: int) -> None:
    """Sends ``steps`` steps and returns when all are acknowledged; TimeoutError when nothing is for ``STUCK_S``."""
    fragments: Iterator[Any] = robot.fragments(steps)
    more, pending, progress_s = True, 0, time.monotonic()
    while more or spool.num_pending:
        if spool.num_pending != pending:
            pending, progress_s = spool.num_pending, time.monotonic()
        elif time.monotonic() - progress_s > STUCK_S:
            raise TimeoutError(f"{pending} fragments are not acknowledged")
        room = WINDOW - spool.num_pending
        batch = list(itertools.islice(fragments, min(room, 4))) if more and room > 0 else []
        for episode, rows in batch:
            directory, payload = encode_rows(robot.spec, rows)
            spool.append(robot.spec.hash, directory, payload, episode)
        if room > 0:
            more = bool(batch)
        if batch:
            spool.flush()
        uplink.run_once(0.0 if batch else 0.005)


def main() -> None:
    credential_path, spool_folder, wire, codec, steps = sys.argv[1:]
    credential = Credential.load(Path(credential_path))
    spool: Any = MemorySpool() if spool_folder == "-" else Spool(Path(spool_folder), max_bytes=1 << 32)
    keep_freed_memory(KEPT_BYTES)
    robot = Robot(credential.robot_id, spool.boot_id, codec)
    uplink = connect(credential, spool, robot, Path(f"{credential_path}.state"), plain=wire == "plain")
    send(uplink, spool, robot, WARM_STEPS)  # imports, caches and memory are warm; the same is done for the peers
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    send(uplink, spool, robot, int(steps))
    sys.stdout.write("done\n")
    sys.stdout.flush()
    sys.stdin.readline()
    uplink.bye()


if __name__ == "__main__":
    main()
