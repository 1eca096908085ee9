"""Facts of a run, one JSON object a line, from which the live view and the report are made.

A journal is for people: it is written without fsync and nothing depends on it. Every line has ``time_ns`` and
``kind``. Kinds, by the process that writes them:

gateway: ``durable`` (robot, boot, seq, latency_ms: one number a step, executed -> fsynced; steps: by source),
    ``episode`` (robot, boot, episode_id, task, outcome, judge, length, operator_steps, source, first_version,
    last_version), ``member`` (robot, event: joined | left | lost | replaced), ``loaded`` (robot, version, latency_ms:
    published -> in the robot's policy), ``refused`` (robot, error), ``retired`` (segment, action: drop | compact, why: age |
    bytes, frees: bytes, steps), ``disk`` (low, free_gb)
learner: ``sampleable`` (robot, boot, seq, latency_ms: one number a step, executed -> in the sampler), ``update`` (step, loss,
    updates_per_s), ``published`` (version, step), ``checkpoint`` (step), ``resumed`` (step, version, passed_over: why newer
    checkpoints were not taken, ranks, shards_left_out: of the checkpoint, that nobody reads any more), ``waiting`` (why),
    ``rate`` (state, why, inserts, samples, cursor: what the rate limiter holds or no longer holds),
    ``undecodable`` (why: a window that is left out of batches), ``skipped`` (what: damaged | skipped_fragments | skipped_steps,
    why: what the learner does not train on, once each, and for steps once a task)
evaluator: ``evaluated`` (version, tasks: success rate with the ends of its 95 % interval by task, seconds, skipped: releases
    that were due and old meanwhile), ``evaluation_skipped`` (version, error: gone or damaged), ``evaluator_failed`` (code,
    what, rule, remedy)
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Appends to one file, from any thread. One process a file.

    Attributes:
        num_dropped: Facts that could not be written, for example on a full disk. They stop nobody.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)
        self.num_dropped = 0
        self._lock = threading.Lock()

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"time_ns": time.time_ns(), "kind": kind, **fields}) + "\n"
        try:
            with self._lock:
                self._file.write(line)
        except OSError:
            self.num_dropped += 1

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            self.num_dropped += 1


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a journal; a torn last line is left out, a missing file is empty."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue
