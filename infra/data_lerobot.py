"""``fleet data import``: the episodes of a LeRobot dataset go to the run's gateway like those of any robot.

They arrive over the real wire, as the robot ``import-<name>``, so they are checked, durable and in the buffer exactly
once like everything else. Where the run is not being served, its gateway is started for the time of the import.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors.mailbox import Mailbox
from actors.uplink import Uplink
from buffer.import_lerobot import Demonstrations, match_tasks
from fleet.errors import DatasetError, FleetError, GatewayUnreachable, RunFolderError
from fleet.files import Files, FolderLock
from fleet.identity import Credential
from fleet.runfolder import RunFolder
from fleet.spec import RobotSpec
from fleet.spool import SpooledFragment
from fleet.transport_zmq import ZmqRobotLink
from infra.enroll import enroll_here
from infra.supervisor import Supervisor, end_recorded
from infra.up import lock_run, start_gateway

STALLED_S = 60.0
POLL_S = 0.01
MAX_NAME = 25  # of a robot's 32 characters "import-" takes 7


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did. Steps and episodes count those that were there already."""

    robot_id: str
    episodes: int
    steps: int
    steps_before: int
    left_out: tuple[str, ...]


class DatasetOutbox:
    """An Outbox over a dataset: fragments are made when they are due, and made again when they are asked for again.

    One fragment is made ahead on a thread of its own, so that decoding videos does not keep the uplink from its beats.
    """

    def __init__(self, demonstrations: Demonstrations, robot_id: str, tasks: dict[str, str]) -> None:
        self.boot_id = demonstrations.boot_id
        self.acknowledged = self._sent = 0
        self._demonstrations, self._robot_id, self._tasks = demonstrations, robot_id, tasks
        self._kept: collections.deque[SpooledFragment] = collections.deque()  # made and not acknowledged
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "dataset")
        self._ahead: tuple[int, concurrent.futures.Future[SpooledFragment]] | None = None

    @property
    def num_pending(self) -> int:
        return self._demonstrations.num_fragments - self.acknowledged

    def boots(self) -> list[str]:
        return [self.boot_id]

    def next_unsent(self) -> SpooledFragment | None:
        """The next fragment; None when all are sent or the next one is still being made.

        Raises:
            DatasetError, FragmentRefused: It cannot be made.
        """
        seq = self._sent + 1
        if seq > self._demonstrations.num_fragments:
            return None
        if not self._kept or seq > self._kept[-1].seq:
            made = self._made(seq)
            if made is None:
                return None
            self._kept.append(made)
        self._sent = seq
        return self._kept[seq - self._kept[0].seq]

    def unsend(self, boot_id: str, seq: int) -> None:
        self._sent = min(self._sent, seq - 1)

    def acknowledge(self, boot_id: str, seq: int) -> None:
        self.acknowledged = max(self.acknowledged, min(seq, self._demonstrations.num_fragments))
        while self._kept and self._kept[0].seq <= self.acknowledged:
            self._kept.popleft()
        self._sent = max(self._sent, self.acknowledged)

    def rewind(self, boot_id: str, high_water: int) -> None:
        self.acknowledge(boot_id, high_water)
        self._sent = self.acknowledged

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _made(self, seq: int) -> SpooledFragment | None:
        if self._ahead is None or self._ahead[0] != seq:
            self._make_ahead(seq)
        if self._ahead is None or not self._ahead[1].done():
            return None
        made = self._ahead[1].result()
        self._make_ahead(seq + 1)
        return made

    def _make_ahead(self, seq: int) -> None:
        self._ahead = None
        if seq <= self._demonstrations.num_fragments:
            make = self._demonstrations.fragment
            self._ahead = (seq, self._pool.submit(make, seq, self._robot_id, self._tasks))


class _NoReleases(Mailbox):
    """An import acts by no policy, so it asks for none."""

    def announce(self, version: int) -> None:
        pass


