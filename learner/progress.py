"""How far a run is: what the loop reports. Needs no torch, so that whoever watches does not either."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Progress:
    """How far the run is. ``seconds``: time on the loop's thread by what it was spent on, since this process began;
    ``feed``: how its batches are made, by name. ``waiting``: what the learner waits for, in detail, or "". ``pace``: always
    one line, who waits for what or who is ahead. ``advice``: what the algorithm lacks, or ""."""

    step: int = 0
    steps: int = 0
    phase: str = ""
    algorithm: str = ""
    release: int = 0
    num_steps: int = 0
    by_source: dict[str, int] = dataclasses.field(default_factory=dict)
    updates_per_s: float = 0.0
    waiting: str = ""
    pace: str = ""
    advice: str = ""
    num_replaced: int = 0
    stats: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    feed: dict[str, float] = dataclasses.field(default_factory=dict)
