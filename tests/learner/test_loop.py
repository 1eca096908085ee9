import json
import threading
import time

import pytest
import torch
from safetensors.torch import load

from fleet.errors import DiskFull, LearnerError
from fleet.journal import read_journal
from fleet.server.releases import ReleaseStore
from learner.background import Background
from learner.checkpoint import Checkpoints
from tests.learner_toys import (
    BrokenSource,
    MemorySource,
    make_run,
    make_tables,
    make_toy_loop,
    state_of,
    train_toy,
)


def journal_of(run, kind):
    return [line for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == kind]


def run_until_it_waits(loop):
    """Runs the loop; returns what it waited for."""
    seen = []

    def stop():
        seen.extend([loop.progress.waiting] * bool(loop.progress.waiting))
        return bool(seen)

    loop.run(stop)
    return seen[0]


def test_a_run_learns_publishes_and_checkpoints(tmp_path):
    run = make_run(tmp_path / "run")
    tables = make_tables(steps=300, start_steps=100, publish_every=50, checkpoint_every=100)
    tables["algorithm"].config |= {"start_learning_rate": 0.01, "learning_rate": 0.01}
    loop = train_toy(run, tables)
    store = ReleaseStore(run.releases)
    # Nothing before the start's end, then every 50 steps. Releases may skip when the disk is slow, the last one never.
    published = [(m.version, m.step) for m in map(store.manifest, store.versions())]
    assert published[0][1] == 100 and published[-1][1] == 300 and {s for _, s in published} <= {100, 150, 200, 250, 300}
    assert [v for v, _ in published] == list(range(1, len(published) + 1))
    assert [p["version"] for p in journal_of(run, "published")] == [v for v, _ in published]
    assert journal_of(run, "checkpoint")[-1]["step"] == 300
    assert loop.progress.stats["loss"] < 0.25 and loop.progress.release == published[-1][0]


def test_a_release_is_what_acts(tmp_path):
    from algorithms.policies.registry import build

    run = make_run(tmp_path / "run")
    loop = train_toy(run, make_tables())
    store = ReleaseStore(run.releases)
    manifest = store.manifest(store.newest())
    weights = load(store.load(store.newest()))
    acting = loop._algorithm.acting().state_dict()
    assert set(weights) == set(acting) and all(torch.equal(weights[n], acting[n]) for n in acting)
    policy = build(manifest.policy["family"], manifest.policy["config"])
    policy.load_state_dict(weights)
    assert manifest.policy["spec"]["reads"] == {"observation.state": [3]} and manifest.policy["spec"]["action_dim"] == 2
    assert manifest.algorithm == "hg_dagger" and manifest.metrics["loss"] == pytest.approx(loop.progress.stats["loss"])
    # Observations are normalised by the data's own statistics, which travel with the weights.
    assert weights["normaliser.std_S"].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.1)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first = state_of(train_toy(make_run(tmp_path / "a"), make_tables()))
    second = state_of(train_toy(make_run(tmp_path / "b"), make_tables()))
    other = state_of(train_toy(make_run(tmp_path / "c"), make_tables(seed=1)))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_the_start_hands_its_weights_to_the_online_algorithm(tmp_path):
    run = make_run(tmp_path / "run")
    tables = make_tables(steps=20, start_steps=10)
    tables["start"].name, tables["start"].config = "bc", {"batch_size": 16, "learning_rate": 0.01}
    tables["algorithm"].config = {"batch_size": 16, "learning_rate": 0.003, "start_steps": 0}
    loop = make_toy_loop(run, tables, MemorySource(500))
    seen = []
    enter = loop._enter

    def watched(phase):
        before = state_of(loop) if loop._algorithm else {}
        enter(phase)
        rate = loop._engine.state()["policy"]["groups"][0]["lr"]
        seen.append((loop.progress.phase, loop.progress.algorithm, loop.progress.step, rate, before, state_of(loop)))

    loop._enter = watched
    loop.run(lambda: False)
    assert [s[:4] for s in seen] == [("start", "bc", 0, 0.01), ("online", "hg_dagger", 10, 0.003)]
    _, _, _, _, before, after = seen[1]
    weights = [n for n in before if n.startswith("parts/")]
    assert weights and all(torch.equal(before[n], after[n]) for n in weights)
    assert any(n.startswith("optimizers/") for n in before) and not any("exp_avg" in n for n in after)
    assert ReleaseStore(run.releases).manifest(1).algorithm == "bc"


