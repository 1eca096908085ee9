"""Import: killed and gone on with, grown, refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

from buffer import import_lerobot
from buffer.import_lerobot import Demonstrations
from buffer.log import Log
from fleet.errors import DatasetError, FleetError, FragmentRefused
from fleet.schema import decode_fragment
from infra.data_lerobot import DatasetOutbox, import_dataset
from tests.lerobot.helpers import ROOT, TASKS, make_dataset, make_run, stored_steps

NUMBER = {"dtype": "float32", "shape": (1,), "names": None}
SAME = {text: task for task, text in TASKS.items()}


def every_step(lengths):
    return [(episode, frame) for episode, length in enumerate(lengths) for frame in range(length)]


@pytest.mark.timeout(300)
def test_killed_again_and_again_an_import_stores_each_step_once(tmp_path, scale):
    lengths = [90] * 12
    dataset, run = make_dataset(tmp_path / "set", lengths), make_run(tmp_path / "run")
    command = [sys.executable, str(ROOT / "tests" / "lerobot" / "importer.py"), str(run.path), str(dataset)]
    seen = set()
    for kill in range(3 * scale):
        importer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        lines = iter(importer.stdout.readline, "")
        if kill:
            seen.add(next(lines, ""))
        next(lines, "")
        os.kill(importer.pid, signal.SIGKILL)
        importer.communicate()
    assert len(seen) > 1 or len(stored_steps(run)) == sum(lengths)  # each start went on where the one before had ended
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=120).returncode == 0
    steps = stored_steps(run)
    assert [(episode, frame) for _, _, episode, frame in steps] == every_step(lengths)
    assert len({(robot, boot) for robot, boot, _, _ in steps}) == 1
    Log(run.buffer).close()  # refused, if a gateway of a killed import were still there


@pytest.mark.timeout(120)
def test_imported_twice_nothing_is_doubled_and_a_grown_dataset_brings_what_is_new(tmp_path):
    dataset, run = make_dataset(tmp_path / "set", [6, 7]), make_run(tmp_path / "run")
    assert import_dataset(run, Demonstrations(dataset)).steps_before == 0
    assert import_dataset(run, Demonstrations(dataset)).steps_before == 13
    make_dataset(dataset, [8], start=2)
    done = import_dataset(run, Demonstrations(dataset))
    assert (done.steps, done.steps_before) == (21, 13)
    assert [(episode, frame) for _, _, episode, frame in stored_steps(run)] == every_step([6, 7, 8])


@pytest.mark.timeout(120)
def test_a_name_stands_for_one_dataset(tmp_path):
    run = make_run(tmp_path / "run")
    import_dataset(run, Demonstrations(make_dataset(tmp_path / "set", [6, 7])))
    other = make_dataset(tmp_path / "other", [6, 7], shift=1.0)
    with pytest.raises(DatasetError, match="import-set"):
        import_dataset(run, Demonstrations(other), name="set")
    with pytest.raises(DatasetError, match="other settings"):
        import_dataset(run, Demonstrations(tmp_path / "set", codec="raw"))
    import_dataset(run, Demonstrations(other))
    assert len(stored_steps(run)) == 13 + 13


@pytest.mark.timeout(60)
def test_a_fragment_is_the_same_whenever_it_is_made(tmp_path):
    dataset = make_dataset(tmp_path / "set", [150, 30])
    first, again = Demonstrations(dataset), Demonstrations(dataset)
    assert (first.boot_id, first.num_fragments) == (again.boot_id, 3)
    assert [first.steps_before(seq) for seq in (1, 2, 3, 4)] == [0, 100, 150, 180]
    for seq in (2, 3):
        tables = [decode_fragment(f.tables, f.payload).tables for f in (d.fragment(seq, "r", SAME) for d in (first, again))]
        drop = ["time_ns"]
        assert tables[0]["steps"].drop_columns(drop).equals(tables[1]["steps"].drop_columns(drop))
        assert [row["event"] for row in tables[0]["episodes"].to_pylist()] == (["closed"] if seq == 2 else ["opened", "closed"])


@pytest.mark.timeout(60)
def test_the_outbox_sends_again_what_is_asked_for(tmp_path):
    outbox = DatasetOutbox(Demonstrations(make_dataset(tmp_path / "set", [2] * 5)), "r", SAME)

    def drain():
        found = []
        while outbox._sent < 5:
            fragment = outbox.next_unsent()
            found += [fragment.seq] if fragment is not None else []
        return found

    assert drain() == [1, 2, 3, 4, 5] and outbox.next_unsent() is None and outbox.num_pending == 5
    outbox.acknowledge(outbox.boot_id, 2)
    outbox.rewind(outbox.boot_id, 2)
    assert outbox.num_pending == 3 and drain() == [3, 4, 5]
    outbox.unsend(outbox.boot_id, 5)
    assert drain() == [5]
    outbox.rewind(outbox.boot_id, 5)
    assert outbox.num_pending == 0 and outbox.next_unsent() is None
    outbox.close()


@pytest.mark.timeout(60)
def test_an_unknown_task_is_refused_with_both_sides_named(tmp_path):
    dataset, run = make_dataset(tmp_path / "set", [3, 3]), make_run(tmp_path / "run")
    (run.path / "tasks.json").write_text(json.dumps({"lift": {"instruction": "lift it"}, "push": {"instruction": "x"}}))
    with pytest.raises(DatasetError, match=r"Reach the target.*'lift', 'push'"):
        import_dataset(run, Demonstrations(dataset))
    with pytest.raises(DatasetError, match="no task"):
        import_dataset(run, Demonstrations(dataset), tasks={"no such text": "lift"})
    import_dataset(run, Demonstrations(dataset), tasks={"Reach the target.": "lift", "push the block": "push"})
    assert len(stored_steps(run)) == 6


@pytest.mark.timeout(60)
def test_another_rate_than_the_runs_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    dataset = Demonstrations(make_dataset(tmp_path / "set", [3]))
    log = Log(run.buffer)
    log.add_spec(type(dataset.spec)("arm", 50, dataset.spec.features))
    log.close()
    with pytest.raises(DatasetError, match=r"20 frames per second.*'arm' at 50 Hz"):
        import_dataset(run, dataset)


@pytest.mark.timeout(60)
def test_columns_that_are_no_numbers_or_pictures_are_named(tmp_path):
    text = {"note": ({"dtype": "string", "shape": (1,), "names": None}, "hello"), "torque": (NUMBER, np.float32([1.5]))}
    dataset = make_dataset(tmp_path / "set", [3], more=text)
    with pytest.raises(DatasetError, match=r"'note' is string.*--leave-out note"):
        Demonstrations(dataset)
    taken = Demonstrations(dataset, leave_out=["note"], cameras={"top": "wrist"})
    steps = decode_fragment(*(lambda f: (f.tables, f.payload))(taken.fragment(1, "r", SAME))).tables["steps"]
    assert steps["extra.torque"].to_pylist() == [[1.5]] * 3
    assert "observation.images.wrist" in steps.schema.names and taken.info.left_out == ("note",)
    with pytest.raises(DatasetError, match=r"no \['observation\.images\.side'\]"):
        Demonstrations(dataset, cameras={"side": "wrist"})


@pytest.mark.timeout(60)
def test_an_action_that_is_not_finite_ends_the_import_and_is_not_sent(tmp_path):
    dataset = make_dataset(tmp_path / "set", [3], more={"observation.force": (NUMBER, np.float32([np.nan]))})
    run = make_run(tmp_path / "run")
    with pytest.raises(FragmentRefused, match=r"observation\.force"):
        import_dataset(run, Demonstrations(dataset))
    assert stored_steps(run) == []


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"info\.json"):
        Demonstrations(tmp_path)
    dataset = make_dataset(tmp_path / "set", [3])
    path = dataset / "meta" / "info.json"
    path.write_text(path.read_text().replace('"v3.0"', '"v2.1"'))
    with pytest.raises(DatasetError, match=r"version v2\.1"):
        Demonstrations(dataset)
    path.write_text(path.read_text().replace('"v2.1"', '"v3.0"'))
    next((dataset / "data").rglob("*.parquet")).unlink()
    with pytest.raises(FleetError, match="cannot be opened"):
        Demonstrations(dataset)


def test_fragments_are_bounded_by_their_size(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "set", [30])
    monkeypatch.setattr(import_lerobot, "FRAGMENT_BYTES", 10 * 32 * 48 * 3)
    assert Demonstrations(dataset).num_fragments == 4  # state and action take a little of the room: 9 frames each
