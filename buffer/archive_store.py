"""Where archives lie: a folder of any file system that pyarrow knows, and the one file that says what is in it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from fleet.errors import ArchiveError
from fleet.files import Files

ARCHIVE = "archive.json"
FORMAT, VERSION = "fleet-rl archive", 1
PIECE_BYTES = 4 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file of an archive."""

    size: int
    sha256: str


@dataclasses.dataclass
class Contents:
    """What ``archive.json`` says. ``small``: whole files that may change, by path; ``files``: all others."""

    run_id: str
    made_ns: int = 0
    small: dict[str, bytes] = dataclasses.field(default_factory=dict)
    files: dict[str, Stored] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": self.run_id,
            "made_ns": self.made_ns,
            "small": {path: base64.b64encode(data).decode() for path, data in sorted(self.small.items())},
            "files": {path: dataclasses.asdict(stored) for path, stored in sorted(self.files.items())},
        }
        text = json.dumps(body, indent=0)
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "archive": text}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Contents:
        """Raises ArchiveError where these are no contents of an archive, or were altered."""
        try:
            outer = json.loads(data)
            if hashlib.sha256(outer["archive"].encode()).hexdigest() != outer["sha256"]:
                raise ArchiveError(f"{ARCHIVE} was altered", rule="its checksum holds")
            body = json.loads(outer["archive"])
            if body["format"] != FORMAT or body["version"] != VERSION:
                raise ArchiveError(
                    f"{ARCHIVE} is of {body['format']!r}, version {body['version']}", rule=f"{FORMAT!r}, version {VERSION}"
                )
            small = {path: base64.b64decode(text) for path, text in body["small"].items()}
            files = {path: Stored(**fields) for path, fields in body["files"].items()}
            for path in (*small, *files):
                _check_path(path)
            return cls(body["run_id"], body["made_ns"], small, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArchiveError(f"{ARCHIVE} cannot be read: {error!r}", rule="as `fleet data archive` writes it") from None


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or any(part in ("..", ".", "/") for part in parts) or "\\" in path:
        raise ArchiveError(f"{ARCHIVE} names {path!r}", rule="files lie inside of the run folder")


class Store:
    """A folder of some file system, with errors of ours."""

    def __init__(self, filesystem: fs.FileSystem, base: str) -> None:
        self._fs, self._base = filesystem, base.rstrip("/")

    @classmethod
    def open(cls, uri: str) -> Store:
        """Args:
            uri: file://, s3://, gs:// and so on, or a local path.

        Raises:
            ArchiveError: No such kind of place.
        """
        try:
            if "://" not in uri:
                return cls(fs.LocalFileSystem(), str(Path(uri).resolve()))
            return cls(*fs.FileSystem.from_uri(uri))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ArchiveError(
                f"{uri} cannot be used: {error}", rule="a URI of pyarrow.fs: file://, s3://, gs://", remedy="or a local folder"
            ) from None

    def size(self, path: str) -> int:
        """-1 where it is not there."""
        with self._errors(path):
            info = self._fs.get_file_info(self._at(path))
            return int(info.size) if info.type == fs.FileType.File else -1

    def read(self, path: str) -> bytes | None:
        """A small file, None where it is not there."""
        if self.size(path) < 0:
            return None
        with self._errors(path), self._fs.open_input_stream(self._at(path)) as stream:
            return bytes(stream.read())

    def pieces(self, path: str) -> Iterator[bytes]:
        """A file of any size."""
        with self._errors(path), self._fs.open_input_stream(self._at(path)) as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece

    def sha256(self, path: str) -> str:
        """Reads a file back."""
        digest = hashlib.sha256()
        for piece in self.pieces(path):
            digest.update(piece)
        return digest.hexdigest()

    def write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Makes or replaces a file."""
        with self._errors(path):
            self._fs.create_dir(self._at(path).rpartition("/")[0], recursive=True)
            with self._fs.open_output_stream(self._at(path)) as stream:
                for piece in pieces:
                    stream.write(piece)
            self._sync(path)

    def write_whole(self, path: str, data: bytes) -> None:
        """Replaces a file so that whoever looks sees the old or the new one."""
        self.write(path + ".partial", [data])
        with self._errors(path):
            self._fs.move(self._at(path + ".partial"), self._at(path))
            self._sync(path)

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if self._base else path

    def _sync(self, path: str) -> None:
        """On a local disk what was written is durable only then; an object store says so by itself."""
        if isinstance(self._fs, fs.LocalFileSystem):
            file = Path(self._at(path))
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            Files().fsync_dir(file.parent)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise ArchiveError(
                f"{self._at(path)}: {error}",
                rule="the archive can be read and written",
                remedy="look at the place and your rights there; the same command goes on where this one stopped",
            ) from error


def load_contents(store: Store) -> Contents | None:
    """What an archive holds; None where there is none, or none that was ever finished."""
    data = store.read(ARCHIVE)
    return None if data is None else Contents.from_bytes(data)
