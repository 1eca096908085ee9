"""``fleet data`` as a user types it, on a run that is served or not."""

import json
import signal
from pathlib import Path

import pytest

from buffer.manifest import live_segments
from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder
from fleet.server.registry import RegistryServer
from tests.buffer.fragments import make_spec
from tests.buffer.runs import DEMO, POLICY, Writer, fill, make_run
from tests.buffer.test_verify import fragments, spoil
from tests.command_line import answer, fleet
from tests.faults.test_shard_process import TEACH, shard, wait_until  # noqa: F401

COMMANDS = ("stats", "list", "show", "verify", "repair", "prune", "label", "exclude", "archive", "restore")


def fleet_data(*arguments):
    return answer("data", *arguments)


def in_a_process(*arguments):
    """(exit code, standard output) of the command line as it is started from a shell."""
    command = fleet("data", *arguments)
    said, _ = command.communicate(timeout=60)
    assert "Traceback" not in said
    return command.returncode, said


def ask(*arguments):
    code, out, err = fleet_data(*arguments, "--json")
    assert code in (0, 1), err
    return json.loads(out)


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run.buffer, spec=make_spec(image="jpeg", extra=4000))
    return run


@pytest.fixture
def served(run):
    """The same run while a process writes its log."""
    writer = Writer(run.buffer, spec=make_spec(image="jpeg", extra=4000))
    writer.episode("arm-0", "boot0", 9, [POLICY] * 5, closed=False)
    yield run
    writer.close()


def test_the_group_lists_every_command_with_a_line(run):
    _, out = in_a_process("--help")
    for name in (*COMMANDS, "export", "import"):
        assert f" {name} " in out


def test_stats_of_a_served_run(served):
    stats = ask("stats", served.path)
    assert (stats["total"]["steps"], stats["total"]["episodes"], stats["total"]["success"]) == (77, 9, 8)
    assert stats["by_source"] == {"policy": 71, "operator": 6}
    assert stats["by_robot"]["arm-1"]["corrected"] == 1 and stats["by_outcome"] == {"success": 8, "open": 1}
    assert (stats["first_version"], stats["last_version"]) == (4, 7)
    sizes = {row["feature"]: row for row in stats["sizes"]}
    assert sizes["observation.state"]["bytes_per_step"] == 12
    assert 300 < sizes["observation.images.top"]["bytes_per_step"] < 2000
    assert sizes["all"]["bytes_per_step"] > 4000 and sizes["extra.ballast"]["gb_per_hour"] == pytest.approx(0.72)
    code, out, _ = fleet_data("stats", served.path)
    assert code == 0 and "77 in" in out and "arm-1" in out and "GB per robot-hour" in out


def test_list_filters_and_limits(run):
    writer = Writer(run.buffer)
    writer.episode("arm-7", "b", 0, [DEMO] * 3, task="mirror")
    writer.close()
    assert [e["name"] for e in ask("list", run.path, "--task", "mirror")] == ["arm-7/b/0"]
    assert len(ask("list", run.path, "--robot", "arm-0", "--robot", "arm-1")) == 8
    assert len(ask("list", run.path, "--limit", "3")) == 3
    assert ask("list", run.path, "--outcome", "failure") == []
    code, out, _ = fleet_data("list", run.path, "--limit", "2")
    assert code == 0 and "arm-7/b/0" in out and "the newest 2 of 9" in out


def test_show_prints_an_episode_and_writes_its_contact_sheet(served, tmp_path):
    sheet = tmp_path / "sheet.png"
    code, out, _ = fleet_data("show", served.path, "arm-1/3", "--out", sheet)
    assert code == 0 and "arm-1/boot1/3" in out and "operator" in out and str(sheet) in out
    assert sheet.read_bytes().startswith(b"\x89PNG") and sheet.stat().st_size > 2000
    shown = ask("show", served.path, "--last", "--frames", "3")
    assert (shown["name"], shown["outcome"], [frame["index"] for frame in shown["frames"]]) == (
        "arm-0/boot0/9",
        "open",
        [0, 2, 4],
    )
    assert Path(shown["sheet"]).parent == served.report / "episodes"


def test_show_without_images_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run.buffer)
    code, out, _ = fleet_data("show", run.path, "--last", "--robot", "arm-0")
    assert code == 0 and "contact sheet: none" in out and "arm-0/boot0/3" in out


@pytest.mark.parametrize(
    "arguments", [("show",), ("show", "arm-9/0"), ("show", "arm/0"), ("label", "outcome", "good", "arm-0/0")]
)
def test_a_wrong_name_or_value_is_explained(run, arguments):
    command, *rest = arguments
    code, _, err = fleet_data(command, run.path, *rest)
    assert code == 2 and "error: " in err and "rule: " in err


def test_labels_and_exclusions_of_a_served_run_are_seen_at_once_and_can_be_undone(served):
    assert fleet_data("label", served.path, "outcome", "failure", "arm-0/0", "arm-1/0", "--judge", "ann")[0] == 0
    assert fleet_data("exclude", served.path, "arm-0/1")[0] == 0
    found = {e["name"]: e for e in ask("list", served.path)}
    for name in ("arm-0/boot0/0", "arm-1/boot1/0"):
        assert (found[name]["outcome"], found[name]["said"], found[name]["labels"][0]["judge"]) == ("failure", "success", "ann")
    assert [name for name, e in found.items() if e["excluded"]] == ["arm-0/boot0/1"]
    assert ask("stats", served.path)["labels"] == {"outcome=failure": 2, "excluded=true": 1}
    assert fleet_data("exclude", served.path, "arm-0/1", "--undo")[0] == 0
    assert not any(e["excluded"] for e in ask("list", served.path))
    # One wrong name and nothing is stored.
    assert fleet_data("exclude", served.path, "arm-0/2", "arm-9/2")[0] == 2
    assert not any(e["excluded"] for e in ask("list", served.path))


def test_verify_names_what_is_damaged_and_exits_with_1(served):
    code, out, _ = fleet_data("verify", served.path)
    assert code == 0 and "whole" in out
    name = live_segments(served.buffer)[1]
    victim = fragments(name)[0]
    spoil(name.path, victim.payload_at + 9)
    report = ask("verify", served.path)
    assert [(f["kind"], f["offset"], f["robot_id"], f["seq"]) for f in report["faults"]] == [
        ("damaged", victim.at, victim.key["robot"], victim.key["seq"])
    ]
    code, out, _ = fleet_data("verify", served.path)
    assert code == 1 and name.path.name in out and str(victim.at) in out


def test_repair_says_what_it_would_do_then_does_it_and_is_refused_while_the_run_is_served(run):
    live_segments(run.buffer)[0].state_path.unlink()
    code, out, _ = fleet_data("repair", run.path)
    assert code == 0 and "--yes does it" in out and not (run.buffer / "manifest.json").exists()
    writer = Writer(run.buffer)
    for yes in ([], ["--yes"]):
        code, _, err = fleet_data("repair", run.path, *yes)
        assert code == 2 and "in use by process" in err
    writer.close()
    assert fleet_data("repair", run.path, "--yes")[0] == 0
    assert (run.buffer / "manifest.json").exists()
    assert "nothing to repair" in fleet_data("repair", run.path)[1]
    assert fleet_data("verify", run.path)[0] == 0


def test_prune_by_hand(run):
    assert fleet_data("prune", run.path)[0] == 2  # the run has no limit
    code, out, _ = fleet_data("prune", run.path, "--max-gb", "0.0001")
    assert code == 0 and "--yes does it" in out and ask("stats", run.path)["total"]["steps"] == 72
    writer = Writer(run.buffer)
    assert fleet_data("prune", run.path, "--max-gb", "0.0001", "--yes")[0] == 2
    writer.close()
    code, out, _ = fleet_data("prune", run.path, "--max-gb", "0.0001", "--yes")
    assert code == 0 and "free again" in out
    stats = ask("stats", run.path)
    assert stats["by_source"]["operator"] == 6 and stats["total"]["steps"] < 72 and stats["compacted"]
    assert fleet_data("verify", run.path)[0] == 0
    code, _, err = fleet_data("prune", run.path, "--max-gb", "1", "--protect", "demos")
    assert code == 2 and "did you mean 'demo'" in err


def test_archive_of_a_served_run_and_restore(served, tmp_path):
    code, out, _ = fleet_data("archive", served.path, (tmp_path / "archive").as_uri())
    assert code == 0 and "1 segments are still written to" in out
    code, out, _ = fleet_data("restore", tmp_path / "archive", tmp_path / "again")
    assert code == 0 and "--resume" in out and "enroll" in out
    assert ask("stats", tmp_path / "again")["total"]["steps"] == 72
    code, _, err = fleet_data("restore", tmp_path / "archive", tmp_path / "again")
    assert code == 2 and "not empty" in err


@pytest.mark.timeout(120)
def test_beside_a_gateway_and_a_robot_at_work(shard):  # noqa: F811
    actor = shard.start().join("teacher", {**TEACH, "actor": {**TEACH["actor"], "realtime": True}})
    try:
        wait_until(lambda: len(shard.stored()) > 3)
        path = shard.run.path
        assert in_a_process("verify", path)[0] == 0
        before = ask("stats", path)["total"]["steps"]
        episode = ask("list", path, "--robot", "teacher")[0]["name"]
        assert fleet_data("exclude", path, episode)[0] == 0
        assert ask("show", path, episode)["excluded"]
        assert in_a_process("repair", path)[0] == fleet_data("prune", path, "--max-gb", "1", "--yes")[0] == 2
        wait_until(lambda: ask("stats", path)["total"]["steps"] > before)
        assert actor.poll() is None and shard.gateway.poll() is None
    finally:
        actor.send_signal(signal.SIGINT)
        actor.wait(30)
    assert fleet_data("verify", path)[0] == 0


@pytest.mark.timeout(120)
def test_a_restored_run_is_served_and_goes_on(shard, tmp_path):  # noqa: F811
    shard.start().join("teacher", TEACH, "actor.num_episodes=2").communicate(timeout=60)
    shard.gateway.send_signal(signal.SIGTERM)
    assert shard.gateway.wait(15) == 0
    before = ask("stats", shard.run.path)["total"]
    assert before["episodes"] == 2
    assert fleet_data("archive", shard.run.path, tmp_path / "archive")[0] == 0
    assert fleet_data("restore", tmp_path / "archive", tmp_path / "again")[0] == 0
    shard.run = RunFolder.open(tmp_path / "again")
    create_run_keys(shard.run.keys)  # as `fleet up --resume` does
    shard.registry.stop()
    shard.registry = RegistryServer(shard.run.registry)
    shard.start().join("teacher", TEACH, "actor.num_episodes=1").communicate(timeout=60)
    after = ask("stats", shard.run.path)["total"]
    assert after["episodes"] == 3 and after["steps"] > before["steps"]
    assert fleet_data("verify", shard.run.path)[0] == 0
