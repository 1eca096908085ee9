import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from buffer import sidecar
from buffer.archive import archive, restore
from buffer.archive_store import ARCHIVE, Contents, Store, Stored, load_contents
from buffer.browse import read_episodes
from buffer.labels import Label, append_labels
from buffer.log import Log
from buffer.manifest import live_segments
from buffer.retention import Limits, Upkeep, prune
from buffer.sampler import Sampler
from buffer.segment import read_state_file
from buffer.verify import verify
from fleet.errors import ArchiveError, RunFolderError
from fleet.files import Files
from fleet.runfolder import RunFolder
from tests.buffer.runs import POLICY, Writer, fill, make_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run.buffer)
    Upkeep(Files(), run.buffer).sync(0)
    for name in live_segments(run.buffer):
        sidecar.write(Files(), run.buffer, name)
    append_labels(run.buffer, [Label("arm-0", "boot0", 0, "excluded", "true", "ann", 1)])
    (run.keys / "server.key").write_text("secret")
    (run.releases / "counter").write_text("7")
    return run


@pytest.fixture(params=["local", "uri", "mock", "subtree"])
def store(request, tmp_path):
    if request.param == "local":
        return Store.open(str(tmp_path / "archive"))
    if request.param == "uri":
        return Store.open((tmp_path / "archive").as_uri())
    if request.param == "mock":
        return Store(fs._MockFileSystem(), "bucket/robots")
    return Store(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "archive")


def committed(buffer):
    """What counts of each segment, byte for byte, and its sidecar."""
    found = {}
    for name in [*live_segments(buffer), *live_segments(buffer / "labels")]:
        found[name.path.name] = name.path.read_bytes()[: read_state_file(name.state_path).length]
        found[name.state_path.name] = name.state_path.read_bytes()
        if name.index_path.exists():
            found[name.index_path.name] = name.index_path.read_bytes()
    return found


def test_what_is_restored_is_the_same_bytes(run, store, tmp_path):
    done = archive(run, store)
    assert done.files > 10 and done.open_segments == done.damaged == 0
    restored = RunFolder(tmp_path / "again")
    restore(store, restored.path)
    assert RunFolder.open(restored.path).run_id == run.run_id
    assert committed(restored.buffer) == committed(run.buffer)
    for name in ("run.yaml", "tasks.json", "releases/counter", "buffer/manifest.json"):
        assert (restored.path / name).read_bytes() == (run.path / name).read_bytes(), name
    assert not (restored.keys / "server.key").exists()
    report = verify(restored.buffer)
    assert report.faults == [] and report.steps == 72 and report.without_sidecar == 1  # the labels have none
    assert read_episodes(restored.buffer) == read_episodes(run.buffer)


def test_learner_and_gateway_go_on_from_what_is_restored(run, tmp_path):
    store = Store.open(str(tmp_path / "archive"))
    archive(run, store)
    restored = RunFolder(tmp_path / "again")
    restore(store, restored.path)
    old, new = Log(run.buffer), Log(restored.buffer)
    for robot in range(2):
        key = (f"arm-{robot}", f"boot{robot}")
        assert new.last(*key) == old.last(*key) and new.high_water(*key) == 12
    old.close(), new.close()
    writer = Writer(restored.buffer)
    writer.episode("arm-0", "boot0", 9, [POLICY] * 6)
    writer.close()
    sampler = Sampler(restored.buffer, ["reach"], seed=0)
    sampler.poll()
    assert sampler.num_steps() == 78 and sampler.damaged == 0
    assert verify(restored.buffer).faults == []
    sampler.close()


def test_a_second_time_only_what_is_new_is_copied(run, store):
    first = archive(run, store)
    assert archive(run, store).files == 0
    writer = Writer(run.buffer)
    writer.episode("arm-0", "boot0", 9, [POLICY] * 2)
    writer.close()
    again = archive(run, store)
    assert (again.files, again.kept) == (2, first.files)  # a segment and its state
    assert archive(run, store, check=True).files == 0


def test_what_is_still_written_to_is_left_out_until_it_ends(run, tmp_path):
    store = Store.open(str(tmp_path / "archive"))
    writer = Writer(run.buffer)
    writer.episode("arm-0", "boot0", 9, [POLICY] * 2)
    assert archive(run, store).open_segments == 1
    writer.close()
    assert archive(run, store).open_segments == 0
    restore(store, tmp_path / "again")
    assert verify(tmp_path / "again" / "buffer").steps == 74


def test_what_retention_gave_up_stays_in_the_archive(run, tmp_path):
    store = Store.open(str(tmp_path / "archive"))
    before = committed(run.buffer)
    archive(run, store)
    assert prune(run.buffer, Limits(max_bytes=1), dry_run=False)
    archive(run, store)
    restore(store, tmp_path / "again")
    assert committed(tmp_path / "again" / "buffer") == before
    report = verify(tmp_path / "again" / "buffer")
    assert (report.faults, report.given_up, report.steps) == ([], 0, 72)


