"""Ranks, placed functions and plain processes in a real Ray of one node: they are watched, ended and started again."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fleet.errors import ConfigError, LearnerError
from learner.placement import plan
from learner.restarts import RestartRule
from tests.learner_toys import make_run, make_tables

COUNT = "tests.learner.cluster_toys:count"
PRETEND = "tests.learner.cluster_toys:pretend"
SERVE = "tests.learner.cluster_toys:serve"
JOIN = """
import sys
from fleet.errors import LearnerError
from learner.cluster import nodes, start_ray
try:
    start_ray(sys.argv[1])
    print("joined", nodes()[0].here)
except LearnerError as error:
    print("refused", error)
"""
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "ray.token"


@pytest.fixture(scope="module")
def cluster(token):
    import learner.cluster as cluster

    saved = dict(os.environ)
    handler = signal.getsignal(signal.SIGTERM)
    cluster.start_ray(token=token, num_cpus=4)
    assert signal.getsignal(signal.SIGTERM) is handler
    yield cluster
    cluster.stop_ray()
    os.environ.clear()
    os.environ.update(saved)


def until(poll, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = poll()
        if condition(status):
            return dataclasses.replace(status) if dataclasses.is_dataclass(status) else status  # it goes on changing
        time.sleep(0.05)
    raise AssertionError(f"timed out at {status}")


def tables_of(ranks=2, **learner):
    tables = make_tables(**learner)
    tables["cluster"].ranks = ranks
    tables["cluster"].rank_timeout_s = 30.0
    return tables


def learner_of(cluster, run, tables, function=PRETEND, **options):
    here = cluster.nodes()[0]

    def make():
        return plan(cluster.nodes(), tables["cluster"], "cpu")

    return cluster.LearnerHandle(tables, make, {here.name: run.path}, function=function, **options)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_ray_of_ones_own_wants_its_token(cluster, token):
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    import ray

    address = ray.get_runtime_context().gcs_address
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    clean["HOME"] = str(token.parent)  # where Ray would look for a token of this user
    answers = {}
    for name, extra in {
        "right": {"RAY_AUTH_TOKEN_PATH": str(token)},
        "wrong": {"RAY_AUTH_TOKEN": "0" * 64},
        "none": {},
        "off": {"RAY_AUTH_MODE": "disabled"},
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", JOIN, address], env=clean | extra, capture_output=True, text=True, timeout=60, check=False
        )
        answers[name] = done.stdout.strip() or done.stderr
    assert answers["right"] == "joined True"
    assert answers["wrong"].startswith("refused") and "has another one" in answers["wrong"]
    assert "RAY_AUTH_TOKEN_PATH" in answers["wrong"]
    assert answers["none"].startswith("refused") and "has no token" in answers["none"]
    assert answers["off"].startswith("refused") and "sends none" in answers["off"]


@pytest.mark.parametrize("address", ["192.0.2.1:1", "ray://127.0.0.1:10001", "nonsense"])
def test_no_cluster_at_an_address_is_said_at_once(address):
    script = "import sys\nfrom learner.cluster import start_ray\nstart_ray(sys.argv[1])"
    env = os.environ | {"RAY_AUTH_MODE": "disabled"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, address], env=env, capture_output=True, text=True, check=False)
    assert "LearnerError: " in done.stderr and address in done.stderr, done.stderr
    assert time.monotonic() - began < 30


def test_ranks_meet_stop_and_go_on_where_they_were(cluster, tmp_path):
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=3, steps=10**6)
    learner = learner_of(cluster, run, tables, COUNT)
    status = until(learner.poll, lambda s: s.progress.get("step", 0) > 20)
    assert status.progress["stats"]["size"] == 3 and [r["rank"] for r in status.ranks] == [0, 1, 2]
    assert all(psutil.pid_exists(r["pid"]) for r in status.ranks) and status.pid == status.ranks[0]["pid"]
    assert {r["shard"] for r in status.ranks} == {0}
    began = time.monotonic()
    last = learner.stop()
    print(f"3 ranks stopped in {time.monotonic() - began:.2f} s")
    assert last.done and not last.last_error and time.monotonic() - began < 10
    assert last.progress["step"] == int((run.checkpoints / "count").read_text())
    assert [path.name for path in sorted(run.logs.glob("learner-rank*.log"))] == [f"learner-rank{r}.log" for r in range(3)]
    tables["cluster"].ranks, tables["learner"].steps = 2, last.progress["step"] + 5
    again = learner_of(cluster, run, tables, COUNT)
    end = until(again.poll, lambda s: s.done)
    assert end.progress["stats"] == {"size": 2.0, "began": float(last.progress["step"])}


def test_a_killed_rank_ends_the_others_and_all_start_again(cluster, tmp_path):
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=2, steps=10**6)
    learner = learner_of(cluster, run, tables, COUNT)
    try:
        first = until(learner.poll, lambda s: s.progress.get("step", 0) > 10)
        pids = [r["pid"] for r in first.ranks]
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        step = first.progress["step"]
        back = until(learner.poll, lambda s: s.pid not in (0, pids[0]) and s.progress["stats"]["began"] > 0)
        print(f"rank killed: training again after {time.monotonic() - killed:.2f} s")
        assert back.restarts == 1 and back.progress["stats"]["began"] >= step
        assert "process ended: rank 1" in back.last_error and "closed by peer" not in back.last_error
        until(lambda: pids, lambda all_: all(gone(pid) for pid in all_), 10)
    finally:
        learner.stop()
    until(lambda: back.ranks, lambda ranks: all(gone(r["pid"]) for r in ranks), 10)


def test_a_rank_that_is_stuck_is_named_and_killed(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("learner.cluster.group._SILENT_S", 1.5)
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=2, steps=10**6)
    tables["cluster"].rank_timeout_s = 3.0
    learner = learner_of(cluster, run, tables, COUNT)
    try:
        first = until(learner.poll, lambda s: s.progress.get("step", 0) > 10)
        stuck = first.ranks[1]["pid"]
        os.kill(stuck, signal.SIGSTOP)
        back = until(learner.poll, lambda s: s.restarts)
        assert "rank 1 on" in back.last_error and "does not answer" in back.last_error
        until(lambda: stuck, gone, 2)  # Ray takes 5 s, in which the next learner would find the run locked
    finally:
        learner.stop()


def test_the_first_cause_is_told_and_a_crash_loop_ends(cluster, tmp_path):
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=2)
    (run.path / "raise-1").touch()
    learner = learner_of(cluster, run, tables, rule=RestartRule(max_failures=2, first_s=0.1))
    with pytest.raises(LearnerError, match=r"failed 2 times at or before step 0, last: .*rank 1.*the sky fell") as caught:
        until(learner.poll, lambda s: s.done)
    assert (caught.value.rule, caught.value.remedy) == ("it stays up", "hold it")
    assert learner.status.restarts == 1 and "lost another" not in str(caught.value)
    assert "the sky fell" in (run.logs / "learner-rank1.log").read_text()


def test_an_error_that_a_restart_cannot_help_is_final(cluster, tmp_path):
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=2)
    (run.path / "config-0").touch()
    learner = learner_of(cluster, run, tables)
    with pytest.raises(ConfigError, match=r"learner.seed"):
        until(learner.poll, lambda s: s.done)
    assert learner.status.restarts == 0 and learner.status.done and learner.poll().done
    tables["cluster"].ranks = 40
    with pytest.raises(ConfigError, match=r"cluster.ranks = 40 .* has .*4 CPUs, 0 GPUs"):
        learner_of(cluster, run, tables).poll()


def test_more_ranks_join_when_their_node_is_back(cluster, tmp_path):
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=2, steps=10**6)
    here = cluster.nodes()[0]
    whole = plan([here], tables["cluster"], "cpu")
    small = type(whole)(whole.slots[:1], wanted=2)
    now = [type(whole)((), 2, "nodes that are away: b")]
    learner = cluster.LearnerHandle(tables, lambda: now[0], {here.name: run.path}, grow_after_s=1.5, function=PRETEND)
    try:
        assert until(learner.poll, lambda s: s.waiting).waiting == "nodes that are away: b"
        now[0] = small
        one = until(learner.poll, lambda s: s.progress.get("stats", {}).get("size") == 1 and s.progress["step"] > 10)
        pid, step, now[0] = one.pid, one.progress["step"], whole
        back = time.monotonic()
        two = until(learner.poll, lambda s: s.progress["stats"]["size"] == 2)
        assert time.monotonic() - back >= 1.5 and two.restarts == 0 and two.wanted == 2
        assert two.progress["stats"]["began"] > step and gone(pid)
    finally:
        learner.stop()


def test_ranks_that_have_no_room_yet_are_said_to_wait(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("learner.cluster.group._START_S", 2.0)
    run, tables = make_run(tmp_path / "run"), tables_of(ranks=2)
    other = cluster.Placed("other", SERVE, {}, num_cpus=3)
    until(other.poll, lambda s: s.report)
    learner = learner_of(cluster, run, tables)
    try:
        waiting = until(learner.poll, lambda s: "rank 1" in s.waiting and "rank 0" not in s.waiting).waiting
        assert waiting.startswith("the learner waits for Ray to start rank 1 on ")
        other.stop()
        until(learner.poll, lambda s: s.progress.get("step", 0) > 0)
    finally:
        other.stop()
        learner.stop()


def test_a_worker_that_nobody_asks_ends_itself():
    script = (
        "import sys, time\nfrom learner.cluster import worker\nworker.LEASH_S = 1.0\none = worker.Worker()\n"
        "for _ in range(int(sys.argv[1])):\n    time.sleep(0.25); one.status()\n"
        "print('asked', flush=True); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script, "8"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("asked\n", 1)


def test_a_placed_function_reports_fails_comes_back_and_stops(cluster, tmp_path):
    placed = cluster.Placed(
        "evaluator", SERVE, {"word": "yes", "fail_at": 3}, 0.5, rule=RestartRule(first_s=0.1), output=tmp_path / "out.log"
    )
    status = until(placed.poll, lambda s: s.restarts == 2)
    assert "three is too many" in status.last_error and status.report["word"] == "yes"
    assert "three is too many" in (tmp_path / "out.log").read_text()
    assert placed.stop().done
    steady = cluster.Placed("steady", SERVE, {}, 0.5, node=cluster.nodes()[0], rule=RestartRule(first_s=0.1))
    pid = until(steady.poll, lambda s: s.report).pid
    os.kill(pid, signal.SIGKILL)
    again = until(steady.poll, lambda s: s.pid not in (0, pid))
    assert "process of steady ended" in again.last_error and again.restarts == 1
    last = steady.stop()
    assert last.done and last.report["number"] == -1 and last.pid == 0
    wrong = cluster.Placed("wrong", SERVE, {"wrong": True})
    status = until(wrong.poll, lambda s: s.done)
    assert status.restarts == 0 and "evaluator.every = -1" in status.last_error


def test_launched_processes_are_nobodys_children(cluster, tmp_path):
    here = cluster.nodes()[0]
    log = tmp_path / "deep" / "out.log"
    script = "import os, time; print(os.environ['COLOUR'], flush=True); time.sleep(100)"
    pid = cluster.launch(here, ["python", "-c", script], log, {"COLOUR": "blue"})
    try:
        process = psutil.Process(pid)
        assert process.ppid() == 1 and os.getsid(pid) == pid and cluster.alive(here, pid)
        assert Path(process.cmdline()[0]).resolve() == Path(sys.executable).resolve()
        until(lambda: log.read_text(), lambda text: "blue" in text, 10)
    finally:
        cluster.end(here, pid)
    until(lambda: None, lambda _: gone(pid), 10)
    assert not cluster.alive(here, pid)
    with pytest.raises(LearnerError, match="no_such_program"):
        cluster.launch(here, ["no_such_program"], log)
    with pytest.raises(LearnerError, match="arm-07"):
        cluster.place_on("arm-07", ["python", "-c", ""], log)
