"""The command line. Every command imports what it needs when it runs, so that ``--help`` needs nothing but the base."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Annotated

import typer

from infra.command import AsJson, RunPath, clear_errors
from infra.data import app as data_app
from infra.policy import app as policy_app

app = typer.Typer(
    name="fleet",
    no_args_is_help=True,
    add_completion=False,
    help="Post-train one robot policy on a fleet: robots stream, a learner trains, new weights go back.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at a run's configuration.")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(policy_app, name="policy")

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to override, as table.key=value.", show_default=False)]


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")


@app.command()
def up(
    source: Annotated[Path, typer.Argument(help="A run file (RUN.yaml) to start, or a run's folder to go on with.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
    runs: Annotated[Path, typer.Option(help="Where run folders lie.")] = Path("runs"),
    address: Annotated[str, typer.Option(help="A Ray cluster to join; empty: a local one.")] = "",
) -> None:
    """Start a learner cluster: gateway, buffer, registry and learner. Ctrl-C stops it; --resume goes on."""
    _log_to_stderr()
    with clear_errors():
        from infra.up import up as start

        start(source, overrides or [], resume=resume, runs=runs, address=address)


@app.command()
def down(run: RunPath) -> None:
    """Stop a run from another terminal: the learner's checkpoint first, then gateway and registry, on all nodes."""
    with clear_errors():
        from infra.down import down as stop

        stop(run, lambda text: typer.echo(text))


@app.command()
def logs(
    run: RunPath,
    name: Annotated[str, typer.Argument(help="Of a log; empty: lists them.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, also across restarts.")] = False,
    num: Annotated[int, typer.Option("--num", "-n", min=0, help="Lines from the end.")] = 50,
) -> None:
    """Show what a process of a run wrote: gateway, registry, driver, learner ranks, robots, nodes."""
    with clear_errors():
        from infra.logs import show_logs

        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            show_logs(run, name, num, follow)


@app.command()
def enroll(
    robot_id: Annotated[str, typer.Argument(help="Name of the robot, for example arm-07.")],
    run: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    out: Annotated[Path | None, typer.Option(help="File to write; default ROBOT.yaml here.")] = None,
    endpoint: Annotated[str, typer.Option(help="Address of the gateway as the robot sees it; default: where it listens.")] = "",
    node: Annotated[str, typer.Option(help="Whose gateway, in a run of several nodes; default: with the fewest robots.")] = "",
) -> None:
    """Register a robot: writes its one credential file. Copy it to the robot and run `fleet join FILE` there."""
    with clear_errors():
        from infra.enroll import enroll as register

        path = register(run, robot_id, out or Path(f"{robot_id}.yaml"), endpoint, node=node)
        if "tcp://127." in path.read_text():
            typer.echo(
                "note: the gateway listens on this machine only; for robots elsewhere set gateway.bind, or give --endpoint"
            )
        typer.echo(
            f"{robot_id} is enrolled. Copy {path} to the robot (it holds its secret key), then there: fleet join {path.name}"
        )


@app.command()
def revoke(
    robot_id: Annotated[str, typer.Argument(help="Name of the robot.")],
    run: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
) -> None:
    """Take a robot's permission away; a live connection is cut within a second. Its data stays."""
    with clear_errors():
        from fleet.identity import revoke as take_away
        from fleet.runfolder import RunFolder

        take_away(RunFolder.open(run).keys, robot_id)
        typer.echo(f"{robot_id} is revoked")


@app.command()
def join(
    file: Annotated[Path, typer.Argument(help="The file that `fleet enroll` wrote.")],
    overrides: Overrides = None,
    demonstrate: Annotated[int, typer.Option(help="Let the operator show this many episodes, then end; needs no policy.")] = 0,
) -> None:
    """Drive a robot: stream what it does, act by the newest policy, obey the operator. Ctrl-C takes leave."""
    _log_to_stderr()
    with clear_errors():
        from actors.main import join as drive

        shown = ["actor.demonstrate=true", f"actor.num_episodes={demonstrate}", "operator.settings.mode=demonstrate"]
        drive(file, [*(overrides or []), *(shown if demonstrate > 0 else [])])


@app.command()
def sim(
    run: RunPath,
    overrides: Overrides = None,
    num: Annotated[int, typer.Option(help="How many simulated robots.")] = 4,
) -> None:
    """Start simulated robots beside a run, enrolled and connected like real ones. Ctrl-C stops them."""
    _log_to_stderr()
    with clear_errors():
        from infra.sim import run_sims

        run_sims(run, num, overrides or [])


@app.command()
def status(
    run: RunPath,
    as_json: AsJson = False,
) -> None:
    """Show robots, learner, nodes and releases of a run, and what waits for what."""
    with clear_errors():
        from infra.status import show_status

        show_status(run, as_json)


@app.command(name="eval")
def evaluate(
    run: RunPath,
    release: Annotated[int, typer.Option(help="Version to test; 0: the newest.")] = 0,
    episodes: Annotated[int, typer.Option(help="Held-out starts a task.")] = 50,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Test a release on held-out starts in simulation; prints success by task with 95 % intervals."""
    with clear_errors():
        from infra.evaluation import evaluate_release, print_table

        print_table(evaluate_release(run, release, episodes, workers))


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="Run folder to make; default: runs/demo, or the next free name.")
    ] = None,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="A run file in place of the built-in one.")] = None,
) -> None:
    """A whole fleet on this machine: demonstrations, start policy, 4 simulated robots, corrections, report."""
    with clear_errors():
        from infra.demo import run_demo

        settings = list(overrides or [])
        if folder is not None and "=" in folder.name:  # `fleet demo learner.steps=5000`: no folder was named
            folder, settings = None, [str(folder), *settings]
        run_demo(folder, config, settings)


@app.command()
def report(run: RunPath) -> None:
    """Write the run's report (report/index.html) from its journals."""
    with clear_errors():
        from fleet.runfolder import RunFolder
        from infra.report import write_report

        typer.echo(str(write_report(RunFolder.open(run))))


@config_app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A run file.")],
    overrides: Overrides = None,
) -> None:
    """Check a run file without starting anything."""
    with clear_errors():
        from infra.run_config import check_run_file

        for line in check_run_file(file, overrides or []):
            typer.echo(line)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
