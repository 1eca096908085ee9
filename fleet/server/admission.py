"""Who is let in, and how often somebody who is not is answered."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Hashable, Mapping
from typing import Any

from fleet import __version__
from fleet.errors import FleetError, ProtocolError, SpecError
from fleet.spec import RobotSpec
from fleet.wire import PROTOCOLS

SAY_AGAIN_S = 1.0
MAX_TOPICS = 4096
MAX_TEXT = 1000
_BOOT_ID = re.compile(r"[0-9a-f]{16}")


class Limiter:
    """Lets something be said about a topic once in a while. Remembers ``MAX_TOPICS`` topics."""

    def __init__(self) -> None:
        self._quiet_until: collections.OrderedDict[Hashable, float] = collections.OrderedDict()

    def may(self, topic: Hashable, every_s: float = SAY_AGAIN_S) -> bool:
        """Whether it is time again; if so, not before ``every_s`` once more."""
        if self._quiet_until.get(topic, 0.0) > time.monotonic():
            return False
        self.hush(topic, every_s)
        return True

    def hush(self, topic: Hashable, seconds: float) -> None:
        """Nothing about the topic for a while."""
        self._quiet_until[topic] = time.monotonic() + seconds
        self._quiet_until.move_to_end(topic)
        while len(self._quiet_until) > MAX_TOPICS:
            self._quiet_until.popitem(last=False)


def plain_error(error: FleetError) -> dict[str, str]:
    """The parts of an error for the wire or the journal; they may quote what a robot sent, so they are cut."""
    return {name: str(value)[:MAX_TEXT] for name, value in error.to_fields().items()}


def check_hello(fields: Mapping[str, Any]) -> RobotSpec:
    """The spec in a HELLO, checked against its hash; versions and boot id are checked first.

    Raises:
        ProtocolError: The two sides share no protocol version (both are named), or the boot id is out of the rules.
        SpecError: The spec is malformed, or is not the one that its hash names.
    """
    offered = fields["protocols"]
    if len(offered) != 2 or not all(isinstance(n, int) for n in offered):
        raise ProtocolError(f"protocols is {str(offered)[:80]}", rule="[oldest, newest] that the robot understands")
    if offered[0] > PROTOCOLS[1] or offered[1] < PROTOCOLS[0]:
        older = "robot" if offered[1] < PROTOCOLS[0] else "gateway"
        raise ProtocolError(
            f"the robot's software {fields['software'][:40]!r} speaks protocols {offered[0]} to {offered[1]}",
            rule=f"the gateway's software {__version__!r} speaks protocols {PROTOCOLS[0]} to {PROTOCOLS[1]}",
            remedy=f"update the {older}",
        )
    if not _BOOT_ID.fullmatch(fields["boot_id"]):
        raise ProtocolError(f"boot_id is {fields['boot_id'][:40]!r}", rule="16 hexadecimal digits")
    spec = RobotSpec.from_dict(fields["spec"])
    if spec.hash != fields["spec_hash"]:
        raise SpecError(
            f"spec_hash is {fields['spec_hash'][:40]!r}",
            rule=f"the spec that came with it has the hash {spec.hash!r}",
            remedy="send RobotSpec.to_dict() and RobotSpec.hash of one spec",
        )
    return spec
