"""Functions that tests of the cluster run in Ray's workers instead of training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fleet.errors import ConfigError, LearnerError
from fleet.files import Files, FolderLock
from fleet.runfolder import RunFolder
from learner.placement import RankPlace
from learner.progress import Progress

Stop = Callable[[], bool]
TICK_S = 0.02


def count(run: RunFolder, tables: Any, *, stop: Stop, report: Callable[[Progress], None], place: RankPlace) -> None:
    """Ranks count together over gloo, and remember the number in checkpoints/count."""
    from learner.ranks import Ranks

    ranks = Ranks(place)
    (run.path / f"rank-{place.rank}.json").write_text(json.dumps({"shards": place.shards}))
    kept = run.checkpoints / "count"
    step = began = int(ranks.gather([int(kept.read_text()) if kept.exists() else 0])[0, 0])
    try:
        while step < tables["learner"].steps and not ranks.gather([float(stop())]).any():
            step += 1
            size = float(np.sum(ranks.gather([1.0])))
            if ranks.first:
                Files().write_atomic(kept, str(step).encode())
            report(Progress(step=step, stats={"size": size, "began": float(began)}))
            time.sleep(TICK_S)
    except BaseException as error:
        raise ranks.fail(error) or error from None
    ranks.close()


def pretend(run: RunFolder, tables: Any, *, stop: Stop, report: Callable[[Progress], None], place: RankPlace) -> None:
    """Rank 0 counts as ``count`` does, the others do nothing, and nobody exchanges anything: starts fast, without torch.
    A file raise-R or config-R in the run folder is what happens to rank R; the others then complain of a lost connection."""
    bad = {path.name.split("-")[0]: int(path.name.split("-")[1]) for path in run.path.glob("*-[0-9]")}
    if bad.get("raise") == place.rank:
        time.sleep(0.2)  # the echo of it is there first
        raise LearnerError("the sky fell", rule="it stays up", remedy="hold it")
    if bad.get("config") == place.rank:
        raise ConfigError("learner.seed = 'x'", rule="a number")
    if bad:
        raise LearnerError(f"rank {place.rank} lost another rank: connection closed by peer")
    kept = run.checkpoints / "count"
    step = began = int(kept.read_text()) if kept.exists() else 0
    while not stop() and step < tables["learner"].steps:
        if place.rank == 0:
            step += 1
            Files().write_atomic(kept, str(step).encode())
        report(Progress(step=step, stats={"size": float(place.size), "began": float(began)}))
        time.sleep(TICK_S)


def pretend_locked(run: RunFolder, tables: Any, *, place: RankPlace, **others: Any) -> None:
    """``pretend`` under the lock that the one learner of a run holds."""
    lock = FolderLock(run.checkpoints, "checkpoints") if place.rank == 0 else None
    pretend(run, tables, place=place, **others)
    if lock is not None:
        lock.release()


def eat(run: RunFolder, tables: Any, *, stop: Stop, **others: Any) -> None:
    """Takes 64 MB more of memory each time until it is told to stop."""
    eaten = []
    while not stop() and len(eaten) < 64:
        eaten.append(np.ones(1 << 23))
        time.sleep(TICK_S)


def serve(
    *, stop: Stop, report: Callable[[dict[str, Any]], None], word: str = "", fail_at: int = 0, wrong: bool = False
) -> None:
    """Counts and reports until it is told to stop. Raises at a number, or says that its configuration is wrong."""
    if wrong:
        raise ConfigError("evaluator.every = -1", rule="every >= 0")
    number = 0
    while not stop():
        number += 1
        report({"number": number, "word": word, "pid": os.getpid()})
        if number == fail_at:
            raise RuntimeError("three is too many")
        time.sleep(TICK_S)
    report({"number": -1, "word": word})
