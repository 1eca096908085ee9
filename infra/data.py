"""``fleet data``: look at a run's data, check and repair it, judge episodes, keep it elsewhere, move it in and out.

All but ``repair`` and ``prune`` work while the run is served. Each command imports what it needs when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.command import AsJson, RunPath, clear_errors
from infra.data_classify import app as classify_app
from infra.data_dataset import register as register_dataset

app = typer.Typer(no_args_is_help=True, help="A run's data: statistics, episodes, checks, labels, archives, datasets.")
register_dataset(app)  # export and import
app.add_typer(classify_app, name="classify")

Robots = Annotated[list[str] | None, typer.Option("--robot", help="Of this robot. May be given again.")]


@app.command()
def stats(run: RunPath, as_json: AsJson = False) -> None:
    """Say what there is: steps, episodes, success and corrections by robot and task, sizes, labels, retention, damage."""
    with clear_errors():
        from infra.data_look import show_stats

        show_stats(run, as_json)


@app.command("list")
def list_command(
    run: RunPath,
    task: Annotated[list[str] | None, typer.Option(help="Of this task. May be given again.")] = None,
    outcome: Annotated[
        list[str] | None, typer.Option(help="success, failure, unknown, aborted, open or dropped. May be given again.")
    ] = None,
    robot: Robots = None,
    limit: Annotated[int, typer.Option(min=0, help="The newest so many; 0: all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List episodes, the newest last; outcomes by their newest label."""
    with clear_errors():
        from infra.data_look import list_episodes

        list_episodes(run, task, outcome, robot, limit, as_json)


@app.command()
def show(
    run: RunPath,
    episode: Annotated[str, typer.Argument(help="ROBOT/BOOT/EPISODE; robot and boot may be cut short.")] = "",
    last: Annotated[bool, typer.Option("--last", help="The newest episode.")] = False,
    robot: Robots = None,
    frames: Annotated[int, typer.Option(min=1, max=400, help="About so many frames, spread evenly.")] = 24,
    out: Annotated[Path | None, typer.Option(help="File of the contact sheet; default: in the run's report folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show an episode: facts, labels, frames with who acted; and write a contact sheet of its cameras as PNG."""
    with clear_errors():
        from infra.data_look import show_episode

        show_episode(run, episode, last, robot, frames, out, as_json)


Episodes = Annotated[list[str], typer.Argument(help="ROBOT/BOOT/EPISODE, one or more; robot and boot may be cut short.")]
Judge = Annotated[str, typer.Option(help="Who says so; default: your user name.")]


@app.command()
def label(
    run: RunPath,
    field: Annotated[str, typer.Argument(help="outcome or excluded.")],
    value: Annotated[str, typer.Argument(help="success, failure, unknown or aborted; for excluded true or false.")],
    episodes: Episodes,
    judge: Judge = "",
) -> None:
    """Say what became of episodes. The newest label counts; a running learner heeds it within seconds."""
    with clear_errors():
        from infra.data_judge import label_episodes

        for name in label_episodes(run, episodes, field, value, judge):
            typer.echo(f"{name}: {field} = {value}")


@app.command()
def exclude(
    run: RunPath,
    episodes: Episodes,
    undo: Annotated[bool, typer.Option("--undo", help="Take them in again.")] = False,
    judge: Judge = "",
) -> None:
    """Keep episodes out of training and exports; they stay stored. A running learner heeds it within seconds."""
    with clear_errors():
        from infra.data_judge import label_episodes

        for name in label_episodes(run, episodes, "excluded", "false" if undo else "true", judge):
            typer.echo(f"{name}: {'taken in again' if undo else 'excluded'}")


@app.command()
def verify(run: RunPath, as_json: AsJson = False) -> None:
    """Check every byte: checksums, Arrow data, specs, order, each fragment once and none missing. Exit code 1 on any fault."""
    with clear_errors():
        from infra.data_care import verify_run

        raise typer.Exit(verify_run(run, as_json))


@app.command()
def repair(
    run: RunPath, yes: Annotated[bool, typer.Option("--yes", help="Do it; else only say what would be done.")] = False
) -> None:
    """Make anew what can be: states, manifest, sidecars; segments stay as they are. Refused while the run is served."""
    with clear_errors():
        from infra.data_care import repair_run

        repair_run(run, yes)


@app.command()
def prune(
    run: RunPath,
    max_gb: Annotated[
        float | None, typer.Option(min=0, max=1e9, help="Give up the oldest data beyond this; 0: no limit. Default: the run's.")
    ] = None,
    max_age_h: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Give up data received longer ago; 0: no limit. Default: the run's.")
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="Keep whole episodes with a step of this source; once for each. Default: the run's."),
    ] = None,
    protect_nothing: Annotated[
        bool, typer.Option("--protect-nothing", help="Give up demonstrations and interventions too.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; else only say what would be done.")] = False,
) -> None:
    """Give up old data by hand, as the gateway does by its settings. Refused while the run is served."""
    with clear_errors():
        from infra.data_care import prune_run

        prune_run(run, max_gb, max_age_h, [] if protect_nothing else protect, yes)


Uri = Annotated[str, typer.Argument(help="Where the archive lies: file://, s3://, gs:// or a local folder.")]


@app.command()
def archive(
    run: RunPath,
    uri: Uri,
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Also releases, the newest checkpoint and the keys: guard the archive like the run."),
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Read back all that was there before, too.")] = False,
) -> None:
    """Copy a run's data elsewhere: sealed segments, sidecars, specs, labels, settings. Again: only what is new.

    What is archived stays, also when retention gives it up in the run. Keys stay here unless --everything is given: a run that
    is restored without them enrolls its robots anew, and its learner begins anew on the same data. What is still written to
    is left out until its segment ends. Each file is read back and its checksum compared. Works while the run lives.
    """
    with clear_errors():
        from infra.data_archive import archive_run

        raise typer.Exit(archive_run(run, uri, everything, check))


@app.command()
def restore(uri: Uri, run: Annotated[Path, typer.Argument(help="Run folder to make; new or empty.")]) -> None:
    """Make a run folder of an archive: exactly the same bytes. Then `fleet up RUN --resume` goes on from it."""
    with clear_errors():
        from infra.data_archive import restore_run

        restore_run(uri, run)
