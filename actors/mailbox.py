"""Gathers the newest release: asks for what is missing, keeps chunks on disk, hands over whole releases only.

No sockets: ``requests`` says what to ask for, ``deliver`` takes what came. Chunks lie on disk by their hash, so a
robot that restarts pulls nothing twice and can work before it reaches the gateway.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fleet.errors import ReleaseError
from fleet.releases import Manifest, assemble, chunk_id, parse_manifest

MAX_IN_FLIGHT = 8
RETRY_S = 5.0


class Mailbox:
    """State of one robot's newest release.

    Args:
        folder: Where manifest and chunks are kept.
        release_public: The run's release key, from the credential file.
    """

    def __init__(self, folder: Path, release_public: str) -> None:
        self._folder, self._key = folder, release_public
        self._chunks = folder / "chunks"
        self._chunks.mkdir(parents=True, exist_ok=True)
        self._announced = 0
        self._manifest: Manifest | None = None  # the release being gathered
        self._missing: list[str] = []
        self._in_flight: dict[tuple[str, str], float] = {}
        self._taken = 0
        self._refused: set[int] = set()
        self._load_kept()

    def announce(self, version: int) -> None:
        """The gateway has this release."""
        if version > self._announced and version not in self._refused:
            self._announced = version

    def refuse(self, version: int) -> None:
        """This release failed its test here: it is not asked for again."""
        self._refused.add(version)

    def requests(self) -> list[tuple[str, str]]:
        """The next ("manifest"|"chunk", id) to ask for; each is repeated after ``RETRY_S`` without an answer."""
        now = time.monotonic()
        wanted: list[tuple[str, str]] = []
        if self._announced > (self._manifest.version if self._manifest else 0):
            wanted.append(("manifest", str(self._announced)))
        elif self._missing:
            wanted += [("chunk", i) for i in self._missing]
        due = [w for w in wanted[:MAX_IN_FLIGHT] if now - self._in_flight.get(w, -RETRY_S) >= RETRY_S]
        self._in_flight.update(dict.fromkeys(due, now))
        return due

    def reconnected(self) -> None:
        """Answers to earlier requests will not come."""
        self._in_flight.clear()

    def deliver(self, what: str, id: str, payload: bytes | memoryview) -> None:
        """Takes what came for a request.

        Raises:
            ReleaseError: The bytes are not what their id says, or the signature does not fit.
        """
        if (what, id) not in self._in_flight:
            return  # nobody asked, or it came twice
        # What is refused below stays in flight, so that it is asked for again after a pause and not at once.
        if what == "manifest":
            self._begin(parse_manifest(payload, self._key))
        elif chunk_id(payload) != id:
            raise ReleaseError(f"chunk {id[:12]} came altered", rule="the id of a chunk is the sha256 of its bytes")
        elif id in self._missing:
            _write(self._chunks / id, payload)
            self._missing.remove(id)
        del self._in_flight[what, id]

    def take(self) -> tuple[Manifest, bytes] | None:
        """The newest whole release as (manifest, safetensors bytes), once; None while there is no new one."""
        manifest = self._manifest
        if manifest is None or self._missing or manifest.version <= self._taken:
            return None
        try:
            data = assemble(manifest, {c.id: (self._chunks / c.id).read_bytes() for c in manifest.chunks})
        except (ReleaseError, OSError):
            self._forget_damaged(manifest)
            return None
        self._taken = manifest.version
        _write(self._folder / "manifest.json", manifest.to_bytes())
        keep = {c.id for c in manifest.chunks}
        for path in self._chunks.iterdir():
            if path.name not in keep:
                path.unlink()
        return manifest, data

    def _begin(self, manifest: Manifest) -> None:
        if manifest.version < self._announced or manifest.version in self._refused:
            return
        self._manifest = manifest
        self._missing = manifest.missing({path.name for path in self._chunks.iterdir()})

    def _forget_damaged(self, manifest: Manifest) -> None:
        for ref in manifest.chunks:
            path = self._chunks / ref.id
            if path.exists() and chunk_id(path.read_bytes()) != ref.id:
                path.unlink()
        self._missing = manifest.missing({path.name for path in self._chunks.iterdir()})

    def _load_kept(self) -> None:
        try:
            manifest = parse_manifest((self._folder / "manifest.json").read_bytes(), self._key)
        except (OSError, ReleaseError):
            return  # nothing kept, or damaged: the gateway has it
        self._announced = manifest.version
        self._begin(manifest)


def _write(path: Path, data: bytes | memoryview) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
