"""Tables on a terminal or in a pipe. Text from robots is shown, never interpreted."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 200


def console() -> Console:
    """Standard output; wide enough for a pipe that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def table(columns: str, rows: Iterable[Iterable[object]]) -> Table:
    """A table; names in ``columns`` are parted by ``|``, of those that begin with ``>`` the cells stand right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=columns != "|")
    for column in columns.split("|"):
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made
