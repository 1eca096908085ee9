"""Evaluator and simulator where the driver puts them: in processes of a real Ray, which are killed."""

import os
import signal
import time

import psutil
import pytest

from fleet.journal import read_journal
from infra.enroll import enroll
from infra.results import newest_tested, read_results
from infra.supervisor import Supervisor
from infra.up import start_gateway
from learner.cluster import Placed, nodes, start_ray, stop_ray
from tests.infra.test_evaluator import make_run, publish


@pytest.fixture(scope="module", autouse=True)
def ray_here(tmp_path_factory):
    start_ray(token=tmp_path_factory.mktemp("ray") / "token", num_cpus=2)
    yield
    stop_ray()


@pytest.fixture
def place():
    placed = []

    def start(*arguments, **options):
        placed.append(Placed(*arguments, node=nodes()[0], **options))
        return placed[-1]

    yield start
    for one in placed:
        one.stop()


def until(condition, placed, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        status = placed.poll()
        assert time.monotonic() < deadline, status
        time.sleep(0.05)


@pytest.mark.timeout(150)
def test_an_evaluator_is_killed_and_tests_the_next_release(tmp_path, place):
    run = make_run(tmp_path / "run")
    publish(run)
    evaluator = place("evaluator", "infra.evaluator:serve", {"run_path": str(run.path)}, 0.0)
    until(lambda: evaluator.status.report.get("tested") == 1, evaluator)
    pid = evaluator.status.report["pid"]
    # Linux keeps a priority a thread: those that answer Ray keep theirs.
    assert 10 in {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(pid).threads()}
    os.kill(pid, signal.SIGKILL)
    publish(run)
    until(lambda: evaluator.status.report.get("tested") == 2, evaluator)
    assert evaluator.status.restarts == 1 and evaluator.status.report["pid"] != pid
    assert newest_tested(run, "continual") == 2 and len(read_results(run)) == 4
    evaluator.stop()
    until(lambda: not psutil.pid_exists(evaluator.status.report["pid"]), evaluator, 10)


@pytest.mark.timeout(90)
def test_an_evaluator_without_a_simulator_is_not_started_again_and_again(tmp_path, place):
    run = make_run(tmp_path / "run", robot="tests.infra.odd_robots:Unmarked")
    publish(run)
    evaluator = place("evaluator", "infra.evaluator:serve", {"run_path": str(run.path)}, 0.0)
    until(lambda: evaluator.status.done, evaluator)
    assert "does not say that it is simulated" in evaluator.status.last_error and evaluator.status.restarts == 0


@pytest.mark.timeout(150)
def test_a_simulator_is_killed_and_its_robot_comes_back(tmp_path, place):
    run = make_run(tmp_path / "run")
    run.config.write_text(run.config.read_text() + "registry: {url: 'unix:///nowhere'}\ngateway: {bind: 'tcp://127.0.0.1:0'}\n")
    supervisor = Supervisor()
    start_gateway(run, supervisor)
    try:
        shows = {"adapter": "scripted", "settings": {"expert": "toy", "mode": "demonstrate"}}
        file = enroll(run.path, "sim-00", tmp_path / "sim-00.yaml", "", {"operator": shows, "actor": {"demonstrate": True}})
        folder = {"credentials": file.read_text(), "folder": str(tmp_path / "home")}
        simulator = place("sim-00", "infra.simulator:serve", folder, 0.0)

        def boots():
            return {line["boot"] for line in read_journal(run.logs / "gateway.jsonl") if line["kind"] == "durable"}

        until(lambda: len(boots()) == 1, simulator)
        os.kill(simulator.status.pid, signal.SIGKILL)
        until(lambda: len(boots()) == 2, simulator)
        assert simulator.status.restarts == 1 and simulator.status.report["robot"] == "sim-00"
        simulator.stop(20)
        assert not psutil.pid_exists(simulator.status.report["pid"])
    finally:
        supervisor.stop()
