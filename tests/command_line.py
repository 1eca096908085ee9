"""The command line as a user types it, for tests: as processes of its own, or where it only answers, in this one."""

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from infra.cli import app

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def fleet(*arguments, **environment):
    """Starts a command of the command line in the background, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "infra.cli", *map(str, arguments)],
        env=ENV | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def answer(*arguments):
    """(exit code, standard output, standard error) of a command, in this process: loading torch and pyarrow for each takes
    longer than most of them work.

    Raises:
        Exception: What the command let through, which a user would see as a traceback.
    """
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr
