"""``fleet data verify | repair | prune``: what keeps a run's data whole and within its limits."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from buffer.main import BufferConfig
from buffer.retention import DROP, Action, Limits, prune
from fleet.config import load_run
from fleet.errors import ConfigError
from fleet.runfolder import RunFolder


def prune_run(run_path: Path, max_gb: float | None, max_age_h: float | None, protect: list[str] | None, yes: bool) -> None:
    """What the limits ask for; what is None is as the run's settings say.

    Raises:
        ConfigError: There is no limit, or one that makes no sense.
        RunFolderError: The run is being served.
    """
    run = RunFolder.open(run_path)
    config: BufferConfig = load_run(run.config, {"buffer": BufferConfig})["buffer"]
    config.max_gb = config.max_gb if max_gb is None else max_gb
    config.max_age_h = config.max_age_h if max_age_h is None else max_age_h
    config.protect = config.protect if protect is None else protect
    config.check()
    if not config.max_gb and not config.max_age_h:
        raise ConfigError(
            f"there is no limit for {run.path}",
            rule="data is given up by size or by age",
            remedy="give --max-gb or --max-age-h, or set buffer.max_gb or buffer.max_age_h in the run file",
        )
    show_pruned(prune(run.buffer, config.limits(), dry_run=not yes), config.limits(), yes)


def show_pruned(actions: list[Action], limits: Limits, done: bool) -> None:
    """What retention did or would do, segment by segment."""
    console = Console()
    if not actions:
        console.print(f"nothing to give up; protected: {', '.join(limits.protect) or 'nothing'}")
        return
    table = Table("segment", "what", "why", "steps", "frees")
    for action in actions:
        what = "dropped" if action.kind == DROP else f"kept: episodes with {', '.join(limits.protect)}"
        frees = f"{'' if done or action.kind == DROP else 'about '}{action.frees / 1e6:,.1f} MB"
        table.add_row(str(action.entry.number), what, action.why, f"{action.entry.num_steps:,}", frees)
    console.print(table)
    total = sum(action.frees for action in actions) / 1e6
    console.print(f"{total:,.1f} MB are free again" if done else f"--yes does it and frees about {total:,.1f} MB")
