"""``fleet policy``: look at a policy, take one out of its run. Each command imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.command import RunPath, clear_errors

app = typer.Typer(no_args_is_help=True, help="A run's policy: what it is, and taking it elsewhere.")


@app.command()
def show(
    where: Annotated[str, typer.Argument(help="A run's folder, RUN@VERSION, or a folder that `fleet policy export` wrote.")],
) -> None:
    """Say what a policy is: family, size, what it reads and writes, its settings and its normalisation."""
    with clear_errors():
        from infra.policy_show import policy_lines

        for line in policy_lines(where):
            typer.echo(line)


@app.command()
def export(
    run: RunPath,
    folder: Annotated[Path, typer.Argument(help="A new folder. Another run begins with it: policy.pretrained=FOLDER.")],
    version: Annotated[int, typer.Option(min=0, help="Release to take; 0: the newest.")] = 0,
) -> None:
    """Write a release as a folder that stands alone; LeRobot policies as a LeRobot checkpoint."""
    with clear_errors():
        from fleet.runfolder import RunFolder
        from learner.pretrained import export_policy

        manifest = export_policy(RunFolder.open(run), version, folder)
        typer.echo(f"release {manifest.version} (step {manifest.step}, {manifest.policy['family']}) is in {folder}")
