"""Every process of a run is killed with -9 while it trains: what goes on meanwhile, and how soon training does."""

import json
import random
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.up import DRIVER
from tests.faults.toy_run import ToyRun, acknowledged, table

CHECKPOINT_EVERY, SEED = 50, 6


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    run = ToyRun(tmp_path_factory.mktemp("runs"))
    try:
        run.start()
        yield run
    finally:
        run.local.stop()


@pytest.mark.timeout(120)
def test_a_rank_is_killed_and_nobody_else_notices(toy_run, tell):
    toy_run.until(lambda: toy_run.status.get("step", 0) > 160, 90)
    lost, driver = toy_run.num_lost_robots(), toy_run.child(DRIVER).last_pid
    recovery = toy_run.kill("rank")
    assert len(toy_run.lines("learner", "resumed")) == 1 and recovery.steps_lost <= 2 * CHECKPOINT_EVERY
    assert recovery.acknowledged > 0 and toy_run.status["restarts"] == 1
    assert toy_run.child(DRIVER).last_pid == driver
    assert all(child.num_restarts == 0 for child in toy_run.robots) and toy_run.num_lost_robots() == lost
    tell(table([recovery]))


@pytest.mark.timeout(240)
def test_ray_and_the_driver_are_killed_and_ingest_goes_on_without_them(toy_run, tell):
    lost, gateway = toy_run.num_lost_robots(), toy_run.child("gateway").last_pid
    recoveries = []
    for victim in (DRIVER, "ray"):
        driver = toy_run.child(DRIVER).last_pid
        recoveries.append(toy_run.kill(victim))
        assert toy_run.child(DRIVER).last_pid != driver
        assert recoveries[-1].acknowledged > 0 and recoveries[-1].steps_lost <= 2 * CHECKPOINT_EVERY
    assert toy_run.local.failure is None and toy_run.child("gateway").last_pid == gateway
    assert all(child.num_restarts == 0 for child in toy_run.robots) and toy_run.num_lost_robots() == lost
    tell(table(recoveries))


@pytest.mark.timeout(120)
def test_gateway_and_registry_are_killed_and_the_learner_goes_on(toy_run, tell):
    rank, driver = toy_run.pids("rank"), toy_run.child(DRIVER).last_pid
    recoveries = [toy_run.kill(victim) for victim in ("registry", "gateway")]
    assert toy_run.pids("rank") == rank and toy_run.child(DRIVER).last_pid == driver
    assert all(recovery.steps_lost == 0 for recovery in recoveries)
    assert all(child.num_restarts == 0 for child in toy_run.robots)
    tell(table(recoveries))


@pytest.mark.timeout(120)
def test_a_robot_is_killed_and_comes_back_alone(toy_run):
    victim, other = toy_run.robots
    other_steps, boots = (
        toy_run.facts.robots[other.name].steps,
        {b for r, b, _ in acknowledged(toy_run.run.path) if r == victim.name},
    )
    toy_run.kill(victim.name)
    toy_run.until(lambda: {b for r, b, _ in acknowledged(toy_run.run.path) if r == victim.name} - boots, 60)
    assert victim.num_restarts == 1 and other.num_restarts == 0
    toy_run.until(lambda: toy_run.facts.robots[other.name].steps > other_steps, 30)


def scrape(path):
    """All samples of a Prometheus endpoint whose port is in a file of the run: (name, labels) -> value."""
    port = json.loads(path.read_text())["metrics_port"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, *sorted(s.labels.values())): s.value for s in samples}


@pytest.mark.timeout(60)
def test_prometheus_endpoints_tell_what_the_journals_tell(toy_run):
    toy_run.until(lambda: toy_run.status.get("pid"), 30)
    toy_run.until(lambda: scrape(toy_run.run.path / "gateway.json")["fleet_robots_live",] == 2, 30)
    gateway, learner = scrape(toy_run.run.path / "gateway.json"), scrape(toy_run.run.path / "learner.json")
    assert sum(v for k, v in gateway.items() if k[0] == "fleet_steps_ingested_total" and "sim-00" in k) > 0
    for name in ("fleet_robot_version_lag", "fleet_robot_spool_depth", "fleet_robot_last_seen_seconds"):
        assert any(key[0] == name and "sim-01" in key for key in gateway)
    assert gateway["fleet_durable_latency_seconds_count",] > 0 and gateway["fleet_loaded_latency_seconds_count",] > 0
    assert any(key[0] == "fleet_episodes_total" and "reach" in key for key in gateway)
    assert learner["fleet_learner_updates_total",] > 0 and learner["fleet_learner_updates_rate",] > 0
    assert 0 < learner["fleet_learner_loss",] < 10
    assert learner["fleet_sampleable_latency_seconds_count",] > 0
    assert learner["fleet_buffer_steps", "demo"] > 50
    assert 0 <= learner["fleet_learner_batches_ready",] <= 2 and learner["fleet_learner_undecodable_total",] == 0
    assert learner["fleet_learner_seconds_total", "sample"] > 0


@pytest.mark.timeout(1500)
def test_kill_after_kill_of_whoever_chance_names(toy_run, scale, tell):
    robots = [child.name for child in toy_run.robots]
    victims = ["rank", "gateway", "registry", *robots, *([DRIVER, "raylet"] if scale >= 10 else [])]  # Ray starts take long
    chance, recoveries = random.Random(SEED), []
    for _ in range(2 * scale):
        recoveries.append(toy_run.kill(chance.choice(victims), timeout_s=120))
        toy_run.until(lambda: True, 1)
    assert toy_run.local.failure is None
    assert max(recovery.steps_lost for recovery in recoveries) <= 2 * CHECKPOINT_EVERY
    tell(table(recoveries))


@pytest.mark.timeout(60)
def test_after_all_kills_every_acknowledged_fragment_is_there_exactly_once(toy_run):
    toy_run.check_that_nothing_was_lost()
