import pytest

from fleet.errors import RunFolderError
from fleet.runfolder import SHARED_FILES, SHARED_FOLDERS, RunFolder


def test_a_run_of_one_node_shares_nothing(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    assert run.shared is None and not run.nodes.exists()
    assert RunFolder.open(run.path).run_id == run.run_id


def test_nodes_see_the_same_run_and_keep_their_own_buffers(tmp_path):
    first = RunFolder.create(tmp_path / "a" / "toy", tmp_path / "mnt" / "toy")
    second = RunFolder.attach(tmp_path / "b" / "toy", tmp_path / "mnt" / "toy")
    assert first.run_id == second.run_id and first.shared == second.shared == tmp_path / "mnt" / "toy"
    first.config.write_text("run: {}\n")  # through a link that pointed nowhere when it was made
    (second.keys / "x").write_text("x")
    (first.buffer / "segment").write_text("x")
    assert second.config.read_text() == "run: {}\n" and (first.keys / "x").exists() and not (second.buffer / "segment").exists()
    assert first.shared.joinpath("keys").stat().st_mode & 0o077 == 0


def test_a_nodes_folder_can_be_made_again_and_is_completed(tmp_path):
    shared = tmp_path / "mnt"
    RunFolder.create(tmp_path / "a", shared)
    half = tmp_path / "b"
    half.mkdir()
    (half / "nodes").symlink_to(shared / "nodes")  # as a killed process leaves it
    for _ in range(2):
        run = RunFolder.attach(half, shared)
        assert all((run.path / name).is_symlink() for name in (*SHARED_FOLDERS, *SHARED_FILES)) and run.logs.is_dir()


def test_a_folder_of_another_run_or_of_something_else_is_refused(tmp_path):
    for name in ("one", "two"):
        RunFolder.create(tmp_path / "a" / name, tmp_path / "mnt" / name)
    with pytest.raises(RunFolderError, match="does not belong"):
        RunFolder.attach(tmp_path / "a" / "one", tmp_path / "mnt" / "two")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(RunFolderError, match="does not belong"):
        RunFolder.attach(tmp_path / "photos", tmp_path / "mnt" / "two")
    with pytest.raises(RunFolderError, match=r"run\.json"):
        RunFolder.attach(tmp_path / "new", tmp_path / "photos")
    with pytest.raises(RunFolderError, match="holds a run"):
        RunFolder.create(tmp_path / "b", tmp_path / "mnt" / "two")
    assert not (tmp_path / "b").exists() and not (tmp_path / "new").exists()


def test_what_a_killed_start_left_is_no_other_run(tmp_path):
    (tmp_path / "run" / "keys").mkdir(parents=True)
    (tmp_path / "run" / "run.json.partial").touch()
    run = RunFolder.create(tmp_path / "run")
    assert RunFolder.open(run.path).logs.is_dir()
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "deep" / "file").touch()
    with pytest.raises(RunFolderError, match="something else"):
        RunFolder.create(tmp_path / "other")
