"""Export of a run with interventions, read back by lerobot."""

import json

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

from buffer.export_lerobot import Selection, export_dataset
from fleet.errors import DatasetError, StorageError
from fleet.robot import Source
from fleet.spec import RobotSpec
from tests.buffer.fragments import chunk_row, episode_row, make_rows, make_spec
from tests.lerobot.helpers import open_dataset, write_log

POLICY, OPERATOR = Source.POLICY, Source.OPERATOR
BOOT = "b" * 16


def column(dataset, name):
    return [np.asarray(dataset[i][name]).item() for i in range(len(dataset))]


@pytest.mark.timeout(120)
def test_what_only_a_fleet_knows_is_in_columns(tmp_path):
    spec = make_spec(image="jpeg", extra=4)
    spec = RobotSpec(spec.robot_type, 20, spec.features)
    rows = [
        *make_rows("arm-1", BOOT, 0, 0, [POLICY, POLICY], spec=spec, chunk_id=11),
        *make_rows("arm-1", BOOT, 0, 2, [OPERATOR, OPERATOR], spec=spec, chunk_id=12),
        *make_rows("arm-1", BOOT, 0, 4, [POLICY], spec=spec, chunk_id=13),
    ]
    for row in rows[2:4]:
        row["operator_id"] = "ann"
    rows[4] |= {"next.reward": 1.0, "next.terminated": True}
    second = make_rows("arm-1", BOOT, 1, 0, [POLICY, OPERATOR], spec=spec, chunk_id=-1)
    second[1] |= {"operator_id": "bob", "next.truncated": True}
    chunks = [chunk_row(0, 11, 4), chunk_row(0, 12, 5, 2), chunk_row(0, 13, 6, 4)]
    fragments = [
        ("arm-1", BOOT, {"episodes": [episode_row(0, "opened")], "steps": rows[:3], "chunks": chunks[:2]}),
        ("arm-1", BOOT, {"episodes": [episode_row(0, "closed", length=5, outcome="failure")], "steps": rows[3:]}),
        (
            "arm-1",
            BOOT,
            {"episodes": [episode_row(1, "opened"), episode_row(1, "closed", length=2, outcome="failure")], "steps": second},
        ),
    ]
    fragments[1][2]["chunks"] = chunks[2:]
    write_log(tmp_path / "buffer", spec, fragments)
    ids = {"robot_id": "arm-1", "boot_id": BOOT, "episode_id": 0}
    said = {**ids, "field": "outcome", "value": "success", "judge": "ann", "time_ns": 1}
    write_log(tmp_path / "buffer" / "labels", spec, [("cli", BOOT, {"labels": [said]})])

    done = export_dataset(tmp_path / "buffer", tmp_path / "out", Selection(), run_id="run-1")
    dataset = open_dataset(tmp_path / "out")
    assert (done.episodes, done.steps, len(dataset)) == (2, 7, 7)
    assert column(dataset, "intervention") == [False, False, True, True, False, False, True]
    assert column(dataset, "source") == [0, 0, 1, 1, 0, 0, 1]
    assert column(dataset, "policy_version") == [4, 4, 5, 5, 6, -1, -1]
    assert column(dataset, "operator_index") == [-1, -1, 0, 0, -1, -1, 1]
    assert column(dataset, "next.reward") == [0, 0, 0, 0, 1, 0, 0]
    assert column(dataset, "next.done") == [False] * 4 + [True, False, True]
    assert column(dataset, "next.truncated") == [False] * 6 + [True]
    assert column(dataset, "next.success") == [False] * 4 + [True, False, False]
    for i, row in enumerate([*rows, *second]):
        assert np.array_equal(np.asarray(dataset[i]["action"]), row["action"])
        assert np.array_equal(np.asarray(dataset[i]["observation.state"]), row["observation.state"])
        assert np.array_equal(np.asarray(dataset[i]["extra.ballast"]), row["extra.ballast"])
        assert np.abs(np.asarray(dataset[i]["observation.images.top"]) * 255 - (40 + row["frame_index"])).max() < 3
    origin = json.loads((tmp_path / "out" / "meta" / "fleet.json").read_text())
    assert origin["operators"] == ["ann", "bob"] and origin["run_id"] == "run-1" and spec.hash in origin["specs"]
    first = origin["episodes"][0]
    assert (first["robot_id"], first["boot_id"], first["episode_id"]) == ("arm-1", BOOT, 0)
    assert (first["outcome"], first["judge"], first["interventions"]) == ("success", "ann", 2)


@pytest.mark.timeout(60)
def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    spec = make_spec()
    rows = make_rows("arm-1", BOOT, 0, 0, [POLICY] * 3)
    closed = [episode_row(0, "opened"), episode_row(0, "closed", length=3, outcome="success")]
    write_log(tmp_path / "buffer", spec, [("arm-1", BOOT, {"episodes": closed, "steps": rows})])

    def full(done, total):
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="no room"):
        export_dataset(tmp_path / "buffer", tmp_path / "out", Selection(), run_id="r", progress=full)
    assert [path.name for path in tmp_path.iterdir()] == ["buffer"]
    export_dataset(tmp_path / "buffer", tmp_path / "out", Selection(), run_id="r")
    assert len(open_dataset(tmp_path / "out")) == 3


@pytest.mark.timeout(60)
def test_a_rate_that_is_no_whole_number_is_refused(tmp_path):
    spec = RobotSpec("toy", 12.5, make_spec().features)
    rows = make_rows("arm-1", BOOT, 0, 0, [POLICY] * 3, spec=spec)
    closed = [episode_row(0, "opened"), episode_row(0, "closed", length=3, outcome="success")]
    write_log(tmp_path / "buffer", spec, [("arm-1", BOOT, {"episodes": closed, "steps": rows})])
    with pytest.raises(DatasetError, match=r"control_hz is 12\.5"):
        export_dataset(tmp_path / "buffer", tmp_path / "out", Selection(), run_id="r")