def test_new_modules_of_a_phase_begin_alike_whatever_went_before(tmp_path):
    def tables():
        made = make_tables(steps=16, start_steps=10, checkpoint_every=100)
        made["policy"].family, made["policy"].config = "tests.learner_toys:LinearPolicy", {}
        for table, rate in (("start", 0.01), ("algorithm", 0.02)):  # each has a critic of its own, and draws for dropout
            made[table].name, made[table].config = "tests.learner_toys:Pair", {"learning_rate": rate}
        return made

    straight = state_of(train_toy(make_run(tmp_path / "straight"), tables()))
    run = make_run(tmp_path / "cut")
    loop = make_toy_loop(run, tables(), MemorySource(1000))
    enter = loop._enter
    loop._enter = lambda phase: enter(phase) if phase == 0 else None  # stopped before the second phase begins
    loop.run(lambda: loop.progress.step >= 10)
    resumed = state_of(train_toy(run, tables()))
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)


def test_the_learner_waits_for_its_ratio_and_says_so_once(tmp_path):
    run = make_run(tmp_path / "run")
    source = MemorySource(100)
    tables = make_tables(steps=100, start_steps=10, samples_per_insert=32, error_buffer=20 * 16)
    progress = []
    loop = make_toy_loop(run, tables, source, progress.append)
    stop = threading.Event()
    thread = threading.Thread(target=loop.run, args=(stop.is_set,))
    thread.start()
    try:
        for added, expected in ((0, 30), (3, 36), (5, 46)):
            source.add(added)
            deadline = time.monotonic() + 5
            while loop.progress.step < expected and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.25)
            assert loop.progress.step == expected
        assert "waits for robots" in loop.progress.waiting
        deadline = time.monotonic() + 5
        while not any("waits for robots" in p.waiting for p in progress):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
    lines = journal_of(run, "rate")
    assert [line["state"] for line in lines] == ["learner ahead"] and "samples_per_insert 32" in lines[0]["why"]
    assert journal_of(run, "waiting") == []
    assert journal_of(run, "checkpoint")[-1]["step"] == 46  # a stopped run keeps what it learnt


def test_robots_that_are_ahead_are_said_and_not_held(tmp_path):
    run = make_run(tmp_path / "run")
    source = MemorySource(100)
    tables = make_tables(steps=60, start_steps=10, samples_per_insert=16, error_buffer=5 * 16)
    loop = make_toy_loop(run, tables, source)
    update = loop._update

    def updating(windows):
        if loop.progress.step == 13:
            source.add(30)
            loop._supply.poll(force=True)
        update(windows)

    loop._update = updating
    waited_for = run_until_it_waits(loop)
    # 5 updates of error buffer, 30 steps: 35 updates online, then the learner waits.
    assert loop.progress.step == 45 and "waits for robots" in waited_for
    states = [line["state"] for line in journal_of(run, "rate")]
    assert states == ["robots ahead", "in range", "learner ahead"]


@pytest.mark.parametrize("retired", [0, 50])
def test_the_ratio_is_counted_from_the_online_part_and_goes_on_after_a_restart(tmp_path, retired):
    run = make_run(tmp_path / "run")
    tables = make_tables(steps=100, start_steps=10, checkpoint_every=50, samples_per_insert=16, error_buffer=5 * 16)
    source = MemorySource(100)
    loop = make_toy_loop(run, tables, source)
    run_until_it_waits(loop)
    assert loop.progress.step == 15 and journal_of(run, "checkpoint")[-1]["step"] == 15
    source = MemorySource(104, retired=retired)  # four came while nobody trained
    loop = make_toy_loop(run, tables, source)
    assert loop.progress.step == 15
    run_until_it_waits(loop)
    assert loop.progress.step == 19
    assert [line["state"] for line in journal_of(run, "rate")] == ["learner ahead"]  # also over the restart


def test_a_start_that_is_made_shorter_leaves_no_debt(tmp_path):
    run = make_run(tmp_path / "run")
    options = {"checkpoint_every": 50, "samples_per_insert": 16, "error_buffer": 5 * 16}
    train_toy(run, make_tables(steps=20, start_steps=20, **options))
    loop = make_toy_loop(run, make_tables(steps=100, start_steps=10, **options), MemorySource(200))
    run_until_it_waits(loop)
    assert loop.progress.step == 25


