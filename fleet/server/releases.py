"""The release store of a run: written by the learner, read by the gateway in another process.

    releases/chunks/<sha256>            content-addressed, written once
    releases/manifests/<version>.json   written last: a release exists when its manifest does
    releases/counter                    the last version ever given, so that none is given twice
    releases/tmp/                       what is being written; leftovers are harmless

A publish that dies in between leaves chunks that nobody names, or a number that nobody uses. Readers see whole
releases only, because a manifest appears by one rename after everything that it names is on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleet.errors import DiskFull, ReleaseError, StorageError
from fleet.files import Files
from fleet.releases import CHUNK_ID, ChunkRef, Manifest, assemble, read_manifest, split

_MANIFEST_NAME = re.compile(r"([1-9][0-9]{0,17})\.json")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_CLOCK_TICK_NS = 100_000_000  # two changes of a folder within one tick of the file system's clock look like one


class ReleaseStore:
    """Publishes and reads releases.

    Args:
        folder: ``releases`` of a run folder.
        keys: ``keys`` of the run folder; needed to publish only.
        files: The seam for file calls.
    """

    def __init__(self, folder: Path, keys: Path | None = None, *, files: Files | None = None) -> None:
        self._folder, self._keys, self._files = folder, keys, files or Files()
        self._manifests, self._chunks, self._tmp = folder / "manifests", folder / "chunks", folder / "tmp"
        self._listed: tuple[int, int | None] | None = None  # (mtime of manifests/, newest) while that can be trusted
        self._swept = False

    def publish(
        self,
        safetensors: bytes | memoryview,
        *,
        algorithm: str,
        step: int,
        metrics: Mapping[str, float],
        policy: Mapping[str, Any],
    ) -> Manifest:
        """Makes the next release. One process at a time may do this: the holder of the learner's lock.

        Args:
            safetensors: The weights that robots shall act with.
            policy: ``family``, ``config`` and ``spec``, plain data.

        Raises:
            ReleaseError: The store was opened without keys, or the weights or the facts about them cannot be used.
            DiskFull: No room; nothing was published.
        """
        from fleet.identity import sign

        if self._keys is None:
            raise ReleaseError(f"{self._folder} was opened for reading", rule="publishing needs the keys of the run")
        header, pieces = split(safetensors)
        self._make_folders()
        for name, data in pieces:
            path = self._chunks / name
            if not (path.exists() and path.stat().st_size == len(data)):
                self._write(path, data)
        self._files.fsync_dir(self._chunks)  # also where all are there: a killed process may have left them undurable
        parent = self._scan()
        version = max(parent or 0, self.last_version_given) + 1
        refs = tuple(ChunkRef(name, len(data)) for name, data in pieces)
        manifest = Manifest(version, parent, algorithm, step, time.time_ns(), dict(metrics), dict(policy), header, refs)
        try:
            signed = dataclasses.replace(manifest, signature=sign(self._keys, manifest.signed_bytes()).hex())
            data = signed.to_bytes()
        except (TypeError, ValueError) as error:
            raise ReleaseError(
                f"release {version} cannot be written down: {error}", rule="metrics are finite, policy is plain data"
            ) from None
        read_manifest(data)  # what robots would refuse is refused here
        self.never_reuse(version)
        self._write(self._manifests / f"{version}.json", data)
        self._files.fsync_dir(self._manifests)
        return signed

    def newest(self) -> int | None:
        """The newest version, or None. Costs one ``stat`` while nothing changes."""
        try:
            changed_ns = self._manifests.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if self._listed is not None and self._listed[0] == changed_ns:
            return self._listed[1]
        newest = self._scan()
        settled = time.time_ns() - changed_ns > _CLOCK_TICK_NS
        self._listed = (changed_ns, newest) if settled else None
        return newest

    def versions(self) -> list[int]:
        """All versions that are there, oldest first."""
        if not self._manifests.is_dir():
            return []
        found = (_MANIFEST_NAME.fullmatch(entry.name) for entry in os.scandir(self._manifests))
        return sorted(int(match[1]) for match in found if match)

    def read(self, what: str, id: str) -> bytes:
        """One manifest (id: its version) or one chunk (id: its sha256), as stored. ``id`` may come from the network.

        Raises:
            ReleaseError: ``what`` or ``id`` is not of that form, or there is no such thing.
        """
        if what == "manifest" and _VERSION.fullmatch(id):
            path = self._manifests / f"{id}.json"
        elif what == "chunk" and CHUNK_ID.fullmatch(id):
            path = self._chunks / id
        else:
            raise ReleaseError(
                f"{what[:20]!r} {id[:80]!r} was asked for", rule="'manifest' and a version, or 'chunk' and a sha256"
            )
        try:
            return path.read_bytes()
        except FileNotFoundError:
            name = "release" if what == "manifest" else what
            raise ReleaseError(f"there is no {name} {id}", remedy="ask for the newest release") from None

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version. The signature is not checked: this is the run's own disk.

        Raises:
            ReleaseError: There is no such version, or its file is damaged.
        """
        return read_manifest(self.read("manifest", str(version)))

    def load(self, version: int) -> bytes:
        """The weights of a version as a safetensors file.

        Raises:
            ReleaseError: There is no such version, or it is damaged.
        """
        manifest = self.manifest(version)
        return assemble(manifest, {name: self.read("chunk", name) for name in manifest.missing(())})

    @property
    def last_version_given(self) -> int:
        """The highest version that was ever given, published or not; 0 for none."""
        try:
            return int((self._folder / "counter").read_text())
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise StorageError(
                f"{self._folder / 'counter'} is damaged: {error}",
                rule="it holds the last version given, in digits",
                remedy="write the highest version that any robot has reported into it",
            ) from None

    def never_reuse(self, version: int) -> None:
        """Sees to it that the next release has a version above ``version``, whatever is deleted."""
        if version > self.last_version_given:
            self._make_folders()
            self._write(self._folder / "counter", str(version).encode())
            self._files.fsync_dir(self._folder)

    def prune(self, keep: int, *, keep_first: bool = False) -> list[int]:
        """Deletes all but the newest ``keep`` releases, and the chunks that no release names any more.

        A robot that is pulling a deleted release is told that it is gone, and asks for the newest.

        Args:
            keep_first: The oldest one stays too.

        Returns:
            The versions deleted.
        """
        versions = self.versions()
        old = versions[int(keep_first) : -keep]
        kept = [version for version in versions if version not in old]
        if old:
            for version in old:
                self._files.unlink(self._manifests / f"{version}.json")
            self._files.fsync_dir(self._manifests)
            named = {chunk.id for version in kept for chunk in self.manifest(version).chunks}
            for entry in list(os.scandir(self._chunks)):
                if entry.name not in named:
                    self._files.unlink(Path(entry.path))
        return old

    def _scan(self) -> int | None:
        versions = self.versions()
        return versions[-1] if versions else None

    def _make_folders(self) -> None:
        folders = (self._manifests, self._chunks, self._tmp)
        if self._swept and all(folder.is_dir() for folder in folders):
            return
        for folder in folders:
            self._files.make_folders(folder)
        for entry in list(os.scandir(self._tmp)):  # the only writer sweeps what one before it left behind
            self._files.unlink(Path(entry.path))
        self._swept = True

    def _write(self, path: Path, data: bytes) -> None:
        """Makes ``path`` hold ``data``, whole or not at all; the caller syncs its folder."""
        part = self._tmp / f"{path.name}.{secrets.token_hex(4)}"
        try:
            fd = self._files.open_new(part)
            try:
                self._files.write(fd, [data])
                self._files.fsync(fd)
            finally:
                self._files.close(fd)
            self._files.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._files.unlink(part)
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(f"{path} cannot be written: {error}", remedy="make room, or remove old releases") from None
