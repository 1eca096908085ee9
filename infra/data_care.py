"""``fleet data verify | repair | prune``: what keeps a run's data whole and within its limits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from buffer.main import BufferConfig
from buffer.repair import repair
from buffer.retention import DROP, Action, Limits, prune
from buffer.verify import REPAIRABLE, Fault, Report, verify
from fleet.config import load_run
from fleet.errors import ConfigError
from fleet.runfolder import RunFolder
from infra.tables import console, table


def prune_run(run_path: Path, max_gb: float | None, max_age_h: float | None, protect: list[str] | None, yes: bool) -> None:
    """What the limits ask for; what is None is as the run's settings say.

    Raises:
        ConfigError: There is no limit, or no such source.
        RunFolderError: The run is being served.
    """
    run = RunFolder.open(run_path)
    config: BufferConfig = load_run(run.config, {"buffer": BufferConfig})["buffer"]
    config.protect = config.protect if protect is None else protect
    config.check()
    config.max_gb = config.max_gb if max_gb is None else max_gb
    config.max_age_h = config.max_age_h if max_age_h is None else max_age_h
    if not config.max_gb and not config.max_age_h:
        raise ConfigError(
            f"there is no limit for {run.path}",
            rule="data is given up by size or by age",
            remedy="give --max-gb or --max-age-h, or set buffer.max_gb or buffer.max_age_h in the run file",
        )
    show_pruned(prune(run.buffer, config.limits(), dry_run=not yes), config.limits(), yes)


def show_pruned(actions: list[Action], limits: Limits, done: bool) -> None:
    """What retention did or would do, segment by segment."""
    out, kept = console(), ", ".join(limits.protect) or "nothing"
    if not actions:
        out.print(f"nothing to give up; protected: {kept}")
        return
    rows = []
    for action in actions:
        what = "dropped" if action.kind == DROP else f"kept: episodes with {kept}"
        frees = f"{'' if done or action.kind == DROP else 'about '}{action.frees / 1e6:,.1f} MB"
        rows.append((action.entry.number, what, action.why, f"{action.entry.num_steps:,}", frees))
    out.print(table(">segment|what|why|>steps|>frees", rows))
    total = sum(action.frees for action in actions) / 1e6
    out.print(f"{total:,.1f} MB are free again" if done else f"--yes does it and frees about {total:,.1f} MB")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while bytes are gone through; nothing where that is no terminal. Called with (done, all)."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def verify_run(run_path: Path, as_json: bool) -> int:
    """Prints what was checked and every fault; returns the exit code: 0 whole, 1 not."""
    run = RunFolder.open(run_path)
    with progress_bar("checking") as progress:
        report = verify(run.buffer, progress)
    if as_json:
        print(json.dumps({"run": run.run_id, "whole": not report.faults, **report.to_dict()}, indent=1))
    else:
        _show_report(report)
    return 1 if report.faults else 0


def _show_report(report: Report) -> None:
    out = console()
    checked = (
        f"{report.segments:,} segments, {report.bytes / 1e9:.3f} GB, {report.fragments:,} fragments, {report.steps:,} steps"
    )
    out.print(f"checked: {checked} of {report.boots:,} boots, {report.labels:,} labels")
    notes = {
        "fragments were given up by retention": report.given_up,
        "segments have no sidecar yet": report.without_sidecar,
        "segments are still written to, or were left by a killed gateway": report.open_segments,
    }
    for what, count in notes.items():
        if count:
            out.print(f"{count:,} {what}")
    if not report.faults:
        out.print("whole: every checksum holds, every acknowledged fragment is there once", style="green")
        return
    out.print()
    out.print(table("fault|segment|>offset|>bytes|robot|boot|>seq|what", map(_fault_row, report.faults)))
    again = sum(fault.kind in REPAIRABLE for fault in report.faults)
    data = len(report.faults) - again
    out.print()
    if again:
        out.print(f"{again:,} can be made anew: fleet data repair")
    if data:
        out.print(f"{data:,} are in the data: readers pass over it, and nothing can bring it back but an archive")


def _fault_row(fault: Fault) -> tuple[object, ...]:
    offset, size = (fault.offset, fault.end - fault.offset) if fault.offset >= 0 else ("", "")
    seq = "" if fault.seq < 0 else fault.seq if fault.last_seq == fault.seq else f"{fault.seq}-{fault.last_seq}"
    size = size if isinstance(size, int) and size > 0 else ""
    return fault.kind, fault.segment, offset, size, fault.robot_id, fault.boot_id, seq, fault.what


def repair_run(run_path: Path, yes: bool) -> None:
    """Makes anew what can be; or only says so."""
    run = RunFolder.open(run_path)
    with progress_bar("looking") as progress:
        found = repair(run.buffer, dry_run=not yes, progress=progress)
    out = console()
    if not found:
        out.print("nothing to repair")
        return
    out.print(table("file|what", [(repaired.file, repaired.what) for repaired in found]))
    out.print("done" if yes else f"--yes does it: {len(found)} files; no segment is changed")
