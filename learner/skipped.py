"""What the learner does not train on is counted, and said when it begins: a person must not have to look for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from buffer.sampler import Sampler

COUNTED = ("damaged", "skipped_fragments", "skipped_steps")
MAX_TASKS = 20  # that are named, each once

log = logging.getLogger("fleet.learner")


class Skipped:
    """Looks at the counts of a sampler.

    Args:
        sampler: May be in use by another thread.
        catalogue: The run's tasks.json.
        write: ``Journal.write``.
    """

    def __init__(self, sampler: Sampler, catalogue: Path, write: Callable[..., None]) -> None:
        self._sampler, self._catalogue, self._write = sampler, catalogue, write
        self._said: set[str] = set()

    def look(self) -> dict[str, float]:
        """Counts by ``COUNTED``. What is above 0 for the first time gets a line in the journal and a warning."""
        sampler = self._sampler
        damaged, fragments, tasks = sampler.damaged, dict(sampler.skipped_fragments), dict(sampler.skipped_tasks)
        look = "`fleet data verify` names them"
        if damaged:
            self._say("damaged", "damaged", f"{damaged} places in the log could not be read, their steps are skipped: {look}")
        if fragments:
            codes = ", ".join(f"{count} for {code!r}" for code, count in sorted(fragments.items()))
            self._say("fragments", "skipped_fragments", f"fragments could not be used and are skipped, {codes}: {look}")
        for task, count in tasks.items():
            if f"task {task}" not in self._said and len(self._said) < MAX_TASKS:
                why = f"steps of task {task!r} are skipped, {count} so far: {self._reason(task)}"
                self._say(f"task {task}", "skipped_steps", why)
        counts = damaged, sum(fragments.values()), sum(tasks.values())
        return {name: float(count) for name, count in zip(COUNTED, counts, strict=True)}

    def _say(self, key: str, what: str, why: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._write("skipped", what=what, why=why)
            log.warning("%s", why)

    def _reason(self, task: str) -> str:
        try:
            known = task in json.loads(self._catalogue.read_text())
        except (OSError, ValueError):
            known = False
        if known:
            return "it came to tasks.json after the learner began; stop the run and go on with `fleet up RUN --resume`"
        return "it is not in tasks.json; add it to run.tasks in run.yaml, stop the run and go on with `fleet up RUN --resume`"
