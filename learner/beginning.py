"""What a run's learner begins with: enough data, and what the run file said of its training.

All ranks take part, and come to the same.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from fleet.journal import Journal
from learner.progress import Progress
from learner.ranks import Ranks
from learner.supply import POLL_S, BatchSource

SETTINGS = ("learner", "engine", "policy", "algorithm", "start")  # tables that say what is trained, and how


def wait_for_data(
    source: BatchSource,
    min_size: int,
    ranks: Ranks,
    stop: Callable[[], bool],
    report: Callable[[Progress], None],
    journal: Journal,
) -> bool:
    """Waits until the shards together have ``min_size`` steps; False when ``stop`` of any rank came first."""
    said = False
    ranks.patiently(source.poll)  # the first look at a long log
    while True:
        source.poll()
        table = ranks.gather([source.num_steps(), stop()])
        num_steps = int(table[ranks.place.leaders, 0].sum())
        if num_steps >= min_size or table[:, 1].any():
            return num_steps >= min_size
        why = (
            f"the learner waits for data: the buffer has {num_steps} steps, learner.min_size_to_sample is {min_size}; "
            "give demonstrations with `fleet join FILE --demonstrate 10`"
        )
        if not said and ranks.first:
            journal.write("waiting", why=why, step=0)
        said = True
        line = f"learner waits for data: {min_size - num_steps:,} more steps"
        report(Progress(num_steps=num_steps, waiting=why, pace=line))
        time.sleep(POLL_S)


def settings_of(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's tables as plain data, for the next process to compare with."""
    settings: dict[str, Any] = plain({name: dataclasses.asdict(table) for name, table in tables.items() if name in SETTINGS})
    return settings


def changed_settings(old: Any, new: Any, key: str = "") -> dict[str, list[Any]]:
    """Old and new value by key, for example ``algorithm.config.learning_rate``; None where there was or is none."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return {key: [old, new]} if old != new else {}
    changed: dict[str, list[Any]] = {}
    for name in {**old, **new}:
        changed |= changed_settings(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    return changed


def plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))
