"""``fleet data export`` and ``fleet data import``: LeRobot datasets from and into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.command import RunPath, clear_errors


def register(app: typer.Typer) -> None:
    """Adds both commands to ``fleet data``."""
    app.command("export")(export_command)
    app.command("import")(import_command)


def export_command(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="Folder of the dataset; made anew.")],
    task: Annotated[list[str] | None, typer.Option(help="Only this task. May be given again.")] = None,
    robot: Annotated[list[str] | None, typer.Option(help="Only this robot. May be given again.")] = None,
    outcome: Annotated[
        list[str] | None, typer.Option(help="Only success, failure, unknown or aborted episodes. May be given again.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Only episodes in which policy, operator, script or demo acted. May be given again."),
    ] = None,
    from_version: Annotated[int, typer.Option(help="Only episodes in which no older policy acted.")] = 0,
    spec: Annotated[str, typer.Option(help="Only this robot type, or spec hash.")] = "",
    video: Annotated[
        bool, typer.Option("--video", help="Images as video: small, but encoded once more. Default: PNG.")
    ] = False,
) -> None:
    """Write finished episodes as a LeRobotDataset v3.

    Interventions, sources, policy versions and success are columns; meta/fleet.json says where each episode came from. The
    newest label decides an outcome, excluded episodes are left out. Works while the run lives. Needs lerobot: make lerobot.
    """
    with clear_errors():
        from buffer.export_lerobot import Selection, export_dataset
        from fleet.batch import Outcome
        from fleet.robot import Source
        from fleet.runfolder import RunFolder

        selection = Selection(
            tasks=tuple(task or ()),
            robots=tuple(robot or ()),
            outcomes=tuple(_one_of("--outcome", outcome, [o.name.lower() for o in Outcome if o != Outcome.OPEN])),
            sources=tuple(Source[name.upper()] for name in _one_of("--source", source, [s.name.lower() for s in Source])),
            from_version=from_version,
            spec=spec,
        )
        opened = RunFolder.open(run)
        with _bar("exporting", "frames") as (bar, line):
            done = export_dataset(
                opened.buffer,
                out,
                selection,
                run_id=opened.run_id,
                video=video,
                progress=lambda steps, total: bar.update(line, completed=steps, total=total),
            )
        typer.echo(f"{done.path}: {done.episodes} episodes, {done.steps} frames")
        for reason, count in sorted(done.left_out.items()):
            typer.echo(f"  {count} episodes left out: {reason}")


def import_command(
    run: RunPath,
    dataset: Annotated[Path, typer.Argument(help="Folder of a LeRobotDataset v3.")],
    name: Annotated[str, typer.Option(help="The robot is called import-NAME; default: the folder's name.")] = "",
    task_map: Annotated[
        list[str] | None, typer.Option(help="'TASK OF THE DATASET=TASK OF THE RUN', where the two differ. May be given again.")
    ] = None,
    camera_map: Annotated[list[str] | None, typer.Option(help="CAMERA=NEW NAME. May be given again.")] = None,
    leave_out: Annotated[list[str] | None, typer.Option(help="A column not to take over. May be given again.")] = None,
    success: Annotated[str, typer.Option(help="Outcome: all succeeded, column (next.success says), or unknown.")] = "all",
    codec: Annotated[str, typer.Option(help="How images are stored: jpeg or raw.")] = "jpeg",
) -> None:
    """Bring the episodes of a LeRobotDataset v3 into a run, as demonstrations.

    They take the way of any robot's data: encrypted, checked, durable. Killed and started again, it goes on where it was; a
    dataset that has grown brings what is new. Where the run is not up, its gateway is started meanwhile. Needs lerobot.
    """
    with clear_errors():
        from buffer.import_lerobot import Demonstrations
        from fleet.runfolder import RunFolder
        from infra.data_lerobot import import_dataset

        opened, tasks, cameras = RunFolder.open(run), _pairs("--task-map", task_map), _pairs("--camera-map", camera_map)
        demonstrations = Demonstrations(dataset, cameras=cameras, leave_out=leave_out or (), codec=codec, success=success)
        with _bar("importing", "steps") as (bar, line):
            done = import_dataset(
                opened,
                demonstrations,
                name=name,
                tasks=tasks,
                progress=lambda steps: bar.update(line, completed=steps, total=demonstrations.num_steps),
            )
        new = done.steps - done.steps_before
        typer.echo(f"{done.robot_id}: {done.episodes} episodes, {done.steps} steps are in the buffer, {new} of them new")
        if done.left_out:
            typer.echo(f"  columns left out: {', '.join(done.left_out)}")


def _bar(doing: str, unit: str) -> Any:
    """A progress bar on standard error and its line, as a context."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def shown() -> Any:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield bar, bar.add_task(doing, total=None)

    return shown()


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    from fleet.errors import ConfigError

    pairs = [text.rpartition("=") for text in given or ()]
    for old, _, new in pairs:
        if not old or not new:
            raise ConfigError(f"{option} {old or new!r}", rule="OLD=NEW")
    return {old: new for old, _, new in pairs}


def _one_of(option: str, given: list[str] | None, known: list[str]) -> list[str]:
    from fleet.errors import ConfigError

    for name in given or ():
        if name not in known:
            raise ConfigError(f"{option} {name}", rule=f"one of {known}")
    return list(given or ())
