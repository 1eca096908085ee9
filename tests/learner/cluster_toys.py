"""Functions that tests of the cluster run in Ray's workers instead of training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fleet.errors import ConfigError, LearnerError
from fleet.files import Files
from fleet.runfolder import RunFolder
from learner.progress import Progress
from learner.ranks import RankPlace, Ranks


def count(
    run: RunFolder, tables: Any, *, stop: Callable[[], bool], report: Callable[[Progress], None], place: RankPlace
) -> None:
    """Ranks count together, 50 a second, and remember the number in checkpoints/count. What a file in the run folder is
    called happens to the rank in its name: raise-1, config-0, exit-1."""
    ranks = Ranks(place)
    kept = run.checkpoints / "count"
    step = int(ranks.gather([int(kept.read_text()) if kept.exists() else 0])[0, 0])
    began = step
    try:
        while step < tables["learner"].steps:
            what = next((f.name for f in run.path.glob(f"*-{place.rank}") if f.name[:4] in ("rais", "conf", "exit")), "")
            if what.startswith("raise"):
                raise LearnerError("the sky fell", rule="it stays up", remedy="hold it")
            if what.startswith("config"):
                raise ConfigError("learner.seed = 'x'", rule="a number")
            if what.startswith("exit"):
                os._exit(9)
            if ranks.gather([float(stop())]).any():
                break
            step += 1
            facts = {"rank": float(place.rank), "size": place.size, "shards": place.shards, "began": began, "pid": os.getpid()}
            report(Progress(step=step, stats={"size": float(np.sum(ranks.gather([1.0]))), "began": float(began)}))
            if ranks.first:
                Files().write_atomic(kept, str(step).encode())
            (run.path / f"rank-{place.rank}.json").write_text(json.dumps(facts))
            time.sleep(0.02)
    except BaseException as error:
        raise ranks.fail(error) or error from None
    ranks.close()


def serve(
    *, stop: Callable[[], bool], report: Callable[[dict[str, Any]], None], word: str = "", fail_at: int = 0, wrong: bool = False
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
        time.sleep(0.02)
    report({"number": -1, "word": word})
