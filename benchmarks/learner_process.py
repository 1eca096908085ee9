"""One rank that trains on a run folder and says where its time went:

    python -m benchmarks.learner_process RUN [RANK RANKS RENDEZVOUS]

RUN/benchmark.json holds settings of the learner's tables by name, ``warm``: steps before the clock starts, and ``curve``:
whether the loss of every step is wanted. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from fleet.runfolder import RunFolder
from learner.main import LEARNER_TABLES, check_learner_tables
from learner.progress import Progress
from learner.ranks import RankPlace


class Clock:
    """Called with the learner's reports: keeps the first one after ``warm`` steps, and the last before the end, at which
    the learner waits for the disk."""

    def __init__(self, warm: int) -> None:
        self._warm = warm
        self.losses: dict[int, float] = {}
        self.seen: list[tuple[float, float, Progress]] = []

    def __call__(self, progress: Progress) -> None:
        if progress.step and not progress.waiting:
            self.losses[progress.step] = progress.stats["loss"]
        if self._warm <= progress.step < progress.steps:
            self.seen = [*self.seen[:1], (time.perf_counter(), time.process_time(), progress)]

    def facts(self) -> dict[str, object]:
        (began, began_cpu, first), (ended, ended_cpu, last) = self.seen[0], self.seen[-1]
        return {
            "first": first.step,
            "last": last.step,
            "wall_s": ended - began,
            "cpu_s": ended_cpu - began_cpu,
            "seconds": {part: total - first.seconds.get(part, 0.0) for part, total in last.seconds.items()},
            "replaced": last.num_replaced,
            "losses": self.losses,
        }


def main() -> None:
    run = RunFolder.open(Path(sys.argv[1]))
    settings = json.loads((run.path / "benchmark.json").read_text())
    clock, curve = Clock(settings.pop("warm")), settings.pop("curve")
    tables = {name: cls(**settings.get(name, {})) for name, cls in LEARNER_TABLES.items()}
    check_learner_tables(tables)
    rank, size = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 2 else (0, 1)
    place = RankPlace(rank, (0,) * size, sys.argv[4] if size > 1 else "", timeout_s=300.0)
    from learner import loop
    from learner.train import train

    loop.REPORT_S = 0.0 if curve else loop.REPORT_S
    train(run, tables, stop=lambda: False, report=clock, place=place)
    if rank == 0:
        sys.stdout.write(json.dumps(clock.facts()) + "\n")
        sys.stdout.flush()
    os._exit(0)  # what engines leave running must not hold the benchmark


if __name__ == "__main__":
    main()
