"""Which episodes an export takes: these tests need no lerobot."""

import importlib.util

import pytest

from buffer.export_lerobot import Selection, choose, common_specs, export_dataset
from fleet.errors import DatasetError, NoData
from fleet.robot import Source
from fleet.spec import Feature, RobotSpec
from tests.buffer.fragments import chunk_row, episode_row, make_rows, make_spec
from tests.lerobot.helpers import write_log

POLICY, OPERATOR, DEMO = Source.POLICY, Source.OPERATOR, Source.DEMO
BOOT = "a" * 16


def whole_episode(robot, episode, sources, *, task="reach", outcome="success", version=None, spec=None, closed=True):
    """Tables of one episode in two fragments."""
    rows = make_rows(robot, BOOT, episode, 0, sources, task, spec, chunk_id=-1 if version is None else episode)
    first, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    end = episode_row(episode, "closed", task, len(rows), outcome)
    if version is not None:
        end |= {"first_version": version, "last_version": version}
    chunks = {} if version is None else {"chunks": [chunk_row(episode, episode, version)]}
    tables = [{"steps": first, "episodes": [episode_row(episode, "opened", task)], **chunks}, {"steps": rest}]
    if closed:
        tables[1]["episodes"] = [end]
    return [(robot, BOOT, rows) for rows in tables]


def label(robot, episode, field, value, time_ns):
    ids = {"robot_id": robot, "boot_id": BOOT, "episode_id": episode}
    return {**ids, "field": field, "value": value, "judge": "ann", "time_ns": time_ns}


@pytest.fixture
def folder(tmp_path):
    """Five finished episodes of two robots and one that still goes on."""
    fragments = [
        *whole_episode("arm-1", 0, [DEMO] * 4),
        *whole_episode("arm-1", 1, [POLICY] * 2 + [OPERATOR] * 2, task="push", version=3),
        *whole_episode("arm-2", 0, [POLICY] * 4, version=5, outcome="failure"),
        *whole_episode("arm-2", 1, [POLICY] * 4, version=7, outcome="unknown"),
        *whole_episode("arm-1", 2, [POLICY] * 4, version=7),
        *whole_episode("arm-1", 3, [POLICY] * 4, version=8, closed=False),
    ]
    write_log(tmp_path / "buffer", make_spec(), fragments)
    return tmp_path / "buffer"


def keys(folder, **wanted):
    return [(robot, episode) for robot, _, episode in choose(folder, Selection(**wanted))[0]]


def test_finished_episodes_are_taken_in_the_order_in_which_they_ended(folder):
    assert keys(folder) == [("arm-1", 0), ("arm-1", 1), ("arm-2", 0), ("arm-2", 1), ("arm-1", 2)]
    assert choose(folder, Selection())[1] == {"not finished": 1}


def test_each_filter(folder):
    assert keys(folder, tasks=("push",)) == [("arm-1", 1)]
    assert keys(folder, robots=("arm-2",)) == [("arm-2", 0), ("arm-2", 1)]
    assert keys(folder, outcomes=("failure", "unknown")) == [("arm-2", 0), ("arm-2", 1)]
    assert keys(folder, sources=(OPERATOR, DEMO)) == [("arm-1", 0), ("arm-1", 1)]
    assert keys(folder, from_version=6) == [("arm-2", 1), ("arm-1", 2)]
    assert keys(folder, spec="toy") == keys(folder, spec=make_spec().hash[:6]) == keys(folder)
    assert keys(folder, spec="other") == []


def test_the_newest_label_says_the_outcome_and_excluded_episodes_are_left_out(folder):
    given = [
        label("arm-2", 0, "outcome", "success", 20),
        label("arm-2", 0, "outcome", "aborted", 10),  # came later, was said earlier
        label("arm-2", 1, "excluded", "true", 10),
        label("arm-1", 2, "excluded", "true", 10),
        label("arm-1", 2, "excluded", "false", 11),
    ]
    write_log(folder / "labels", make_spec(), [("cli", BOOT, {"labels": given})])
    chosen, left_out = choose(folder, Selection(outcomes=("success",)))
    assert [(robot, episode) for robot, _, episode in chosen] == [("arm-1", 0), ("arm-1", 1), ("arm-2", 0), ("arm-1", 2)]
    assert chosen["arm-2", BOOT, 0].closed["judge"] == "ann"
    assert left_out == {"not finished": 1, "excluded by a label": 1}


def test_an_episode_of_which_a_part_is_lost_is_left_out(tmp_path):
    begin, end = whole_episode("arm-1", 0, [DEMO] * 4)
    fragments = [begin, end]
    for episode, said in ((1, 4), (2, 3)):  # the closed row counts the lost frame, or does not
        middle = {"steps": make_rows("arm-1", BOOT, episode, 0, [DEMO] * 2), "episodes": [episode_row(episode, "opened")]}
        closed = episode_row(episode, "closed", length=said, outcome="success")
        gap = {"steps": make_rows("arm-1", BOOT, episode, 3, [DEMO]), "episodes": [closed]}
        fragments += [("arm-1", BOOT, middle), ("arm-1", BOOT, gap)]
    write_log(tmp_path / "a", make_spec(), fragments)
    chosen, left_out = choose(tmp_path / "a", Selection())
    assert list(chosen) == [("arm-1", BOOT, 0)] and left_out == {"without all of its steps": 2}
    write_log(tmp_path / "b", make_spec(), [end])
    assert choose(tmp_path / "b", Selection()) == ({}, {"without its beginning": 1})


def test_robots_that_differ_are_both_named(tmp_path):
    other = RobotSpec("other_arm", 30, {"action": Feature("float32", (2,)), "observation.state": Feature("float32", (3,))})
    write_log(tmp_path / "x", make_spec(), whole_episode("arm-1", 0, [DEMO] * 4))
    write_log(tmp_path / "x", other, whole_episode("arm-2", 0, [DEMO] * 4))
    with pytest.raises(DatasetError, match=r"(?=.*'toy')(?=.*'other_arm')"):
        common_specs(tmp_path / "x", choose(tmp_path / "x", Selection())[0])
    assert len(common_specs(tmp_path / "x", choose(tmp_path / "x", Selection(spec="toy"))[0])) == 1


def test_units_and_codecs_may_differ(tmp_path):
    jpeg, raw = make_spec(image="jpeg"), make_spec(image="raw")
    write_log(tmp_path / "x", jpeg, whole_episode("arm-1", 0, [DEMO] * 4, spec=jpeg))
    write_log(tmp_path / "x", raw, whole_episode("arm-2", 0, [DEMO] * 4, spec=raw))
    assert set(common_specs(tmp_path / "x", choose(tmp_path / "x", Selection())[0])) == {jpeg.hash, raw.hash}


def test_nothing_to_export_and_a_folder_that_exists(folder, tmp_path):
    with pytest.raises(NoData, match="not asked for"):
        export_dataset(folder, tmp_path / "out", Selection(tasks=("fly",)), run_id="r")
    with pytest.raises(DatasetError, match="exists"):
        export_dataset(folder, tmp_path, Selection(), run_id="r")


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="lerobot is installed here")
def test_without_lerobot_the_remedy_is_said_and_nothing_is_left(folder, tmp_path):
    with pytest.raises(DatasetError, match="make lerobot"):
        export_dataset(folder, tmp_path / "out", Selection(), run_id="r")
    assert [path.name for path in tmp_path.iterdir()] == ["buffer"]
