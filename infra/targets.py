"""prometheus.json of a run folder: where its metrics are served now, as Prometheus' file service discovery reads it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fleet.files import Files
from fleet.runfolder import RunFolder


def targets_file(run: RunFolder) -> Path:
    return run.path / "prometheus.json"


def scrape_targets(run: RunFolder, processes: Iterable[str]) -> list[dict[str, Any]]:
    """One entry for each of ``processes`` that has written down its port; what it wrote is left there when it ends."""
    found, run_id = [], run.run_id
    for process in processes:
        try:
            port = json.loads((run.path / f"{process}.json").read_text())["metrics_port"]
        except (OSError, ValueError, KeyError):  # not started yet, or its metrics are off
            continue
        found.append({"targets": [f"127.0.0.1:{port}"], "labels": {"run": run_id, "process": process}})
    return found


def write_targets(run: RunFolder, processes: Iterable[str]) -> None:
    """Brings the file up to date; Prometheus sees a change by itself. Nothing depends on it, so a full disk stops nobody."""
    data = json.dumps(scrape_targets(run, processes), indent=1).encode()
    with contextlib.suppress(OSError):
        if not targets_file(run).exists() or targets_file(run).read_bytes() != data:
            Files().write_atomic(targets_file(run), data)
