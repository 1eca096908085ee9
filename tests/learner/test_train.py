"""The learner on a real log: what robots sent goes in, releases come out."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import threading
import time
import urllib.request

import pytest
import torch

from algorithms.hg_dagger import HgDagger
from algorithms.policies.registry import build
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from buffer.sampler import Sampler
from fleet.errors import ConfigError, LearnerError, OutOfMemory, RunFolderError
from fleet.journal import read_journal
from fleet.robot import Source
from fleet.server.releases import ReleaseStore
from fleet.spec import Feature, RobotSpec
from learner.checkpoint import Checkpoints
from learner.main import LearnerConfig, PolicyConfig, check_learner_tables
from learner.policy import complete_policy
from learner.skipped import Skipped
from learner.train import train
from tests.buffer.fragments import make_spec, message
from tests.learner_toys import make_run, make_tables

BOOT = "b" * 16


def fill(run, episodes=4, source=Source.DEMO, robot="r1", tasks=("left", "right")):
    """Writes whole episodes of 20 steps on the tasks in turn, as a gateway would."""
    log = Log(run.buffer)
    ingest, spec = Ingest(log), make_spec()
    seq = ingest.admit(robot, BOOT, spec)
    for i in range(episodes):
        seq += 1
        task = tasks[i % len(tasks)]
        fields = message(robot, BOOT, seq, i, 0, [source] * 20, spec=spec, task=task, opened=True, closed=True)
        ingest.offer(robot, *fields)
    ingest.commit()
    log.close()


def run_train(run, tables, stop=lambda: False):
    seen = []
    return train(run, tables, stop=stop, report=seen.append), seen


def test_from_a_log_to_a_release_that_a_robot_can_load(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run)
    progress, seen = run_train(run, make_tables(metrics_port=0))
    store = ReleaseStore(run.releases)
    assert progress.step == 40 and seen[-1].num_steps == 80 and store.manifest(store.newest()).step == 40
    from safetensors.torch import load

    manifest = store.manifest(store.newest())
    assert manifest.policy["spec"] == {
        "reads": {"observation.state": [3]},
        "conditions": {"instruction": [4]},
        "action_dim": 2,
        "horizon": 4,
        "replay": {},
        "density": True,
        "max_delay": 0,
    }
    policy = build(manifest.policy["family"], manifest.policy["config"])
    policy.load_state_dict(load(store.load(store.newest())))
    chunk = policy.act({"observation.state": torch.zeros(1, 3), "instruction": torch.zeros(1, 4)})
    assert chunk.actions_BHA.shape == (1, 4, 2) and torch.isfinite(chunk.actions_BHA).all()
    assert (run.logs / "learner.pid").read_text() == str(os.getpid())
    kinds = [line["kind"] for line in read_journal(run.logs / "learner.jsonl")]
    assert {"update", "published", "checkpoint"} <= set(kinds)  # sampleable: only what comes while it runs


def test_a_resumed_learner_takes_in_what_came_meanwhile(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run)
    run_train(run, make_tables(steps=20))
    fill(run, source=Source.OPERATOR, robot="r2")
    progress, seen = run_train(run, make_tables(steps=40))
    assert progress.step == 40 and seen[-1].num_steps == 160
    assert seen[-1].stats["loss_operator"] > 0
    resumed = [line for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == "resumed"]
    assert [(line["step"], line["passed_over"]) for line in resumed] == [(20, [])]


@pytest.mark.parametrize("engine", [{}, {"micro_batch": 5, "max_grad_norm": 0.1}])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_last_bit(tmp_path, scale, engine):
    """On a log, with an adaptive mixture: the sampler's state, the rate and the optimizer's are as if nothing had been."""

    def tables():
        made = make_tables(engine=engine, steps=30, checkpoint_every=100, prefetch_depth=0)
        made["algorithm"].config["mixture"] = "adaptive"
        return made

    def states(run):
        kept = Checkpoints(run.checkpoints).load(30)
        return {**kept.state, "rate": kept.meta["rate"]}

    straight, cut = make_run(tmp_path / "straight"), make_run(tmp_path / "cut")
    fill(straight)
    fill(straight, source=Source.OPERATOR, robot="r2")
    shutil.copytree(straight.buffer, cut.buffer, dirs_exist_ok=True)
    run_train(straight, tables())
    steps = sorted(random.Random(len(engine)).sample(range(1, 30), 2 * scale))
    for step in steps:
        asked = itertools.count()
        done = Checkpoints(cut.checkpoints).steps()
        before = done[-1] if done else 0
        # Asked once while it waits for data and once an update.
        progress, _ = run_train(cut, tables(), stop=lambda a=asked, n=step - before: next(a) > n)
        assert progress.step == step
    run_train(cut, tables())
    assert_equal_states(states(cut), states(straight), "")


def assert_equal_states(one, other, path):
    if isinstance(one, dict):
        assert set(one) == set(other), path
        for key, value in one.items():
            assert_equal_states(value, other[key], f"{path}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


class Greedy(HgDagger):
    """Asks for more memory than any machine has: ``greed`` is where."""

    name, greed = "greedy", ""

    def __init__(self, policy, config, data):
        self._take("begin")
        super().__init__(policy, config, data)

    def prepare(self, batch):
        self._take("prepare")
        return super().prepare(batch)

    def after_step(self, step, stats):
        self._take("after_step")
        super().after_step(step, stats)

    def load_state_dict(self, state):
        self._take("load")
        super().load_state_dict(state)

    def _take(self, where):
        if self.greed == where:
            torch.empty(1 << 50)


@pytest.mark.parametrize("where", ["begin", "prepare", "after_step", "load"])
def test_out_of_memory_anywhere_names_the_settings_that_help(tmp_path, monkeypatch, where):
    run = make_run(tmp_path / "run")
    fill(run)
    tables = make_tables(start_steps=0)
    tables["algorithm"].name = f"{__name__}:Greedy"
    if where == "load":
        run_train(run, {**tables, "learner": dataclasses.replace(tables["learner"], steps=2)})
    monkeypatch.setattr(Greedy, "greed", where)
    with pytest.raises(OutOfMemory, match=r"rank 0 is out of memory.*engine\.dtype=bfloat16"):
        run_train(run, tables)


def test_the_learner_waits_for_its_first_steps(tmp_path):
    run = make_run(tmp_path / "run")
    stop, seen = threading.Event(), []
    tables = make_tables(min_size_to_sample=60)
    thread = threading.Thread(target=train, args=(run, tables), kwargs={"stop": stop.is_set, "report": seen.append})
    thread.start()
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "min_size_to_sample is 60" in seen[-1].waiting and seen[-1].step == 0
    with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):  # and nobody else may learn meanwhile
        run_train(run, tables)
    fill(run)
    thread.join(30)
    assert not thread.is_alive() and seen[-1].step == 40


def test_what_is_not_trained_on_is_counted_and_said_once(tmp_path, caplog):
    run = make_run(tmp_path / "run")
    fill(run)
    fill(run, robot="r2", tasks=("third", "fourth"))
    (record,) = [r for r in LogReader(run.buffer).poll() if (r.robot_id, r.seq) == ("r1", 4)]
    with record.segment.name.path.open("r+b") as file:
        file.seek(record.payload_at + 100)
        file.write(b"\xff\xff\xff\xff")
    catalogue = run.path / "tasks.json"
    tasks = json.loads(catalogue.read_text())
    progress, seen = run_train(run, make_tables(metrics_port=0))
    assert progress.step == 40 and seen[-1].num_steps == 60
    lines = [line for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == "skipped"]
    assert [line["what"] for line in lines] == ["damaged", "skipped_steps", "skipped_steps"] and len(seen) > 1
    assert "'third'" in lines[1]["why"] and "40 so far" in lines[1]["why"] and "add it to run.tasks" in lines[1]["why"]
    assert [record.message for record in caplog.records] == [line["why"] for line in lines]
    port = json.loads((run.path / "learner.json").read_text())["metrics_port"]
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert "fleet_learner_skipped_steps_total 80.0" in metrics and "fleet_learner_damaged_total 1.0" in metrics
    assert "fleet_learner_skipped_fragments_total 0.0" in metrics

    sampler = Sampler(run.buffer, list(tasks), 0)
    catalogue.write_text(json.dumps({**tasks, "third": {}}))
    sampler.poll()
    said = []
    counts = Skipped(sampler, catalogue, lambda kind, **fields: said.append(fields["why"])).look()
    assert counts == {"damaged": 1, "skipped_fragments": 0, "skipped_steps": 80}
    assert "came to tasks.json after the learner began; stop the run" in said[1] and "not in tasks.json" in said[2]
    sampler.close()


def test_stop_before_there_is_data(tmp_path):
    run = make_run(tmp_path / "run")
    progress, _ = run_train(run, make_tables(), stop=lambda: True)
    assert progress.step == 0 and Checkpoints(run.checkpoints).steps() == []


@pytest.mark.parametrize(
    ("table", "change", "match"),
    [
        ("algorithm", {"name": "hg_daggr"}, "hg_daggr.*did you mean 'hg_dagger'"),
        ("algorithm", {"config": {"batchsize": 3}}, "batchsize.*did you mean 'batch_size'"),
        ("algorithm", {"config": {"batch_size": "many"}}, "algorithm.config.batch_size = 'many'.*int"),
        ("algorithm", {"config": {"batch_size": True}}, "algorithm.config.batch_size = True"),
        ("algorithm", {"name": "bc", "config": {"sources": "demo"}}, "sources = 'demo' is a str.*it is a list of str"),
        ("algorithm", {"name": "bc", "config": {"sources": ["demo", 3]}}, "it is a list of str"),
        ("algorithm", {"name": "bc", "config": {"shares": [0.5, True]}}, "it is a list of float"),
        ("start", {"name": "bcc"}, "bcc.*did you mean 'bc'"),
        ("policy", {"family": "mpl"}, "mpl.*did you mean 'mlp'"),
        ("policy", {"config": {"hrizon": 3}}, "hrizon.*did you mean 'horizon'"),
        ("policy", {"config": {"horizon": 3.5}}, "policy.config.horizon = 3.5"),
        ("policy", {"config": {"width": 0}}, "'width': 0.*'mlp'.*at least 1"),
        ("policy", {"family": "flow", "config": {"num_steps": 0}}, "'num_steps': 0.*'flow'.*at least 1"),
        ("policy", {"family": "flow", "config": {"max_delay": 8}}, "max_delay < horizon"),
        ("policy", {"family": "flow", "config": {"noise_std": 0.1}}, "'noise_std': 0.1.*no len"),
        ("policy", {"family": "small_vla", "config": {"num_heads": 3}}, "num_heads divides width"),
        ("policy", {"family": "token", "config": {"decoding": "serial"}}, "'serial'.*one of"),
    ],
)
def test_wrong_tables_name_the_nearest_known_word(table, change, match):
    tables = make_tables()
    check_learner_tables(tables)
    for name, value in change.items():
        setattr(tables[table], name, value)
    with pytest.raises(ConfigError) as caught:
        check_learner_tables(tables)
    import re

    assert re.search(match, str(caught.value))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"start_steps": 9000},
        {"device": "gpu"},
        {"publish_every": 0},
        {"keep_checkpoints": 1},
        {"error_buffer": 0},
        {"samples_per_insert": -1},
        {"metrics_port": 70000},
    ],
)
def test_settings_out_of_range_are_refused(change):
    LearnerConfig().check()
    with pytest.raises(ConfigError, match=rf"learner\.{next(iter(change))} = "):
        LearnerConfig(**change).check()


def test_robots_that_share_no_action_or_observation_are_refused():
    def spec(**features):
        return RobotSpec("toy", 20, {"action": Feature("float32", (2,)), **features})

    arm = spec(**{"observation.state": Feature("float32", (3,)), "observation.images.top": Feature("uint8", (8, 8, 3))})
    other = spec(**{"observation.state": Feature("float32", (3,)), "observation.force": Feature("float32", (1,))})
    made = complete_policy(PolicyConfig("mlp", {"horizon": 2}), [arm, other], 16)
    assert made["config"] == {"reads": {"observation.state": [3]}, "action_dim": 2, "instruction_dim": 16, "horizon": 2}
    assert complete_policy(PolicyConfig("mlp", {"instruction_dim": 0}), [arm], 16)["config"]["instruction_dim"] == 0
    with pytest.raises(LearnerError, match=r"actions of \[2, 4\]"):
        complete_policy(PolicyConfig(), [arm, RobotSpec("toy", 20, {"action": Feature("float32", (4,))})], 16)
    with pytest.raises(LearnerError, match="no observation"):
        complete_policy(PolicyConfig(), [spec(**{"observation.images.top": Feature("uint8", (8, 8, 3))})], 16)
