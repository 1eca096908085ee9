"""The gateway: between the robots' connections and the handlers behind them. A state machine over a ServerLink.

One turn of the loop: take in what has arrived, one group commit, acknowledge, send a piece of a release to whoever
asked. Acknowledgements leave only after the commit. Whatever a robot sends is answered or refused, and never ends the
gateway; what a robot has not got acknowledged it keeps and sends again, so after any trouble it is enough to ask it
for a new HELLO.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fleet.errors import FleetError, FragmentRefused, ProtocolError, StorageError
from fleet.journal import Journal
from fleet.metrics import GATEWAY, Metrics
from fleet.server.admission import MAX_TEXT, SAY_AGAIN_S, Limiter, check_hello, plain_error
from fleet.server.membership import MemberEvent, Membership
from fleet.server.pulls import Pulls, ReleaseSource
from fleet.spec import RobotSpec
from fleet.transport import Peer, ServerLink
from fleet.wire import Kind, Message

log = logging.getLogger(__name__)

TURN_MESSAGES, TURN_BYTES = 256, 32 * 1024 * 1024  # taken in before a commit
TICK_S, VIEW_EVERY_S = 0.05, 1.0
STORAGE_TROUBLE_S = 5.0
MAX_BOOTS = 64  # open at once on one connection
_MAX_NS = 2**62


class IngestHandler(Protocol):
    """What makes fragments durable."""

    def admit(self, robot_id: str, boot_id: str, spec: RobotSpec) -> int:
        """Opens (robot, boot) and returns its high-water mark: the last seq that is durable, 0 for none."""
        ...

    def offer(self, robot_id: str, fields: Mapping[str, Any], payload: bytes | memoryview) -> None:
        """Takes a fragment into the open group.

        Raises:
            FragmentRefused: It is not kept.
            StorageError: It could not be written; DiskFull when there is no room.
        """
        ...

    def commit(self) -> list[tuple[str, str, int]]:
        """Makes the group durable. Returns (robot_id, boot_id, seq): everything up to seq is durable.

        Raises:
            StorageError: Nothing of the group is kept.
        """
        ...


class CommandSource(Protocol):
    """Commands for robots."""

    def take(self) -> tuple[str, dict[str, Any]] | None:
        """The next (robot_id, fields of COMMAND), or None at once."""
        ...


class RobotView(Protocol):
    """Where the state of robots is shown. Must not block."""

    def put(self, robot_id: str, fields: Mapping[str, Any]) -> None: ...


@dataclasses.dataclass
class _Boot:
    """One (robot, boot) that said HELLO: the last seq taken in, and the last one known to be durable."""

    offered: int
    durable: int


@dataclasses.dataclass
class _Live:
    """A robot that was welcomed, and the one connection that counts."""

    peer: Peer
    boots: collections.OrderedDict[str, _Boot] = dataclasses.field(default_factory=collections.OrderedDict)
    owed: dict[str, int] = dataclasses.field(default_factory=dict)  # acknowledgements not sent yet, by boot
    told: int | None = None  # newest release that it was told of


class Gateway:
    """Serves all robots of a run.

    Args:
        link: The robots' connections.
        run_id: Sent in WELCOME.
        tasks: Task catalogue for WELCOME, by task name. Read anew for each WELCOME.
        settings: Settings for robots in WELCOME.
        ingest, releases, membership, commands: The handlers.
        accepts: Called with each robot's spec; raises SpecError or PolicyError, naming both sides, to refuse it.
        journal: Where facts go.
        metrics: Made from ``fleet.metrics.GATEWAY``.
        view: Where robots' states are shown, for example a ``Registry``.
        commit_s: Longest wait for more fragments before a group is committed.
    """

    def __init__(
        self,
        link: ServerLink,
        *,
        run_id: str,
        tasks: Mapping[str, Any],
        settings: Mapping[str, Any],
        ingest: IngestHandler,
        releases: ReleaseSource,
        membership: Membership,
        commands: CommandSource | None = None,
        accepts: Callable[[RobotSpec], None] | None = None,
        journal: Journal | None = None,
        metrics: Metrics | None = None,
        view: RobotView | None = None,
        commit_s: float = 0.002,
    ) -> None:
        self._link, self._run_id, self._tasks, self._settings = link, run_id, tasks, settings
        self._ingest, self._releases, self._membership, self._commands = ingest, releases, membership, commands
        self._accepts, self._journal, self._view, self._commit_s = accepts, journal, view, commit_s
        self.metrics = metrics or Metrics(GATEWAY)
        self._lives: dict[str, _Live] = {}
        self._pulls = Pulls(releases, link.send, self._count_pull)
        self._group: set[tuple[str, str]] = set()  # (robot, boot) with fragments in the open group
        self._newest: int | None = None
        self._limiter = Limiter()
        self._next_tick = self._next_view = 0.0
        self._progress = True
        self._handlers: dict[Kind, Callable[[Peer, Message], None]] = {
            Kind.HELLO: self._hello,
            Kind.FRAGMENT: self._fragment,
            Kind.HEARTBEAT: self._heartbeat,
            Kind.PULL: self._pull,
            Kind.EVENT: self._event,
            Kind.BYE: self._bye,
        }

    def run(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set."""
        while not stop.is_set():
            self.run_once(0.05)

    def run_once(self, timeout_s: float) -> None:
        """One turn; waits at most ``timeout_s`` for the first message."""
        if self._pulls.num_waiting:
            timeout_s = 0.0 if self._progress else min(timeout_s, 0.01)
        self._take_in(timeout_s)
        self._commit()
        self._send_owed()
        self._progress = self._pulls.serve()
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._tick(now)

    def count_malformed(self, robot_id: str, error: ProtocolError) -> None:
        """For ``ZmqServerLink.on_malformed``: a message that never became one."""
        self._count_refusal(robot_id, error)

    def _take_in(self, timeout_s: float) -> None:
        item = self._link.receive(timeout_s)
        deadline = time.monotonic() + self._commit_s
        num_messages = num_bytes = 0
        while item is not None:
            self._handle(*item)
            num_messages += 1
            num_bytes += len(item[1].payload)
            if num_messages >= TURN_MESSAGES or num_bytes >= TURN_BYTES:
                break
            item = self._link.receive(max(deadline - time.monotonic(), 0.0) if self._group else 0.0)

    def _handle(self, peer: Peer, message: Message) -> None:
        handler = self._handlers.get(message.kind)
        try:
            if handler is None:
                raise ProtocolError(f"a robot sent {message.kind.name}", rule="only gateways send it")
            live = self._lives.get(peer.robot_id)
            if message.kind == Kind.HELLO or (live is not None and live.peer == peer):
                handler(peer, message)
                if message.kind != Kind.BYE:
                    self._tell(self._membership.seen(peer.robot_id, now_s=time.monotonic(), time_ns=time.time_ns()))
            elif message.kind != Kind.BYE:
                self._turn_away(peer, message)
        except FleetError as error:
            self._refuse(peer, message, error)
        except Exception:
            # A fault of ours that one robot has found must not end the service of all the others.
            log.exception("%s of robot %s was not handled", message.kind.name, peer.robot_id)
            self._refuse(peer, message, FleetError(f"{message.kind.name} was not handled", remedy="see the gateway's log"))

    # What robots send

    def _hello(self, peer: Peer, message: Message) -> None:
        fields = message.fields
        spec = check_hello(fields)
        if self._accepts is not None:
            self._accepts(spec)
        self._commit()  # so that the mark that is told covers what an older connection brought a moment ago
        high_water = self._ingest.admit(peer.robot_id, fields["boot_id"], spec)
        live = self._lives.get(peer.robot_id)
        if live is not None and live.peer != peer:
            self._replace(live)
            live = None
        if live is None:
            live = self._lives[peer.robot_id] = _Live(peer)
        live.boots.pop(fields["boot_id"], None)
        live.boots[fields["boot_id"]] = _Boot(high_water, high_water)
        while len(live.boots) > MAX_BOOTS:
            live.boots.popitem(last=False)
        live.told = None
        now_s, time_ns = time.monotonic(), time.time_ns()
        self._tell(self._membership.hello(peer.robot_id, fields["boot_id"], fields["software"], now_s=now_s, time_ns=time_ns))
        welcome = {
            "run_id": self._run_id,
            "boot_id": fields["boot_id"],
            "seq": high_water,
            "time_ns": time_ns,
            "tasks": dict(self._tasks),
            "settings": dict(self._settings),
        }
        self._link.send(peer, Message(Kind.WELCOME, welcome))

    def _fragment(self, peer: Peer, message: Message) -> None:
        boot_id, seq = message.fields["boot_id"], message.fields["seq"]
        live = self._lives[peer.robot_id]
        boot = live.boots.get(boot_id)
        if boot is None:
            self._turn_away(peer, message)
            return
        if 1 <= seq <= boot.offered:
            self.metrics.add("fleet_duplicates", robot=peer.robot_id)
            if seq <= boot.durable:
                live.owed[boot_id] = boot.durable
            return
        if seq != boot.offered + 1:
            raise FragmentRefused(
                f"fragment {seq} of boot {boot_id} came after {boot.offered}",
                rule="the numbers of a boot's fragments count up by one",
                remedy="say HELLO and send again from the mark in WELCOME",
            )
        self._ingest.offer(peer.robot_id, message.fields, message.payload)
        boot.offered = seq
        self._group.add((peer.robot_id, boot_id))
        self.metrics.add("fleet_fragments", robot=peer.robot_id)
        self.metrics.add("fleet_fragment_payload", len(message.payload), robot=peer.robot_id)

    def _heartbeat(self, peer: Peer, message: Message) -> None:
        fields, time_ns = message.fields, time.time_ns()
        now_s = time.monotonic()
        self._tell(
            self._membership.heartbeat(peer.robot_id, fields["time_ns"], fields["metrics"], now_s=now_s, time_ns=time_ns)
        )
        answer = {"time_ns": time_ns, "mono_ns": fields["mono_ns"], "metrics": {"release": self._newest}}
        self._link.send(peer, Message(Kind.HEARTBEAT, answer))

    def _pull(self, peer: Peer, message: Message) -> None:
        what, id = message.fields["what"], message.fields["id"]
        if len(what) > 32 or len(id) > 128:
            raise ProtocolError(f"PULL of {what[:40]!r} {id[:40]!r}...", rule="at most 32 and 128 characters")
        self._pulls.ask(peer, what, id)

    def _event(self, peer: Peer, message: Message) -> None:
        fields = message.fields
        if fields["event"] == "release_loaded":
            version, created_ns, loaded_ns = (_whole_number(fields, name) for name in ("version", "created_ns", "time_ns"))
            self._membership.loaded(peer.robot_id, version)
            latency_ns = loaded_ns - self._membership.members[peer.robot_id].clock_offset_ns - created_ns
            self._write("loaded", robot=peer.robot_id, version=version, latency_ms=round(latency_ns / 1e6, 3))
        elif self._limiter.may(("event", peer.robot_id)):
            log.warning("robot %s says %s", peer.robot_id, str(fields)[:500])

    def _bye(self, peer: Peer, message: Message) -> None:
        self._drop(peer)
        self._tell(self._membership.bye(peer.robot_id))

    # Acknowledging

    def _commit(self) -> None:
        if not self._group:
            return
        group, self._group = self._group, set()
        started = time.perf_counter()
        trouble: StorageError | None = None
        try:
            for robot_id, boot_id, seq in self._ingest.commit():
                self._durable(robot_id, boot_id, seq)
        except StorageError as error:
            trouble = error
            self._storage_trouble(error)
        self.metrics.observe("fleet_commit", time.perf_counter() - started)
        for robot_id, boot_id in sorted(group):
            live = self._lives.get(robot_id)
            boot = live.boots.get(boot_id) if live is not None else None
            if live is not None and boot is not None and boot.offered > boot.durable:
                # The robot has them still: with its next HELLO it learns from where to send again.
                del live.boots[boot_id]
                lost = trouble or StorageError(f"fragments of boot {boot_id} up to {boot.offered} were not kept")
                self._say_bye(live.peer, lost, boot_id=boot_id)

    def _durable(self, robot_id: str, boot_id: str, seq: int) -> None:
        live = self._lives.get(robot_id)
        boot = live.boots.get(boot_id) if live is not None else None
        if live is not None and boot is not None:
            boot.durable = max(boot.durable, seq)
            live.owed[boot_id] = boot.durable

    def _send_owed(self) -> None:
        for live in self._lives.values():
            for boot_id, seq in list(live.owed.items()):
                if not self._link.send(live.peer, Message(Kind.ACK, {"boot_id": boot_id, "seq": seq})):
                    break  # it reads too slowly; the next turn tries again, by then with a higher mark
                del live.owed[boot_id]

    # Refusing

    def _refuse(self, peer: Peer, message: Message, error: FleetError) -> None:
        more = {name: message.fields[name] for name in ("boot_id", "seq")} if message.kind == Kind.FRAGMENT else {}
        live = self._lives.get(peer.robot_id)
        if isinstance(error, StorageError):
            self._storage_trouble(error)
        if message.kind == Kind.FRAGMENT and live is not None and live.peer == peer:
            live.boots.pop(message.fields["boot_id"], None)
        else:
            self._drop(peer)
        self._limiter.hush(peer, SAY_AGAIN_S)  # what it had sent behind this needs no answer of its own
        self._say_bye(peer, error, **more)
        self._count_refusal(peer.robot_id, error)

    def _turn_away(self, peer: Peer, message: Message) -> None:
        """A message on a connection, or of a boot, that has not said HELLO (any more)."""
        error = ProtocolError(
            f"{message.kind.name} came before HELLO",
            rule="HELLO comes first",
            remedy="say HELLO; keep what is not acknowledged",
        )
        if self._limiter.may(peer):
            self._say_bye(peer, error)
            self._count_refusal(peer.robot_id, error)
        else:
            self.metrics.add("fleet_refused", robot=peer.robot_id, code=error.code)

    def _replace(self, old: _Live) -> None:
        what = f"another connection of robot {old.peer.robot_id!r} took over"
        remedy = "none needed after a lost connection; else see that no two processes use this credential file"
        self._say_bye(old.peer, ProtocolError(what, rule="the newest connection counts", remedy=remedy))
        self._drop(old.peer)
        self._write("member", robot=old.peer.robot_id, event="replaced")

    def _say_bye(self, peer: Peer, error: FleetError, **more: Any) -> None:
        self._link.send(peer, Message(Kind.BYE, {"error": plain_error(error), **more}))

    def _drop(self, peer: Peer) -> None:
        live = self._lives.get(peer.robot_id)
        if live is not None and live.peer == peer:
            del self._lives[peer.robot_id]
        self._pulls.forget(peer)

    def _count_refusal(self, robot_id: str, error: FleetError) -> None:
        self.metrics.add("fleet_refused", robot=robot_id, code=error.code)
        if self._limiter.may(("refused", robot_id, error.code)):
            log.warning("refused robot %s: %s", robot_id, str(error)[:MAX_TEXT])
            self._write("refused", robot=robot_id, error=plain_error(error))

    def _storage_trouble(self, error: StorageError) -> None:
        self.metrics.add("fleet_disk_full")
        if self._limiter.may("storage", STORAGE_TROUBLE_S):
            log.error("fragments cannot be stored, robots keep them: %s", error)

    # Telling

    def _tick(self, now: float) -> None:
        try:
            self._newest = self._releases.newest()
        except (FleetError, OSError) as error:
            if self._limiter.may("releases", STORAGE_TROUBLE_S):
                log.error("releases cannot be read: %s", error)
        self._tell(self._membership.sweep(now))
        self._announce()
        while self._commands is not None and (command := self._commands.take()) is not None:
            live = self._lives.get(command[0])
            if live is None or not self._link.send(live.peer, Message(Kind.COMMAND, command[1])):
                log.warning("command %s did not reach robot %s", command[1].get("command"), command[0])
        if now >= self._next_view:
            self._next_view = now + VIEW_EVERY_S
            self._show()

    def _announce(self) -> None:
        if self._newest is None:
            return
        for live in self._lives.values():
            event = Message(Kind.EVENT, {"event": "release", "version": self._newest})
            if live.told != self._newest and self._link.send(live.peer, event):
                live.told = self._newest

    def _show(self) -> None:
        self.metrics.set("fleet_robots_live", self._membership.num_live)
        self.metrics.set("fleet_release", self._newest or 0)
        for robot_id, member in self._membership.members.items():
            self.metrics.set("fleet_robot_last_seen", member.last_seen_ns / 1e9, robot=robot_id)
            self.metrics.set("fleet_robot_clock_offset", member.clock_offset_ns / 1e9, robot=robot_id)
            self.metrics.set("fleet_robot_spool_depth", member.metrics.get("spool", 0), robot=robot_id)
            self.metrics.set("fleet_robot_version_lag", max((self._newest or 0) - member.version, 0), robot=robot_id)
            if self._view is not None:
                self._view.put(robot_id, member.view())

    def _tell(self, events: list[MemberEvent]) -> None:
        for event in events:
            self._write("member", robot=event.robot_id, event=event.event)
            live = self._lives.get(event.robot_id)
            if event.event == "lost" and live is not None:
                self._drop(live.peer)

    def _count_pull(self, robot_id: str, num_bytes: int) -> None:
        self.metrics.add("fleet_pulls", num_bytes, robot=robot_id)

    def _write(self, kind: str, **fields: Any) -> None:
        if self._journal is not None:
            self._journal.write(kind, **fields)


def _whole_number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or not 0 <= value < _MAX_NS:
        raise ProtocolError(f"{fields['event'][:40]} has {name} = {str(value)[:40]}", rule="a whole number")
    return value
