"""learner-status.json: what the driver last said of the learner, for the supervisor, the registry and people."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from fleet.runfolder import RunFolder

NOT_SHOWN = ("time_ns", "driver", "ranks", "evaluators", "error")  # of no use in one line


def write_status(run: RunFolder, status: Mapping[str, Any]) -> None:
    """Replaces the file whole. It need not outlive a power loss, so nothing is fsynced; a full disk does not end who writes."""
    partial = run.learner_status.with_suffix(".partial")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(status))
        os.replace(partial, run.learner_status)


def read_status(run: RunFolder) -> dict[str, Any]:
    """The newest status, {} where there is none: ``state`` (starting | waiting | training | finished | failed | stopped),
    ``time_ns`` and ``driver`` (the pid of who wrote it), and what ``infra.driver`` adds."""
    try:
        status = json.loads(run.learner_status.read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def one_line(status: Mapping[str, Any]) -> str:
    """The status as `fleet up` says it now and then."""
    return "learner " + ", ".join(f"{key} {value}" for key, value in status.items() if key not in NOT_SHOWN)
