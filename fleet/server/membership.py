"""Who is in the fleet: a state machine without clocks or sockets. Events go in, facts come out."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_METRICS = 64
OFFSET_WINDOW = 16  # heartbeats
_METRIC_NAME = re.compile(r"[a-z][a-z0-9_.]{0,47}")
_MAX_NS = 2**62

JOINED, LEFT, LOST = "joined", "left", "lost"


@dataclasses.dataclass
class Member:
    """What is known of one robot.

    Attributes:
        state: "live", "left" (took its leave) or "lost" (fell silent).
        last_seen_ns: Gateway's wall clock at its last sign of life.
        last_seen_s: The same on the monotonic clock that ``sweep`` is given.
        version: The release that it acts with, 0 for none.
        clock_offset_ns: Robot's clock minus the gateway's, too low by the shortest way of a recent heartbeat.
        metrics: Numbers from its newest heartbeat.
    """

    robot_id: str
    state: str = "live"
    boot_id: str = ""
    software: str = ""
    last_seen_ns: int = 0
    last_seen_s: float = 0.0
    version: int = 0
    clock_offset_ns: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    offsets_ns: collections.deque[int] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=OFFSET_WINDOW))

    def view(self) -> dict[str, Any]:
        """Plain data for people: the metrics, and above them what the gateway knows itself."""
        return {
            **self.metrics,
            "state": self.state,
            "boot_id": self.boot_id,
            "software": self.software,
            "last_seen_ns": self.last_seen_ns,
            "version": self.version,
            "clock_offset_ms": round(self.clock_offset_ns / 1e6, 3),
        }


@dataclasses.dataclass(frozen=True)
class MemberEvent:
    """A robot ``joined``, ``left`` or was ``lost``."""

    robot_id: str
    event: str


class Membership:
    """All robots that were seen since the gateway started.

    Args:
        lost_after_s: Silence after which a robot is lost.
    """

    def __init__(self, lost_after_s: float = 10.0) -> None:
        self._lost_after_s = lost_after_s
        self.members: dict[str, Member] = {}

    @property
    def num_live(self) -> int:
        return sum(member.state == "live" for member in self.members.values())

    def hello(self, robot_id: str, boot_id: str, software: str, *, now_s: float, time_ns: int) -> list[MemberEvent]:
        """A robot was admitted."""
        member = self.members.setdefault(robot_id, Member(robot_id, state="new"))
        if member.boot_id != boot_id:
            member.offsets_ns.clear()  # a restart may have set the clock
        member.boot_id, member.software = boot_id, software[:64]
        return self._seen(member, now_s, time_ns)

    def seen(self, robot_id: str, *, now_s: float, time_ns: int) -> list[MemberEvent]:
        """Any other sign of life of a robot that was admitted."""
        member = self.members.get(robot_id)
        return [] if member is None else self._seen(member, now_s, time_ns)

    def heartbeat(
        self, robot_id: str, robot_time_ns: int, metrics: Mapping[Any, Any], *, now_s: float, time_ns: int
    ) -> list[MemberEvent]:
        """A robot told its clock and its numbers. Both come from the network: what is not a finite number is left out."""
        member = self.members.get(robot_id)
        if member is None:
            return []
        if 0 <= robot_time_ns < _MAX_NS:
            # A heartbeat can only come late, which makes the difference smaller: the largest is the nearest.
            member.offsets_ns.append(robot_time_ns - time_ns)
            member.clock_offset_ns = max(member.offsets_ns)
        member.metrics = clean_metrics(metrics)
        if "version" in member.metrics:
            member.version = max(int(member.metrics["version"]), 0)
        return self._seen(member, now_s, time_ns)

    def loaded(self, robot_id: str, version: int) -> None:
        """A robot acts with this release now."""
        member = self.members.get(robot_id)
        if member is not None:
            member.version = version

    def bye(self, robot_id: str) -> list[MemberEvent]:
        """A robot took its leave."""
        return self._end(robot_id, "left", LEFT)

    def lose(self, robot_id: str) -> list[MemberEvent]:
        """A robot was cut off."""
        return self._end(robot_id, "lost", LOST)

    def sweep(self, now_s: float) -> list[MemberEvent]:
        """Which live robots have been silent for too long."""
        silent = [m.robot_id for m in self.members.values() if m.state == "live" and now_s - m.last_seen_s > self._lost_after_s]
        return [event for robot_id in silent for event in self.lose(robot_id)]

    def _seen(self, member: Member, now_s: float, time_ns: int) -> list[MemberEvent]:
        back = member.state != "live"
        member.state, member.last_seen_s, member.last_seen_ns = "live", now_s, time_ns
        return [MemberEvent(member.robot_id, JOINED)] if back else []

    def _end(self, robot_id: str, state: str, event: str) -> list[MemberEvent]:
        member = self.members.get(robot_id)
        if member is None or member.state != "live":
            return []
        member.state = state
        return [MemberEvent(robot_id, event)]


def clean_metrics(metrics: Mapping[Any, Any]) -> dict[str, float]:
    """At most ``MAX_METRICS`` finite numbers under plain names."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if len(found) == MAX_METRICS:
            break
        if isinstance(name, str) and _METRIC_NAME.fullmatch(name) and isinstance(value, (int, float)):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number):
                found[name] = number
    return found
