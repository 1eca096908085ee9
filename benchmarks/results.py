"""Rows of measurements: benchmarks/results/<name>.json, and RESULTS.md made from them and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("results")
PAGE = Path(__file__).with_name("RESULTS.md")


@dataclasses.dataclass
class Row:
    """One measured number. ``value`` None: could not be measured, ``why`` says the reason."""

    what: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    repeats: int = 1
    peer: str = ""
    peer_value: float | None = None
    limit: str = ""
    target: str = ""
    met: bool | None = None
    why: str = ""
    command: str = ""
    commit: str = ""
    machine: str = ""


def save(name: str, rows: list[Row], command: str) -> Path:
    """Writes the rows of one benchmark, stamped with command, commit and machine, and makes the page anew."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    for row in rows:
        row.command, row.commit, row.machine = command, commit, machine()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    write_page()
    return path


def machine() -> str:
    """What the numbers were measured on, in words."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} x {platform.machine()} cores, {memory_gb:.0f} GB, Python {platform.python_version()}"


def write_page() -> None:
    """RESULTS.md, one table a benchmark."""
    lines = ["# Measurements", "", "Made by `benchmarks/results.py` from `benchmarks/results/*.json`. Do not edit."]
    for path in sorted(FOLDER.glob("*.json")):
        rows = [Row(**row) for row in json.loads(path.read_text())]
        if not rows:
            continue
        first = rows[0]
        lines += ["", f"## {path.stem}", "", f"`{first.command}`, commit {first.commit}, {first.machine}", ""]
        lines += ["| what | value | interval | repeats | peer | target | met |", "|---|---|---|---|---|---|---|"]
        for row in rows:
            value = f"not measured: {row.why}" if row.value is None else f"{row.value:g} {row.unit}"
            interval = "" if row.low is None or row.high is None else f"{row.low:g} - {row.high:g}"
            peer = f"{row.peer} {'' if row.peer_value is None else f'{row.peer_value:g}'}".strip()
            met = {True: "yes", False: "no", None: ""}[row.met]
            if row.value is not None and row.why:
                met = f"{met} ({row.why})".strip()
            lines.append(f"| {row.what} | {value} | {interval} | {row.repeats} | {peer} | {row.target} | {met} |")
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_page()
    sys.stdout.write(f"{PAGE}\n")
