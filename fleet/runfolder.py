"""A run on disk: everything that is needed to resume or audit it, each thing at one place."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

from fleet.errors import RunFolderError

FORMAT = "fleet-rl run"


class RunFolder:
    """Paths of a run. ``create`` makes one, ``open`` checks that a folder is one.

    run.yaml is the configuration; keys/ says who may connect; buffer/ is the log; the rest can be read off the names.
    """

    def __init__(self, path: Path) -> None:
        path = self.path = path.resolve()  # child processes and Ray's workers have other working folders
        self.mark = path / "run.json"
        self.config = path / "run.yaml"
        self.keys = path / "keys"
        self.registry = path / "registry"
        self.buffer = path / "buffer"
        self.releases = path / "releases"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.report = path / "report"
        self.robots = path / "robots"  # credential files and spools of robots simulated on this machine

    @property
    def run_id(self) -> str:
        return str(json.loads(self.mark.read_text())["run_id"])

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Makes a new run folder.

        Raises:
            RunFolderError: The path holds something already.
        """
        run = cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            whose = "a run of this project" if run.mark.exists() else "something else"
            raise RunFolderError(
                f"{path} holds {whose}",
                rule="a new run starts in an empty folder",
                remedy="add --resume to go on with it, or name another folder",
            )
        for folder in (run.keys, run.registry, run.buffer, run.releases, run.checkpoints, run.logs, run.report, run.robots):
            folder.mkdir(parents=True, exist_ok=True)
        run.keys.chmod(0o700)
        mark = {"format": FORMAT, "run_id": f"{path.name}-{secrets.token_hex(4)}", "created_ns": time.time_ns()}
        run.mark.write_text(json.dumps(mark))
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens an existing run folder.

        Raises:
            RunFolderError: The folder is missing, or belongs to another project.
        """
        run = cls(path)
        if not path.is_dir():
            raise RunFolderError(
                f"{path} is not a folder", rule="a run folder holds run.json", remedy="start one with `fleet up RUN.yaml`"
            )
        try:
            known = json.loads(run.mark.read_text()).get("format") == FORMAT
        except (OSError, ValueError, AttributeError):
            known = False
        if not known:
            raise RunFolderError(
                f"{path} has no run.json of this project",
                rule=f"a run folder is marked {FORMAT!r}",
                remedy="name a run's folder, or a new one",
            )
        return run
