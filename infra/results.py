"""Results of tests on held-out starts: report/evaluations.json of a run, written by several processes. Loads no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fleet.errors import StorageError
from fleet.files import Files, storage_errors
from fleet.runfolder import RunFolder
from infra.intervals import wilson

CONTINUAL = "continual"
"""Label of what the evaluator writes; those of `fleet eval` and the demo are "start", "release" and "final"."""


def results_file(run: RunFolder) -> Path:
    return run.report / "evaluations.json"


def read_results(run: RunFolder) -> list[dict[str, Any]]:
    """One row a release, label and task: version, label, at_ns (when it was published), measured_ns, task, episodes,
    successes. Empty before the first test.

    Raises:
        StorageError: Somebody damaged the file.
    """
    path = results_file(run)
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise StorageError(
            f"{path} is damaged: {error}",
            rule="it is replaced whole, by us only",
            remedy="mend it, or delete it and test again",
        ) from None
    return rows


def add_results(run: RunFolder, version: int, created_ns: int, label: str, counts: Mapping[str, tuple[int, int]]) -> None:
    """Adds the results of one release, whole or not at all; earlier ones of this release and label are replaced.

    Args:
        counts: (episodes, successes) by task.

    Raises:
        StorageError: The disk cannot be used.
    """
    run.report.mkdir(exist_ok=True)
    with storage_errors(f"results of release {version}"), _alone(run):
        rows = [row for row in read_results(run) if (row["version"], row["label"]) != (version, label)]
        if label == "final":
            for kept in rows:
                kept["label"] = "release" if kept["label"] == "final" else kept["label"]
        facts = {"version": version, "label": label, "at_ns": created_ns, "measured_ns": time.time_ns()}
        rows += [{**facts, "task": task, "episodes": n, "successes": k} for task, (n, k) in counts.items()]
        Files().write_atomic(results_file(run), json.dumps(rows, indent=1).encode())


@contextlib.contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """`fleet eval` and the evaluator add to one file: who reads it to add to it must be the only one."""
    with (run.report / "evaluations.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def success_rate(run: RunFolder, label: str, version: int = 0) -> tuple[float, float, float] | None:
    """Success over all tasks of the results with this label, with its Wilson 95 % interval; None if there are none.

    Args:
        version: Of that release only; 0: of all that have the label.
    """
    rows = [row for row in read_results(run) if row["label"] == label and version in (0, row["version"])]
    if not rows:
        return None
    successes, episodes = sum(r["successes"] for r in rows), sum(r["episodes"] for r in rows)
    return successes / episodes, *wilson(successes, episodes)


def newest_tested(run: RunFolder, label: str) -> int | None:
    """The newest release with results of this label; None if there is none."""
    return max((row["version"] for row in read_results(run) if row["label"] == label), default=None)


def newest_result(run: RunFolder, label: str) -> dict[str, Any]:
    """Over all tasks: ``version``, ``rate`` and the ends ``low`` and ``high`` of its 95 % interval; {} before the first."""
    version = newest_tested(run, label)
    found = success_rate(run, label, version) if version is not None else None
    return dict(zip(("version", "rate", "low", "high"), (version, *found), strict=True)) if found else {}