def test_the_learner_waits_for_data_of_the_kind_it_needs(tmp_path):
    run = make_run(tmp_path / "run")
    loop = make_toy_loop(run, make_tables(steps=5, start_steps=1), MemorySource(100))
    source = loop._supply._source = MemorySource(0)
    stop = threading.Event()
    thread = threading.Thread(target=loop.run, args=(stop.is_set,))
    thread.start()
    time.sleep(0.3)
    assert loop.progress.step == 0 and "waits for data" in loop.progress.waiting
    source.add(50)
    thread.join(10)
    assert not thread.is_alive() and loop.progress.step == 5 and loop.progress.waiting == ""
    assert len(journal_of(run, "waiting")) == 1


def test_broken_data_names_step_and_algorithm_and_spoils_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    loop = make_toy_loop(run, make_tables(steps=40, start_steps=5), BrokenSource(200))
    with pytest.raises(LearnerError, match=r"step 10 of hg_dagger.*'policy'.*nan"):
        loop.run(lambda: False)
    good = train_toy(make_run(tmp_path / "good"), make_tables(steps=10, start_steps=5), MemorySource(200))
    spoiled, whole = state_of(loop), state_of(good)
    weights = [n for n in whole if not n.endswith("/lr")]
    assert weights and all(torch.equal(spoiled[n], whole[n]) for n in weights)


def test_publishing_stops_for_no_disk_and_fails_for_no_key(tmp_path):
    run = make_run(tmp_path / "run")
    (run.keys / "release.key").unlink()
    from fleet.errors import IdentityError

    with pytest.raises(IdentityError):
        train_toy(run, make_tables())


def test_background_replaces_what_has_not_begun_and_counts_it():
    background, gate, done = Background(), threading.Event(), []
    background.submit("publish", lambda: (gate.wait(5), done.append(0))[1])
    time.sleep(0.05)
    for i in range(1, 4):
        background.submit("publish", lambda i=i: done.append(i))
    background.submit("checkpoint", lambda: done.append("c"))
    gate.set()
    background.flush()
    assert done == [0, 3, "c"] and background.num_replaced == 2
    background.close()


def test_background_errors_reach_the_loop_and_a_full_disk_does_not_end_it():
    background = Background()

    def fail(error):
        raise error

    background.submit("checkpoint", lambda: fail(DiskFull("no room")))
    facts = background.flush()
    assert facts[0][0] == "waiting" and "no room" in facts[0][1]["why"]
    background.submit("publish", lambda: fail(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        background.flush()
    assert background.flush() == []
    background.close()


def test_a_full_disk_delays_releases_only(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    real, calls = ReleaseStore.publish, []

    def publish(self, *args, **more):
        calls.append(more["step"])
        if len(calls) == 1:
            raise DiskFull("no room for a release")
        return real(self, *args, **more)

    monkeypatch.setattr(ReleaseStore, "publish", publish)
    loop = train_toy(run, make_tables(steps=200, start_steps=10, publish_every=50))
    assert loop.progress.step == 200 and ReleaseStore(run.releases).manifest(1).step == calls[1] > 10
    assert any("no room" in line["why"] for line in journal_of(run, "waiting"))


@pytest.mark.parametrize("what", [(ReleaseStore, "publish"), (Checkpoints, "save")])
def test_a_run_does_not_end_well_while_what_was_learnt_last_has_no_room(tmp_path, monkeypatch, what):
    run = make_run(tmp_path / "run")

    def full(self, *args, **more):
        raise DiskFull("no room for it")

    monkeypatch.setattr(*what, full)
    with pytest.raises(DiskFull, match="no room for it"):
        train_toy(run, make_tables(steps=20, start_steps=10))
    assert {"published", "checkpoint"} & {line["kind"] for line in read_journal(run.logs / "learner.jsonl")}


def test_time_is_told_by_what_it_was_spent_on(tmp_path):
    seen = []
    run = make_run(tmp_path / "run")
    loop = make_toy_loop(run, make_tables(trace_steps=1000), MemorySource(100), seen.append)
    loop.run(lambda: False)
    trace = json.loads((run.logs / "trace-0.json").read_text())["traceEvents"]
    assert {"forward", "publish", "step 40"} <= {event["name"] for event in trace}
    assert all(
        seen[-1].seconds[part] > 0
        for part in ("sample", "prepare", "forward", "backward", "optimizer", "after_step", "publish")
    )
    assert seen[-1].step == 40 and seen[-1].updates_per_s > 0
