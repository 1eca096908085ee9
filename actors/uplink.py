"""The robot's side of the connection: says HELLO, sends what is in the spool, pulls releases, beats.

A state machine driven by ``run_once`` over a RobotLink, a Spool and a Mailbox. Nothing is lost by a bad connection:
what is not acknowledged stays in the spool and is sent again after the next WELCOME, from the gateway's high-water mark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from actors.mailbox import Mailbox
from fleet import __version__
from fleet.errors import FleetError, ProtocolError, ReleaseError
from fleet.spec import RobotSpec
from fleet.spool import SpooledFragment
from fleet.transport import RobotLink
from fleet.wire import PROTOCOLS, Kind, Message

HELLO_EVERY_S = 1.0
HEARTBEAT_EVERY_S = 1.0
LOST_AFTER_S = 5.0
MAX_UNACKNOWLEDGED = 64
FATAL = ("spec", "policy", "config")  # refusals that asking again does not change


class Refused(FleetError):
    """The gateway will not have this robot; its reason is in what, rule and remedy."""

    code = "refused"


class Outbox(Protocol):
    """What is to be sent, in numbered fragments that stay until they are acknowledged: a ``fleet.spool.Spool``, or
    something else that can produce a fragment again."""

    boot_id: str

    @property
    def num_pending(self) -> int:
        """Fragments that are not acknowledged."""
        ...

    def boots(self) -> list[str]:
        """Boots with unacknowledged fragments, oldest first, and the current one."""
        ...

    def next_unsent(self) -> SpooledFragment | None:
        """The next fragment to send; None when there is none now."""
        ...

    def unsend(self, boot_id: str, seq: int) -> None:
        """``seq`` and what follows are to be sent again."""
        ...

    def acknowledge(self, boot_id: str, seq: int) -> None:
        """Everything up to ``seq`` is stored."""
        ...

    def rewind(self, boot_id: str, high_water: int) -> None:
        """A connection begins: up to ``high_water`` all is stored, what follows is to be sent again."""
        ...


class Uplink:
    """One robot's connection.

    Args:
        on_welcome: Called with (tasks, settings) of each WELCOME.
        metrics: Called for each heartbeat; numbers by name.
    """

    def __init__(
        self,
        link: RobotLink,
        spool: Outbox,
        spec: RobotSpec,
        mailbox: Mailbox,
        on_welcome: Callable[[dict[str, Any], dict[str, Any]], None],
        metrics: Callable[[], Mapping[str, float]],
    ) -> None:
        self.link, self.spool, self.spec, self.mailbox = link, spool, spec, mailbox
        self._on_welcome, self._metrics = on_welcome, metrics
        self._handlers: dict[Kind, Callable[[Message], None]] = {
            Kind.WELCOME: self._welcome,
            Kind.ACK: self._acknowledged,
            Kind.CHUNK: self._chunk,
            Kind.HEARTBEAT: self._heard_beat,
            Kind.EVENT: self._event,
            Kind.BYE: self._refused,
        }
        self.connected = False
        self._boot = spool.boot_id
        self._unacknowledged = self._connects = 0
        self._last_heard = self._last_hello = self._last_beat = -1e9

    def run_once(self, timeout_s: float) -> None:
        """Sends what is due and handles what comes within ``timeout_s``.

        Raises:
            Refused: The gateway refused this robot for a reason that will not pass by itself.
        """
        now = time.monotonic()
        if self.link.connects != self._connects or now - self._last_heard > LOST_AFTER_S:
            self.connected = False
        self._connects = self.link.connects
        if not self.connected:
            self._hello(now)
        else:
            self._send_fragments()
            self._pull()
            self._beat(now)
        message = self.link.receive(timeout_s)
        while message is not None:
            self._handle(message)
            message = self.link.receive(0)

    def tell(self, event: str, **fields: Any) -> bool:
        """Sends an EVENT; False if it could not be queued."""
        return self.connected and self.link.send(Message(Kind.EVENT, {"event": event, "time_ns": time.time_ns(), **fields}))

    def bye(self) -> None:
        """Takes leave, so that the gateway does not count this robot as lost."""
        self.link.send(Message(Kind.BYE, {"error": {}}))

    @property
    def drained(self) -> bool:
        """Whether everything is acknowledged."""
        return self.spool.num_pending == 0

    def _hello(self, now: float) -> None:
        if now - self._last_hello < HELLO_EVERY_S:
            return
        self._boot = self.spool.boots()[0]
        fields = {
            "protocols": list(PROTOCOLS),
            "software": __version__,
            "boot_id": self._boot,
            "spec": self.spec.to_dict(),
            "spec_hash": self.spec.hash,
        }
        if self.link.send(Message(Kind.HELLO, fields)):
            self._last_hello = now

    def _send_fragments(self) -> None:
        while self._unacknowledged < MAX_UNACKNOWLEDGED and (fragment := self.spool.next_unsent()) is not None:
            fields = {name: getattr(fragment, name) for name in ("boot_id", "seq", "spec_hash")}
            fields["tables"] = dict(fragment.tables)
            mine = fragment.boot_id == self._boot
            if not mine or not self.link.send(Message(Kind.FRAGMENT, fields, fragment.payload)):
                self.spool.unsend(fragment.boot_id, fragment.seq)
                break
            self._unacknowledged += 1
        if self._unacknowledged == 0 and self.spool.boots()[0] != self._boot:
            self.connected = False  # the backlog of an earlier start is done: introduce the next one
            self._last_hello = -1e9

    def _pull(self) -> None:
        for what, id in self.mailbox.requests():
            self.link.send(Message(Kind.PULL, {"what": what, "id": id}))

    def _beat(self, now: float) -> None:
        if now - self._last_beat < HEARTBEAT_EVERY_S:
            return
        self._last_beat = now
        metrics = {name: float(value) for name, value in self._metrics().items()}
        self.link.send(Message(Kind.HEARTBEAT, {"time_ns": time.time_ns(), "mono_ns": time.monotonic_ns(), "metrics": metrics}))

    def _handle(self, message: Message) -> None:
        self._last_heard = time.monotonic()
        handler = self._handlers.get(message.kind)
        if handler is not None:  # kinds of later versions are nothing to this one
            handler(message)

    def _acknowledged(self, message: Message) -> None:
        before = self.spool.num_pending
        self.spool.acknowledge(message.fields["boot_id"], message.fields["seq"])
        self._unacknowledged = max(self._unacknowledged - (before - self.spool.num_pending), 0)

    def _chunk(self, message: Message) -> None:
        fields = message.fields
        if "error" in fields:
            return  # it cannot be served now; the mailbox asks again after a pause
        try:
            self.mailbox.deliver(fields["what"], fields["id"], message.payload)
        except ReleaseError as error:
            self.tell("release_failed", what=error.what)

    def _heard_beat(self, message: Message) -> None:
        self.mailbox.announce(int(message.fields["metrics"].get("release") or 0))

    def _event(self, message: Message) -> None:
        if message.fields["event"] == "release":
            self.mailbox.announce(int(message.fields.get("version", 0)))

    def _welcome(self, message: Message) -> None:
        fields = message.fields
        if fields["boot_id"] != self._boot:
            return
        self.spool.rewind(self._boot, fields["seq"])
        self._unacknowledged = 0
        self.mailbox.reconnected()
        self.connected = True
        self._on_welcome(fields["tasks"], fields["settings"])

    def _refused(self, message: Message) -> None:
        error = message.fields["error"]
        self.connected = False
        other_version = error.get("code") == ProtocolError.code and "speaks protocols" in str(error.get("rule"))
        if error.get("code") in FATAL or other_version:
            raise Refused(str(error.get("what")), rule=str(error.get("rule", "")), remedy=str(error.get("remedy", "")))
