"""What the parts of the buffer's benchmark share: the peers' environments, medians, progress lines."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Row

ROOT = Path(__file__).parents[1]
_START = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Peers:
    """Interpreters of the peers' environments; None where ``tools/setup_peers.sh`` did not make one."""

    reverb: Path | None
    torchrl: Path | None
    why_no_reverb: str = "no .venv-reverb: run tools/setup_peers.sh (Python 3.10)"
    why_no_torchrl: str = "no .venv-torchrl: run tools/setup_peers.sh"

    @classmethod
    def find(cls) -> Peers:
        paths = {name: ROOT / f".venv-{name}" / "bin" / "python" for name in ("reverb", "torchrl")}
        return cls(**{name: path if path.with_name("ready").exists() else None for name, path in paths.items()})


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def measured(what: str, values: Sequence[float], unit: str, digits: int = 0) -> Row:
    """A row with the median of the repeats, and their lowest and highest."""
    shown = [round(v, digits) for v in (median(values), min(values), max(values))]
    return Row(what, shown[0], unit, low=shown[1], high=shown[2], repeats=len(values))


def missing(what: str, unit: str, why: str) -> Row:
    """A row that could not be measured."""
    return Row(what, None, unit, why=why)


def say(text: str) -> None:
    """A line of progress with the time since the start."""
    sys.stderr.write(f"{time.monotonic() - _START:6.0f} s  {text}\n")
    sys.stderr.flush()
