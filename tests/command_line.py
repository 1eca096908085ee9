"""Starts commands as a user types them, for tests of whole runs."""

import os
import subprocess
import sys
from pathlib import Path

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
