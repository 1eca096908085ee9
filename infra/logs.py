"""`fleet logs`: what the processes of a run wrote, on one screen or as it comes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.table import Table

from fleet.errors import FleetError
from fleet.lookup import nearest
from fleet.runfolder import RunFolder

POLL_S = 0.2
BLOCK = 1 << 16


def log_files(run: RunFolder) -> dict[str, Path]:
    """Text logs of this node's processes by name, journals as NAME.jsonl, supervisors of other nodes as node-NAME."""
    files = {path.stem: path for path in sorted(run.logs.glob("*.log"))}
    files |= {path.name: path for path in sorted(run.logs.glob("*.jsonl"))}
    return files | {f"node-{path.stem}": path for path in sorted(run.nodes.glob("*.log"))}


def show_logs(run_path: Path, name: str, num: int, follow: bool) -> None:
    """Prints the end of one log, or of what logs there are when ``name`` is empty.

    Raises:
        FleetError: There is no log of that name.
    """
    run = RunFolder.open(run_path)
    files = log_files(run)
    if not name:
        _list(files)
        return
    if name not in files and not follow:
        raise FleetError(f"{run.path} has no log {name!r}", rule=f"one of {sorted(files)}", remedy=nearest(name, files))
    path = files.get(name, run.logs / (name if name.endswith(".jsonl") else f"{name}.log"))
    for text in last_and_new(path, num, follow):
        os.write(1, text)


def last_and_new(path: Path, num: int, follow: bool, stop: Callable[[], bool] = lambda: False) -> Iterator[bytes]:
    """The last ``num`` lines of a file and, if ``follow``, what is added until ``stop``; also when the file is made later,
    made anew or cut."""
    file: BinaryIO | None = None
    try:
        while True:
            if file is None and path.exists():
                file = path.open("rb")
                yield _tail(file, num)
            elif file is not None and not _same(file, path):
                file.close()
                file, num = None, 1 << 30  # the new one from its beginning
                continue
            elif file is not None and (text := file.read(BLOCK)):
                yield text
                continue
            if not follow or stop():
                return
            time.sleep(POLL_S)
    finally:
        if file is not None:
            file.close()


def _tail(file: BinaryIO, num: int) -> bytes:
    """The last ``num`` lines; the file stands at its end then."""
    left, text = file.seek(0, 2), b""
    while left and text.count(b"\n") <= num:
        step = min(left, BLOCK)
        left = file.seek(left - step)
        text = file.read(step) + text
    file.seek(0, 2)
    return b"".join(text.splitlines(keepends=True)[-num:]) if num else b""


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return True  # gone; wait for the new one
    own = os.fstat(file.fileno())
    return (own.st_ino, own.st_dev) == (there.st_ino, there.st_dev) and there.st_size >= file.tell()


def _list(files: dict[str, Path]) -> None:
    table = Table("log", "size", "last written")
    for name, path in files.items():
        facts = path.stat()
        table.add_row(name, f"{facts.st_size / 1000:,.1f} kB", f"{time.time() - facts.st_mtime:,.0f} s ago")
    Console().print(table)
