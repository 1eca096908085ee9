"""A run on disk: everything that is needed to resume or audit it, each thing at one place."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

from fleet.errors import RunFolderError
from fleet.files import Files

FORMAT = "fleet-rl run"
SHARED_FOLDERS = ("keys", "releases", "checkpoints", "nodes")
SHARED_FILES = ("run.json", "run.yaml", "tasks.json")
PRIVATE_FOLDERS = ("registry", "buffer", "logs", "report", "robots")


class RunFolder:
    """Paths of a run. ``create`` makes one, ``open`` checks that a folder is one.

    run.yaml is the configuration; keys/ says who may connect; buffer/ is the log; the rest can be read off the names.
    In a run of several nodes each node has such a folder of its own, in which what all of them need (``SHARED_FOLDERS``,
    ``SHARED_FILES``) are links into one folder on a file system that all mount: ``attach`` makes one.
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
        self.nodes = path / "nodes"  # who serves the run; only where it is shared
        self.learner_status = path / "learner-status.json"

    @property
    def run_id(self) -> str:
        return str(json.loads(self.mark.read_text())["run_id"])

    @property
    def shared(self) -> Path | None:
        """The folder that all nodes of the run share, None for a run of one node."""
        return self.nodes.resolve().parent if self.nodes.is_symlink() else None

    @classmethod
    def create(cls, path: Path, shared: Path | None = None) -> RunFolder:
        """Makes a new run folder.

        Args:
            shared: Where the part lies that all nodes share; None: in the run folder.

        Raises:
            RunFolderError: One of the paths holds something already.
        """
        run = cls(path)
        for folder in filter(None, (path, shared)):
            _check_empty(folder)
        truth = run if shared is None else cls(shared)
        truth._make(("keys", "releases", "checkpoints", *PRIVATE_FOLDERS) if shared is None else SHARED_FOLDERS)
        truth.keys.chmod(0o700)
        mark = {"format": FORMAT, "run_id": f"{path.name}-{secrets.token_hex(4)}", "created_ns": time.time_ns()}
        Files().write_atomic(truth.mark, json.dumps(mark).encode())  # last: what is marked is whole
        return run if shared is None else cls.attach(path, shared)

    @classmethod
    def attach(cls, path: Path, shared: Path) -> RunFolder:
        """The run folder of one node of the run whose shared part is ``shared``; made where it is missing.

        Raises:
            RunFolderError: ``shared`` is no run, or ``path`` belongs to another run or to something else.
        """
        truth, run = cls.open(shared), cls(path)
        if run.path.exists() and any(run.path.iterdir()) and run.shared != truth.path:
            raise RunFolderError(
                f"{path} does not belong to the run in {shared}",
                rule="a node's folder holds one run, linked to its shared part",
                remedy="name another folder, see cluster.node_folder",
            )
        run.path.mkdir(parents=True, exist_ok=True)
        # The link that tells whose folder it is comes first: a folder that was left half made is completed later.
        for name in sorted((*SHARED_FOLDERS, *SHARED_FILES), key=lambda name: name != "nodes"):
            if not (run.path / name).is_symlink():
                (run.path / name).symlink_to(truth.path / name)
        run._make(PRIVATE_FOLDERS)
        return run

    def _make(self, names: tuple[str, ...]) -> None:
        for name in names:
            (self.path / name).mkdir(parents=True, exist_ok=True)

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


def _check_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(_holds_something(found) for found in path.rglob("*"))):
        whose = "a run of this project" if RunFolder(path).mark.exists() else "something else"
        raise RunFolderError(
            f"{path} holds {whose}",
            rule="a new run starts in an empty folder",
            remedy="add --resume to go on with it, or name another folder",
        )


def _holds_something(path: Path) -> bool:
    """Not so what ``create`` leaves that was killed: folders, and the mark half written."""
    return path.is_symlink() or not (path.is_dir() or path.name == "run.json.partial")
