"""The evaluator on a run folder with releases in it, as a thread of this process or as a process that is killed."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save

from algorithms.policies.registry import build, describe
from fleet.config import load_run
from fleet.errors import ConfigError, RobotError, StorageError
from fleet.identity import create_run_keys
from fleet.journal import read_journal
from fleet.runfolder import RunFolder
from fleet.seeds import CONTINUAL, HELD_OUT, held_out_seeds
from fleet.server.releases import ReleaseStore
from fleet.spec import STATE
from infra.evaluator import EvaluatorConfig, due, serve
from infra.results import add_results, newest_tested, read_results, results_file, success_rate
from infra.run_config import load_tables, write_catalogue
from tests.command_line import ENV, ROOT

RUN_FILE = """
run: {{tasks: {{reach: reach the target, mirror: reach its mirror image}}}}
robot: {{adapter: {robot}, settings: {{max_steps: 20}}}}
evaluator: {{every: {every}, episodes: 3{more}}}
"""
SERVE = """
import sys
from infra.evaluator import serve
serve(run_path=sys.argv[1], stop=lambda: False, report=lambda facts: print(facts.get("episodes_done"), flush=True))
"""


def make_run(path, *, robot="toy", every=1, more=""):
    run = RunFolder.create(path)
    run.config.write_text(RUN_FILE.format(robot=robot, every=every, more=more))
    write_catalogue(run, load_tables(run.config, [])["run"])
    create_run_keys(run.keys)
    return run


def publish(run, num=1):
    """Releases of an untrained policy; each differs from the one before."""
    store = ReleaseStore(run.releases, run.keys)
    for _ in range(num):
        policy = build("mlp", {"reads": {STATE: [6]}, "action_dim": 2, "horizon": 4, "width": 8})
        weights = save({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        step = (store.newest() or 0) * 10
        store.publish(weights, algorithm="hg_dagger", step=step, metrics={}, policy=describe(policy))
    return store


class Running:
    """An evaluator on a thread, and what it reported."""

    def __init__(self, run):
        self.run, self.told, self.error, self._stop = run, [], None, threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self):
        try:
            serve(run_path=str(self.run.path), stop=self._stop.is_set, report=self.told.append)
        except Exception as error:
            self.error = error

    def until(self, condition, timeout_s=30):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.error is None and time.monotonic() < deadline, (self.error, self.told[-1:])
            time.sleep(0.02)

    def until_tested(self, version):
        self.until(lambda: newest_tested(self.run, "continual") == version)
        self.until(lambda: self.told[-1]["state"] == "waiting")

    def stop(self):
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def started():
    running = []

    def start(run):
        running.append(Running(run))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.mark.parametrize(
    ("newest", "tested", "every", "finished", "plan"),
    [
        (None, None, 1, False, None),
        (1, None, 5, False, (1, 0)),  # the first one shows where the curve begins
        (5, 5, 1, True, None),
        (6, 5, 1, False, (6, 0)),
        (9, 5, 1, False, (9, 3)),
        (9, 5, 5, False, None),
        (9, 5, 5, True, (9, 0)),  # nothing newer will come
        (10, 5, 5, False, (10, 0)),
        (17, 5, 5, False, (17, 2)),  # 10 and 15 were due
        (3, 5, 1, False, None),  # somebody removed releases
    ],
)
def test_which_release_is_due(newest, tested, every, finished, plan):
    assert due(newest, tested, every, finished) == plan


def test_follows_the_releases_and_keeps_results(tmp_path, started):
    run = make_run(tmp_path / "run", every=2)
    publish(run)
    evaluator = started(run)
    evaluator.until_tested(1)
    publish(run)  # not due
    publish(run, 4)  # 3 and 5 were due, or 6 alone if it is seen at once
    evaluator.until_tested(6)
    (run.path / "learner-status.json").write_text(json.dumps({"state": "finished"}))
    publish(run)
    evaluator.until_tested(7)

    rows = read_results(run)
    assert {(row["label"], row["task"], row["episodes"]) for row in rows} == {
        ("continual", "reach", 3),
        ("continual", "mirror", 3),
    }
    journal = [line for line in read_journal(run.logs / "evaluator.jsonl") if line["kind"] == "evaluated"]
    versions = [line["version"] for line in journal]
    steps = [later - earlier for earlier, later in itertools.pairwise(versions)]
    assert versions[0] == 1 and versions[-1] == 7 and min(steps[:-1]) >= 2
    assert sorted({row["version"] for row in rows}) == versions
    assert sum(line["skipped"] for line in journal) == sum((step - 1) // 2 for step in steps)
    assert evaluator.told[-1]["tested"] == 7 and evaluator.told[-1]["pid"] == os.getpid()
    assert {facts["episodes_done"] for facts in evaluator.told if facts["state"] == "testing"} == set(range(7))

    facts = json.loads((run.path / "evaluator.json").read_text())
    text = urllib.request.urlopen(f"http://127.0.0.1:{facts['metrics_port']}/metrics", timeout=5).read().decode()
    samples = {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    rate = {row["task"]: row["successes"] / 3 for row in rows if row["version"] == 7}
    assert samples["fleet_evaluation_release",] == 7 and samples["fleet_evaluation_duration_seconds",] > 0
    for task in ("reach", "mirror"):
        low, high = (samples[f"fleet_evaluation_success_{end}", task] for end in ("low", "high"))
        assert low <= samples["fleet_evaluation_success", task] == rate[task] <= high < 1


def test_the_starts_are_those_of_continual_evaluation(tmp_path, monkeypatch, started):
    """Neither those that training may see nor those on which claims are made."""
    seen = []
    monkeypatch.setattr("actors.robots.toy.ToyRobot.reset", _record(seen))
    run = make_run(tmp_path / "run")
    publish(run)
    started(run).until_tested(1)
    assert seen[3:] == held_out_seeds(3, first=CONTINUAL) * 2 and all(seed in HELD_OUT for seed in seen)


def _record(seen):
    from actors.robots.toy import ToyRobot

    real = ToyRobot.reset

    def reset(self, task, seed):
        seen.append(seed)
        return real(self, task, seed)

    return reset


def evaluator_process(run):
    command = [sys.executable, "-c", SERVE, str(run.path)]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(240)
def test_killed_in_the_middle_it_leaves_no_half_result_and_tests_that_release_again(tmp_path):
    run = make_run(tmp_path / "run", robot="tests.infra.odd_robots:Slow", more=", workers: 2")
    publish(run)
    add_results(run, 1, 1, "final", {"reach": (5, 5)})
    kept = read_results(run)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(run.path)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True
    )
    until_line(process, "0")
    deadline = time.monotonic() + 30
    while len(workers := [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert psutil.Process(process.pid).nice() == 10 and all(worker.nice() == 10 for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(workers, timeout=90)  # they may have just been started, and load torch first
    assert not any(worker.is_running() for worker in workers)  # they do not stay behind
    assert read_results(run) == kept

    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(run.path)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True
    )
    until_line(process, "6")
    while newest_tested(run, "continual") is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [(row["version"], row["label"], row["task"]) for row in read_results(run)] == [
        (1, "final", "reach"),
        (1, "continual", "reach"),
        (1, "continual", "mirror"),
    ]


def until_line(process, wanted):
    for line in process.stdout:
        if line.strip() == wanted:
            return
    raise AssertionError(f"ended with {process.wait()} before {wanted!r}")


def test_a_release_that_is_gone_or_damaged_is_passed_over(tmp_path, started):
    run = make_run(tmp_path / "run")
    store = publish(run)
    for chunk in (run.releases / "chunks").iterdir():
        chunk.write_bytes(b"cut")
    evaluator = started(run)
    evaluator.until(lambda: any(line["kind"] == "evaluation_skipped" for line in read_journal(run.logs / "evaluator.jsonl")))
    time.sleep(1.2)  # it looks again every half second
    assert [line["kind"] for line in read_journal(run.logs / "evaluator.jsonl")] == ["evaluation_skipped"]
    assert read_results(run) == []
    publish(run)
    evaluator.until_tested(2)
    assert store.newest() == 2


@pytest.mark.parametrize(
    ("robot", "error", "said"),
    [
        ("tests.infra.odd_robots:Unmarked", ConfigError, "does not say that it is simulated"),
        ("gym", ConfigError, "evaluator.adapter"),
        ("tests.infra.odd_robots:Unseeded", RobotError, "differently from one seed"),
        ("tests.infra.odd_robots:Speechless", RobotError, "cannot judge"),
    ],
)
def test_a_robot_that_cannot_be_simulated_is_refused(tmp_path, robot, error, said):
    run = make_run(tmp_path / "run", robot=robot)
    publish(run)
    with pytest.raises(error, match=said):
        serve(run_path=str(run.path), stop=lambda: False, report=lambda facts: None)
    failed = [line for line in read_journal(run.logs / "evaluator.jsonl") if line["kind"] == "evaluator_failed"]
    assert len(failed) == 1 and failed[0]["code"] == error.code and said in json.dumps(failed[0])
    assert read_results(run) == []


def test_another_simulator_than_the_runs_robot(tmp_path, started):
    more = ", adapter: 'tests.infra.odd_robots:Endless', settings: {control_hz: 10}, max_steps: 7"
    run = make_run(tmp_path / "run", robot="tests.infra.odd_robots:Unmarked", more=more)
    publish(run)
    started(run).until_tested(1)
    assert success_rate(run, "continual")[0] == 0


def _add(path, label, num, together):
    run = RunFolder.open(path)
    together.wait(60)
    for version in range(1, num + 1):
        add_results(run, version, version, label, {"reach": (10, version % 10), "mirror": (10, 0)})


def test_results_of_several_writers_are_all_kept(tmp_path, scale):
    """The evaluator, `fleet eval` and somebody who reads, all at once."""
    run, num = RunFolder.create(tmp_path / "run"), 20 * scale
    context = multiprocessing.get_context("spawn")
    labels, together = ("continual", "release", "start"), context.Barrier(3)
    writers = [context.Process(target=_add, args=(run.path, label, num, together)) for label in labels]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        rows = read_results(run)  # never a torn file
        assert len(rows) % 2 == 0  # never one task of a release without the other
        time.sleep(0.002)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    keys = [(row["label"], row["version"], row["task"]) for row in read_results(run)]
    assert len(keys) == len(set(keys)) == 3 * num * 2
    assert success_rate(run, "continual", 7)[0] == 0.35 and newest_tested(run, "start") == num


def test_a_damaged_file_of_results_is_not_overwritten(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    add_results(run, 1, 1, "continual", {"reach": (10, 5)})
    results_file(run).write_text(results_file(run).read_text()[:-5])
    before = results_file(run).read_bytes()
    with pytest.raises(StorageError, match="damaged"):
        add_results(run, 2, 2, "continual", {"reach": (10, 6)})
    assert results_file(run).read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("every", -1),
        ("episodes", 0),
        ("episodes", 1001),
        ("workers", 0),
        ("num_cpus", -1),
        ("max_steps", 0),
        ("metrics_port", 70000),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"evaluator.{key}"):
        load_run(None, {"evaluator": EvaluatorConfig}, [f"evaluator.{key}={value}"])


def test_settings_need_their_adapter():
    with pytest.raises(ConfigError, match=r"evaluator\.settings"):
        load_run(None, {"evaluator": EvaluatorConfig}, ["evaluator.settings={max_steps: 20}"])
