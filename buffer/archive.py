"""A run's data at another place: any URI that pyarrow.fs knows (file://, s3://, gs://), and a run folder made from it.

    <uri>/archive.json          written last: what belongs to the archive, with sizes and sha256; small files lie in it whole
    <uri>/buffer/...            sealed segments cut to their length, their states, sidecars and specs, under their own names
    <uri>/buffer/labels/...     the same of the labels

A sealed segment never changes, so an archive only grows: what is there stays, also when retention gives it up in the run or
keeps a part of it. The same command goes on where a killed one stopped. Restored are exactly the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from buffer import sidecar
from buffer.archive_store import ARCHIVE, PIECE_BYTES, Contents, Store, Stored, load_contents
from buffer.labels import labels_folder
from buffer.manifest import FILE_NAME as BUFFER_MANIFEST
from buffer.manifest import Manifest, live_segments, load_manifest
from buffer.segment import SegmentName, mapped, read_state_file, segment_name
from fleet.errors import ArchiveError, RunFolderError
from fleet.files import Files, storage_errors
from fleet.record import Damage, scan
from fleet.runfolder import RunFolder

# Small files that may change: they lie in archive.json itself, so that all of them are of one moment.
SMALL = ("run.json", "run.yaml", "tasks.json", "releases/counter", "robots/*.import.json")
SMALL_OF_EVERYTHING = ("keys/**/*", "robots/*.yaml")
SECRET = ("keys/", "robots/")
_MARK = "restoring.json"

Show = Callable[[int, int], None]  # bytes done, bytes in all


@dataclasses.dataclass
class Archived:
    """What an archiving or a restoration did.

    Attributes:
        files, bytes: Copied now. kept: Files that were there already.
        open_segments: Left out, because they are still written to.
        damaged: Places inside of copied segments that are no valid record.
        altered: Files in the archive that are not as they were written, and that the run does not have any more.
    """

    files: int = 0
    bytes: int = 0
    kept: int = 0
    open_segments: int = 0
    damaged: int = 0
    altered: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Item:
    """A file to be copied: its path in the run, and how much of it."""

    path: str
    source: Path
    size: int
    segment: SegmentName | None = None


def archive(
    run: RunFolder, store: Store, *, everything: bool = False, check: bool = False, progress: Show = lambda done, total: None
) -> Archived:
    """Copies what the archive does not have, reads it back, then writes down what there is. The run may be served.

    Args:
        everything: Also keys, releases and the newest checkpoint.
        check: Read back what was there before, too; what is not as it was written is copied anew.

    Raises:
        ArchiveError: The place cannot be used, or belongs to another run.
        StorageError: The run cannot be read.
    """
    before = load_contents(store) or Contents(run.run_id)
    if before.run_id != run.run_id:
        raise ArchiveError(
            f"the archive is of run {before.run_id}",
            rule=f"an archive is of one run, this is {run.run_id}",
            remedy="name another",
        )
    done = Archived()
    replaced = SECRET if everything else ()
    small = {path: data for path, data in before.small.items() if not path.startswith(replaced)}
    small |= _small_files(run, everything)
    after = Contents(run.run_id, time.time_ns(), small, dict(before.files))
    with storage_errors(f"reading {run.path}"):
        items = list(_items(run, before, everything, done))
        total, at = sum(item.size for item in items), 0
        for item in items:
            known = before.files.get(item.path)
            try:
                stored = _ensure(store, item, known, check, done)
            except FileNotFoundError:  # retention or the learner took it away since
                stored = None
            if stored is not None:
                after.files[item.path] = stored
            at += item.size
            progress(at, total)
        if check:
            alone = before.files.keys() - {item.path for item in items}
            done.altered = tuple(p for p in sorted(alone) if not _is_whole(store, p, before.files[p]))
        after.small[f"buffer/{BUFFER_MANIFEST}"] = _manifest(run, before, after).to_bytes()
    store.write_whole(ARCHIVE, after.to_bytes())
    return done


def _small_files(run: RunFolder, everything: bool) -> dict[str, bytes]:
    patterns = (*SMALL, *(SMALL_OF_EVERYTHING if everything else ()))
    paths = [path for pattern in patterns for path in sorted(run.path.glob(pattern)) if path.is_file()]
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in paths}


def _items(run: RunFolder, before: Contents, everything: bool, done: Archived) -> Iterator[_Item]:
    archived = {(Path(path).parent, segment_name(Path(path)).number): path for path in before.files if path.endswith(".seg")}
    for folder in (run.buffer, labels_folder(run.buffer)):
        if not folder.is_dir():
            continue
        for name in live_segments(folder):
            state, path = read_state_file(name.state_path), name.path.relative_to(run.path)
            if state is None or not state.sealed:
                done.open_segments += 1
            elif archived.get((path.parent, name.number), path.as_posix()) == path.as_posix():
                yield _Item(path.as_posix(), name.path, state.length, name)
                yield from _item(run, name.state_path)
                if sidecar.load(name, state.length) is not None:
                    yield from _item(run, name.index_path)
    for path in sorted((run.buffer / "specs").glob("*.json")):
        yield from _item(run, path)
    if everything:
        manifests = sorted((run.releases / "manifests").glob("*.json"))  # before the chunks: these are there then
        for path in (*manifests, *sorted((run.releases / "chunks").glob("*"))):
            yield from _item(run, path)
        steps = sorted(path for path in run.checkpoints.glob("[0-9]*") if path.name.isdigit())
        for path in sorted(steps[-1].iterdir()) if steps else ():
            yield from _item(run, path)


def _item(run: RunFolder, path: Path) -> Iterator[_Item]:
    with contextlib.suppress(FileNotFoundError):  # retention or the learner took it away since the listing
        yield _Item(path.relative_to(run.path).as_posix(), path, path.stat().st_size)


def _ensure(store: Store, item: _Item, known: Stored | None, check: bool, done: Archived) -> Stored:
    """Makes sure that the archive has a file, none of which ever changes. One that was written down as there is trusted, but
    for its size; one that a killed archiving left is read back."""
    there = store.size(item.path)
    if known is not None and there == known.size and (not check or store.sha256(item.path) == known.sha256):
        done.kept += 1
        return known
    stored = Stored(item.size, _local_digest(item))
    if known is None and there == item.size and store.sha256(item.path) == stored.sha256:
        done.kept += 1
        return stored
    store.write(item.path, _local_pieces(item))
    if store.sha256(item.path) != stored.sha256:
        raise ArchiveError(
            f"{item.path} was written and reads back otherwise",
            rule="what is archived has the checksum of the original",
            remedy="look at the disk or the network; the same command goes on where this one stopped",
        )
    done.files += 1
    done.bytes += item.size
    if item.segment is not None:
        data = mapped(item.segment, item.size)
        done.damaged += sum(isinstance(found, Damage) for found in scan(data, 0, len(data), item.segment.salt))
    return stored


def _is_whole(store: Store, path: str, stored: Stored) -> bool:
    return store.size(path) == stored.size and store.sha256(path) == stored.sha256


def _local_digest(item: _Item) -> str:
    digest = hashlib.sha256()
    for piece in _local_pieces(item):
        digest.update(piece)
    return digest.hexdigest()


def _local_pieces(item: _Item) -> Iterator[bytes]:
    left = item.size
    with item.source.open("rb") as file:
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            yield piece
    if left:
        raise ArchiveError(f"{item.source} is {left} bytes shorter than it was", rule="what is archived does not change")


def _manifest(run: RunFolder, before: Contents, after: Contents) -> Manifest:
    """Facts of the segments in the archive, as far as they are known: from this manifest and the archived one."""
    old = Manifest.from_bytes(before.small.get(f"buffer/{BUFFER_MANIFEST}", b"")) or Manifest()
    new = load_manifest(run.buffer) or Manifest()
    entries = {entry.file: entry for entry in (*old.segments, *new.segments) if f"buffer/{entry.file}" in after.files}
    return Manifest(tuple(sorted(entries.values(), key=lambda entry: entry.number)))


def restore(store: Store, path: Path, *, progress: Show = lambda done, total: None) -> Archived:
    """Makes a run folder of an archive. The same call goes on where a killed one stopped.

    Args:
        path: A folder that is new or empty.

    Raises:
        ArchiveError: There is no finished archive, or something in it is not as it was written.
        RunFolderError: The folder holds something else.
        DiskFull, StorageError: The folder cannot be written.
    """
    contents = load_contents(store)
    if contents is None:
        raise ArchiveError(
            f"there is no {ARCHIVE}",
            rule="it is written when an archive is whole",
            remedy="run `fleet data archive` to its end",
        )
    run, files, done = RunFolder(path), Files(), Archived()
    with storage_errors(f"restoring {path}"):
        _begin(run, contents, files)
        total, at = sum(stored.size for stored in contents.files.values()), 0
        for relative, stored in contents.files.items():
            _fetch(store, relative, stored, run.path / relative, files, done)
            at += stored.size
            progress(at, total)
        for relative, data in contents.small.items():
            if relative != "run.json":
                _put(files, run.path / relative, data, private=relative.startswith(SECRET))
        _put(files, run.mark, contents.small["run.json"])  # last: from here on it is a run
        files.unlink(run.path / _MARK)
    return done


def _begin(run: RunFolder, contents: Contents, files: Files) -> None:
    mark = run.path / _MARK
    if run.path.exists() and any(run.path.iterdir()):
        same = mark.exists() and json.loads(mark.read_bytes()).get("run_id") == contents.run_id
        if not same:
            raise RunFolderError(
                f"{run.path} is not empty", rule="a run is restored into a new folder", remedy="name another folder"
            )
    files.make_folders(run.path)
    files.write_atomic(mark, json.dumps({"run_id": contents.run_id}).encode())
    for folder in (run.keys, run.registry, run.buffer, run.releases, run.checkpoints, run.logs, run.report, run.robots):
        files.make_folders(folder)
    run.keys.chmod(0o700)


def _fetch(store: Store, relative: str, stored: Stored, target: Path, files: Files, done: Archived) -> None:
    if target.exists() and target.stat().st_size == stored.size and _digest(target) == stored.sha256:
        done.kept += 1
        return
    files.make_folders(target.parent)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    digest = hashlib.sha256()
    fd = files.open_new(partial)
    try:
        for piece in store.pieces(relative):
            digest.update(piece)
            files.write(fd, [piece])
        files.fsync(fd)
    finally:
        files.close(fd)
    if digest.hexdigest() != stored.sha256:
        partial.unlink()
        raise ArchiveError(
            f"{relative} in the archive is not what was archived",
            rule="its sha256 is the one in archive.json",
            remedy="where the run still is: fleet data archive --check; else another copy of the archive",
        )
    files.replace(partial, target)
    files.fsync_dir(target.parent)
    done.files += 1
    done.bytes += stored.size


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(files: Files, path: Path, data: bytes, *, private: bool = False) -> None:
    files.make_folders(path.parent)
    files.write_atomic(path, data)
    if private:
        path.chmod(0o600)
