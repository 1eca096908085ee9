"""What all groups of the command line share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fleet.errors import FleetError

RunPath = Annotated[Path, typer.Argument(help="A run's folder, for example runs/demo.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Errors of ours end as a few plain lines and exit code 2."""
    try:
        yield
    except FleetError as error:
        typer.secho(f"error: {error.what}", fg="red", err=True)
        for label, text in (("rule", error.rule), ("remedy", error.remedy)):
            if text:
                typer.echo(f"{label}: {text}", err=True)
        sys.exit(2)