def import_dataset(
    run: RunFolder,
    demonstrations: Demonstrations,
    *,
    name: str = "",
    tasks: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Imported:
    """Brings all episodes of a dataset into a run. Killed at any moment, the same call goes on where it stopped; so does one
    with a dataset that has grown.

    Args:
        name: Of the import; default: the dataset's folder. One dataset a name.
        tasks: The run's task by the dataset's task, where neither name nor instruction is the same.
        progress: Called with the steps that are in the buffer.

    Raises:
        DatasetError: The dataset does not fit the run, or another one was imported under this name.
        GatewayUnreachable: The gateway stopped answering.
        FleetError: A fragment is refused.
    """
    catalogue = json.loads((run.path / "tasks.json").read_text())
    matched = match_tasks(demonstrations.instructions, catalogue, tasks or {})
    _check_rate(run, demonstrations.spec)
    robot_id = f"import-{_plain_name(name or demonstrations.info.root.resolve().name)}"
    state = run.robots / f"{robot_id}.state"
    state.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(FolderLock(state, "import").release)
        endpoint, poll = stack.enter_context(served(run))
        _remember(run.robots / f"{robot_id}.import.json", demonstrations, matched)
        credential = Credential.load(enroll_here(run, robot_id, {}))
        outbox = DatasetOutbox(demonstrations, robot_id, matched)
        link = ZmqRobotLink(dataclasses.replace(credential, endpoint=endpoint))
        mailbox = _NoReleases(state / "release", credential.release_public)
        welcomes: list[int] = []
        uplink = Uplink(
            link,
            outbox,
            demonstrations.spec,
            mailbox,
            lambda tasks, settings: welcomes.append(outbox.acknowledged),
            lambda: {"spool": outbox.num_pending},
        )
        try:
            _send_all(uplink, outbox, link, poll, lambda: progress(demonstrations.steps_before(outbox.acknowledged + 1)))
            uplink.bye()
        finally:
            link.close()
            outbox.close()
    before = demonstrations.steps_before(welcomes[0] + 1)
    return Imported(robot_id, len(demonstrations.episodes), demonstrations.num_steps, before, demonstrations.info.left_out)


def _send_all(
    uplink: Uplink, outbox: DatasetOutbox, link: ZmqRobotLink, poll: Callable[[], None], progress: Callable[[], None]
) -> None:
    last, since = outbox.acknowledged, time.monotonic()
    while not uplink.drained or not uplink.connected:
        poll()
        uplink.run_once(POLL_S)
        if outbox.acknowledged != last:
            last, since = outbox.acknowledged, time.monotonic()
            progress()
        if time.monotonic() - since > STALLED_S:
            raise link.last_error or GatewayUnreachable(
                f"the gateway has stored nothing for {STALLED_S:.0f} s",
                rule="it acknowledges what is durable",
                remedy="see logs/gateway.log of the run; the same command goes on where this one stopped",
            )
    progress()


@contextlib.contextmanager
def served(run: RunFolder) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of the run's gateway on this machine, and what to call now and then. Where no process serves the run, the
    gateway is started and ended here, and `fleet up` is refused meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(contextlib.closing(lock_run(run, "an import")))
            end_recorded(run.logs / "gateway.pid")  # of an import that was killed
            FolderLock(run.buffer, "log").release()
        except RunFolderError:
            yield _local_endpoint(run), lambda: None
            return
        supervisor = Supervisor()
        stack.callback(supervisor.stop)
        start_gateway(run, supervisor)
        yield _local_endpoint(run), supervisor.poll


def _local_endpoint(run: RunFolder) -> str:
    try:
        bound = str(json.loads((run.path / "gateway.json").read_text())["bound"])
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(
            f"{run.path} has no address of its gateway: {error!r}", rule="the gateway writes gateway.json when it listens"
        ) from None
    return bound.replace("0.0.0.0", "127.0.0.1")


def _check_rate(run: RunFolder, spec: RobotSpec) -> None:
    """A chunk of actions means another motion at another rate."""
    for path in sorted((run.buffer / "specs").glob("*.json")):
        other = RobotSpec.from_dict(json.loads(path.read_text()))
        if other.control_hz != spec.control_hz:
            raise DatasetError(
                f"the dataset has {spec.control_hz:g} frames per second",
                rule=f"the run has data of {other.robot_type!r} at {other.control_hz:g} Hz",
                remedy="resample the dataset, or import it into a run of its own",
            )


def _remember(path: Path, demonstrations: Demonstrations, tasks: dict[str, str]) -> None:
    """Which dataset goes by this name: another one, or other settings, would be stored beside what is there already."""
    lengths = [episode.length for episode in demonstrations.episodes]
    now: dict[str, Any] = {"boot_id": demonstrations.boot_id, "lengths": lengths, "tasks": tasks}
    if path.exists():
        old = json.loads(path.read_text())
        grown = lengths[: len(old["lengths"])] == old["lengths"] and old["tasks"].items() <= tasks.items()
        if old["boot_id"] != now["boot_id"] or not grown:
            raise DatasetError(
                f"another dataset was imported as {path.name.split('.')[0]!r}, or this one with other settings",
                rule="a name stands for one dataset, which may only grow",
                remedy="give this one a --name of its own, or use the settings of the first import",
            )
    Files().write_atomic(path, json.dumps(now).encode())


def _plain_name(name: str) -> str:
    plain = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")[:MAX_NAME]
    if not plain:
        raise FleetError(f"name {name!r}", rule="letters, digits, - and _", remedy="give another --name")
    return plain
