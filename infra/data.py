"""``fleet data``: look at a run's data, check and repair it, judge episodes, keep it elsewhere, move it in and out.

All but ``repair`` and ``prune`` work while the run is served. Each command imports what it needs when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from infra.command import RunPath, clear_errors
from infra.data_dataset import register as register_dataset

app = typer.Typer(no_args_is_help=True, help="A run's data: statistics, episodes, checks, labels, archives, datasets.")
register_dataset(app)  # export and import


@app.command()
def prune(
    run: RunPath,
    max_gb: Annotated[
        float | None, typer.Option(help="Give up the oldest data beyond this; 0: no limit. Default: the run's.")
    ] = None,
    max_age_h: Annotated[
        float | None, typer.Option(help="Give up data received longer ago; 0: no limit. Default: the run's.")
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