def test_everything_brings_the_keys_and_they_stay_private(run, tmp_path):
    store = Store.open(str(tmp_path / "archive"))
    chunk = run.releases / "chunks" / "aa"
    chunk.parent.mkdir()
    chunk.write_bytes(b"weights")
    for step in ("0000000001", "0000000002"):
        (run.checkpoints / step).mkdir()
        (run.checkpoints / step / "meta.json").write_text(step)
    archive(run, store, everything=True)
    archive(run, store)  # later ones without do not take them away
    restore(store, tmp_path / "again")
    restored = RunFolder.open(tmp_path / "again")
    assert (restored.keys / "server.key").read_text() == "secret"
    assert (restored.keys / "server.key").stat().st_mode & 0o77 == restored.keys.stat().st_mode & 0o77 == 0
    assert (restored.releases / "chunks" / "aa").read_bytes() == b"weights"
    assert [path.name for path in restored.checkpoints.iterdir()] == ["0000000002"]


def damage(path, at=200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_was_altered_in_the_archive_is_refused_and_copied_anew_by_a_check(run, tmp_path):
    place = tmp_path / "archive"
    store = Store.open(str(place))
    archive(run, store)
    damage(sorted(place.glob("buffer/*.seg"))[1])
    with pytest.raises(ArchiveError, match="not what was archived"):
        restore(store, tmp_path / "again")
    assert archive(run, store).files == 0
    assert archive(run, store, check=True).files == 1
    restore(store, tmp_path / "again")  # goes on where it stopped
    assert committed(tmp_path / "again" / "buffer") == committed(run.buffer)


def test_what_was_altered_and_is_gone_in_the_run_is_named(run, tmp_path):
    place = tmp_path / "archive"
    store = Store.open(str(place))
    archive(run, store)
    prune(run.buffer, Limits(max_bytes=1), dry_run=False)
    victim = next(path for path in sorted(place.glob("buffer/*.seg")) if not (run.buffer / path.name).exists())
    damage(victim)
    assert archive(run, store, check=True).altered == (f"buffer/{victim.name}",)


def test_a_half_written_archive_is_none_and_is_finished_by_the_same_call(run, tmp_path):
    place = tmp_path / "archive"
    store = Store.open(str(place))
    archive(run, store)
    (place / ARCHIVE).unlink()
    segments = sorted(place.glob("buffer/*.seg"))
    os.truncate(segments[0], 100)  # what a killed copy leaves
    damage(segments[1])  # of the right size and wrong
    with pytest.raises(ArchiveError, match="written when an archive is whole"):
        restore(store, tmp_path / "again")
    assert archive(run, store).files == 2
    restore(store, tmp_path / "again")
    assert committed(tmp_path / "again" / "buffer") == committed(run.buffer)


def test_a_restoration_that_is_killed_is_no_run_and_goes_on(run, tmp_path):
    place = tmp_path / "archive"
    archive(run, Store.open(str(place)))
    program = (
        "import sys, os; from pathlib import Path; from buffer.archive import restore; from buffer.archive_store import Store\n"
        "def progress(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), 9)\n"
        "restore(Store.open(sys.argv[1]), Path(sys.argv[2]), progress=progress)\n"
    )
    again = tmp_path / "again"
    assert subprocess.run([sys.executable, "-c", program, place, again], cwd=ROOT, check=False).returncode == -9
    with pytest.raises(RunFolderError):
        RunFolder.open(again)
    assert restore(Store.open(str(place)), again).kept > 3
    assert RunFolder.open(again).run_id == run.run_id
    assert committed(again / "buffer") == committed(run.buffer)


class ForgetfulStore(Store):
    """A place that says it has taken everything."""

    def write(self, path, pieces):
        super().write(path, (bytes(len(piece)) if path.endswith(".seg") else piece for piece in pieces))


def test_what_reads_back_otherwise_is_not_archived(run, tmp_path):
    store = ForgetfulStore(fs.LocalFileSystem(), str(tmp_path / "archive"))
    with pytest.raises(ArchiveError, match="reads back otherwise"):
        archive(run, store)
    assert load_contents(store) is None


def test_wrong_places_are_refused(run, tmp_path):
    store = Store.open(str(tmp_path / "archive"))
    archive(run, store)
    with pytest.raises(ArchiveError, match="is of run"):
        archive(make_run(tmp_path / "other"), store)
    with pytest.raises(RunFolderError, match="not empty"):
        restore(store, tmp_path / "other")
    with pytest.raises(ArchiveError, match="cannot be used"):
        Store.open("sftp://somewhere/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveError):
        archive(run, Store.open(str(tmp_path / "file")))


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a//b", "./a"])
def test_an_archive_cannot_write_outside_of_the_run(tmp_path, path):
    contents = Contents("r", time.time_ns(), {"run.json": b"{}"}, {path: Stored(1, "0")})
    with pytest.raises(ArchiveError):
        Contents.from_bytes(contents.to_bytes())


def test_altered_contents_are_refused(run, tmp_path):
    store = Store.open(str(tmp_path / "archive"))
    archive(run, store)
    data = (tmp_path / "archive" / ARCHIVE).read_bytes()
    assert load_contents(store) == Contents.from_bytes(data)
    for changed in (data[:100], data.replace(b"sha256", b"sha257"), data.replace(run.run_id.encode(), b"run-00000000")):
        with pytest.raises(ArchiveError):
            Contents.from_bytes(changed)
