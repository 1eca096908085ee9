"""A whole run - gateway, registry, learner in Ray, robots - in which the learner and the gateway are killed with -9."""

import collections
import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from buffer.reader import LogReader
from fleet.journal import read_journal
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from infra.follow import RunFacts
from infra.run_config import load_tables
from infra.sim import fleet_children, sim_child
from infra.up import LocalRun, write_run_file

TOY = Path(__file__).parents[2] / "examples" / "toy.yaml"
QUICK = [
    "learner.min_size_to_sample=50",
    "learner.start_steps=100",
    "learner.checkpoint_every=50",
    "learner.publish_every=25",
    "learner.samples_per_insert=256",
]


class ToyRun:
    """A toy run with some demonstrations and two robots; ``until`` keeps it alive while waiting."""

    def __init__(self, path):
        tables = load_tables(TOY, QUICK)
        self.run = RunFolder.create(path)
        write_run_file(self.run, tables)
        self.local = LocalRun(self.run, tables)
        self.facts = RunFacts(self.run)
        self.status = {}

    def start(self):
        self.local.start()
        changes = {
            "operator": {"settings": {**self.local.tables["operator"].settings, "mode": "demonstrate"}},
            "actor": {"demonstrate": True, "realtime": False, "num_episodes": 8},
        }
        teacher = sim_child(self.run, "teacher", changes, [], once=True)
        self.local.supervisor.add(teacher)
        self.local.start_learner(hold=True)
        self.until(lambda: teacher.done, 60)
        self.local.let_learner_begin()
        self.until(lambda: ReleaseStore(self.run.releases).newest(), 90)
        self.robots = fleet_children(self.run, 2, [])
        for child in self.robots:
            self.local.supervisor.add(child)
        self.until(lambda: len(self.working()) == 2, 60)

    def working(self):
        """Robots that have recorded steps."""
        return [robot for robot, facts in self.facts.robots.items() if robot.startswith("sim-") and facts.steps > 20]

    def until(self, condition, timeout_s):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.status
            self.status = self.local.poll()
            self.facts.update()
            time.sleep(0.1)

    def durable(self):
        """Every (robot, boot, seq) that was acknowledged."""
        lines = read_journal(self.run.logs / "gateway.jsonl")
        return [(line["robot"], line["boot"], line["seq"]) for line in lines if line["kind"] == "durable"]

    def stored(self):
        reader = LogReader(self.run.buffer)
        keys = [(r.robot_id, r.boot_id, r.seq) for r in reader.poll()]
        reader.close()
        return keys


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    run = ToyRun(tmp_path_factory.mktemp("runs") / "toy")
    try:
        run.start()
        yield run
    finally:
        run.local.stop()


@pytest.mark.timeout(240)
def test_the_learner_is_killed_and_nobody_else_notices(toy_run):
    toy_run.until(lambda: toy_run.status.get("step", 0) > 160, 90)
    pid, step, steps = toy_run.status["pid"], toy_run.status["step"], toy_run.facts.steps
    lost = sum(line["event"] == "lost" for line in read_journal(toy_run.run.logs / "gateway.jsonl") if line["kind"] == "member")
    os.kill(pid, signal.SIGKILL)
    toy_run.until(lambda: toy_run.status["restarts"] == 1, 30)
    assert toy_run.facts.steps > steps or toy_run.until(lambda: toy_run.facts.steps > steps, 5) is None
    toy_run.until(lambda: toy_run.status["step"] > step + 25 and toy_run.status["pid"] not in (0, pid), 90)
    resumed = [line for line in read_journal(toy_run.run.logs / "learner.jsonl") if line["kind"] == "resumed"]
    assert len(resumed) == 1 and step - 100 <= resumed[0]["step"] <= step + 50
    versions = ReleaseStore(toy_run.run.releases).versions()
    steps_of = [ReleaseStore(toy_run.run.releases).manifest(v).step for v in versions]
    assert steps_of == sorted(steps_of)  # nobody was told that older weights are newer
    assert all(child.num_restarts == 0 for child in toy_run.robots)
    still = sum(
        line["event"] == "lost" for line in read_journal(toy_run.run.logs / "gateway.jsonl") if line["kind"] == "member"
    )
    assert still == lost


@pytest.mark.timeout(120)
def test_the_gateway_is_killed_and_robots_deliver_what_they_kept(toy_run):
    gateway = toy_run.local.supervisor.children["gateway"]
    before = toy_run.facts.steps
    os.kill(gateway.process.pid, signal.SIGKILL)
    toy_run.until(lambda: gateway.num_restarts == 1 and gateway.running, 30)
    toy_run.until(lambda: toy_run.facts.steps > before + 100, 60)
    assert all(child.num_restarts == 0 for child in toy_run.robots)


@pytest.mark.timeout(120)
def test_a_robot_is_killed_and_comes_back_alone(toy_run):
    victim, other = toy_run.robots
    os.kill(victim.process.pid, signal.SIGKILL)
    other_steps = toy_run.facts.robots[other.name].steps
    boots = {boot for robot, boot, _ in toy_run.durable() if robot == victim.name}
    toy_run.until(lambda: {b for r, b, _ in toy_run.durable() if r == victim.name} - boots, 60)
    assert victim.num_restarts == 1 and other.num_restarts == 0
    assert toy_run.facts.robots[other.name].steps > other_steps


def scrape(path):
    """All samples of a Prometheus endpoint whose port is in a file of the run: (name, labels) -> value."""
    port = json.loads(path.read_text())["metrics_port"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, *sorted(s.labels.values())): s.value for s in samples}


@pytest.mark.timeout(60)
def test_prometheus_endpoints_tell_what_the_journals_tell(toy_run):
    toy_run.until(lambda: toy_run.status.get("pid"), 30)
    gateway, learner = scrape(toy_run.run.path / "gateway.json"), scrape(toy_run.run.path / "learner.json")
    assert gateway["fleet_robots_live",] == 2
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
    assert learner["fleet_learner_data_wait_seconds_total",] > 0


@pytest.mark.timeout(60)
def test_after_all_kills_every_acknowledged_fragment_is_there_exactly_once(toy_run):
    toy_run.local.supervisor.stop([child.name for child in toy_run.robots])
    acknowledged, stored = toy_run.durable(), toy_run.stored()
    assert len(acknowledged) > 50
    assert set(acknowledged) <= set(stored)
    assert max(collections.Counter(stored).values()) == 1
    by_boot = collections.defaultdict(list)
    for robot, boot, seq in stored:
        by_boot[robot, boot].append(seq)
    assert all(seqs == list(range(1, len(seqs) + 1)) for seqs in by_boot.values())
