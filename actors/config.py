"""The actor's tables of a run file or credential file. See fleet/config.py for how they are read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from actors.plan import Chunking
from actors.safety import SafetyConfig
from fleet.errors import ConfigError


@dataclasses.dataclass
class RobotConfig:
    adapter: str = "toy"
    """A name of actors/robots (toy, gym, metaworld) or module:Class of your own."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the adapter."""


@dataclasses.dataclass
class OperatorConfig:
    adapter: str = "none"
    """A name of actors/operators, module:Class of your own, or none: nobody takes over."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the adapter."""


@dataclasses.dataclass
class ActorConfig:
    tasks: list[str] = dataclasses.field(default_factory=list)
    """What this robot works on, in turn; empty: all tasks of the run."""
    first_task: int = 0
    """Which of them comes first, so that robots do not all begin with the same."""
    seed: int = 0
    """Seed of the starts, together with the robot's id."""
    num_episodes: int = 0
    """Episodes to run; 0: until stopped."""
    demonstrate: bool = False
    """The operator shows the tasks from the first frame; no policy is needed."""
    execute: int = 4
    """Actions used of each chunk before the next one takes over, at most the policy's horizon."""
    chunking: str = "execute"
    """``execute``: a chunk is asked for every ``execute`` ticks, and its tick waits for it. ``async``: so early that it is
    there when ``execute`` actions of the last one are used, for policies that need longer than a tick; no tick waits.
    ``ensemble``: as execute, and what several chunks say of one tick is averaged."""
    ensemble_decay: float = 0.01
    """m of the weights exp(-m i) of ``ensemble``, i = 0 being the oldest chunk."""
    guidance: float = 1.0
    """Classifier-free guidance by the condition "advantage": 0 leaves it out, 1 takes it as given, above 1 exaggerates it."""
    sample: bool = False
    """Whether chunks are drawn from the policy, with their log-probabilities recorded; False: its one best chunk."""
    device: str = "cpu"
    """Where the policy runs, by torch's name: cpu, cuda, cuda:1."""
    realtime: bool = True
    """False: as fast as simulator and policy allow."""
    chunk_deadline: float = 0.7
    """Share of a control period that a tick may wait for a chunk that is due in it."""
    fragment_s: float = 0.5
    """Seconds of steps that are sent together."""
    spool_mb: int = 2000
    """Disk that the spool may take, in MB."""
    wait_for_gateway_s: float = 0.0
    """Seconds after which a gateway that does not answer ends the actor before its first episode; 0: wait for ever."""
    drain_s: float = 10.0
    """Seconds to wait at the end for the gateway's acknowledgement of what is in the spool."""
    safety: SafetyConfig = dataclasses.field(default_factory=SafetyConfig)

    def check(self) -> None:
        self.chunk_rule()
        rules = {
            "guidance": (math.isfinite(self.guidance) and self.guidance >= 0, "guidance is finite and not negative"),
            "sample": (
                not self.sample or (self.guidance == 1 and self.chunking != "ensemble"),
                "chunks are drawn with guidance 1 and chunking execute or async: nothing else has the policy's density",
            ),
            "chunk_deadline": (0 < self.chunk_deadline < 1, "0 < chunk_deadline < 1"),
            "fragment_s": (0.05 <= self.fragment_s <= 5, "0.05 <= fragment_s <= 5"),
            "spool_mb": (self.spool_mb >= 10, "spool_mb >= 10"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"{key} = {getattr(self, key)!r}", rule=rule)

    def chunk_rule(self) -> Chunking:
        """How chunks follow each other. ConfigError where a value is out of its range."""
        return Chunking(self.chunking, self.execute, self.ensemble_decay)


TABLES = {"robot": RobotConfig, "operator": OperatorConfig, "actor": ActorConfig}
