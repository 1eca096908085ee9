"""The benchmark of learning at its smallest, with the toy robot: what is promised of lockstep, and what its rows say."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from benchmarks import learning_process, learning_runs
from benchmarks.learning_methods import EVERY, METHODS, Method
from benchmarks.learning_process import Plan
from benchmarks.learning_rows import plot, rows_of
from benchmarks.learning_runs import Outcome, run_all
from benchmarks.learning_scenarios import SCENARIOS, Counts, Scenario
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds
from fleet.batch import Outcome as Ended
from fleet.robot import Source
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from fleet.spec import STATE
from infra.run_config import load_plain_tables

COUNTS = Counts(start_steps=4, steps=10, env_steps=85, episodes=1, curve=1, curve_episodes=1, publish_every=5, first_start=0)
MLP = {"family": "mlp", "config": {"horizon": 8, "width": 16}}
GATE = {"expert": "toy", "gate_distance": 0.3, "window": 2, "keep": "steps", "keep_steps": 7}
NAMES = ("bc", "no new data", "hg_dagger", "hg_dagger, first", "hg_dagger, demonstrations gone")
TOY = Scenario(
    "toy",
    "a question",
    {"reach": "reach the target", "mirror": "reach its mirror image"},
    ("mirror",),
    2,
    "toy",
    GATE,
    NAMES,
    NAMES,
    adapter="toy",
    robot={"max_steps": 40},
)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with a policy of a few parameters."""
    small = {name: dataclasses.replace(method, policy=MLP) for name, method in EVERY.items()}
    small["hg_dagger, first"] = dataclasses.replace(small["hg_dagger"], name="hg_dagger, first", collect="first")
    small["of no class"] = Method("of no class", "", "hg_daggr", policy=MLP)
    monkeypatch.setattr(learning_runs, "EVERY", small)
    monkeypatch.setattr(learning_runs, "execute", lambda mode, path: learning_process.perform(mode, RunFolder.open(path)))


def steps_of(run: Path) -> dict[str, np.ndarray]:
    """Every step in a run's log, in its order."""
    sampler = Sampler(run / "buffer", list(TOY.tasks), 0)
    sampler.poll()
    windows = sampler.gather(
        sampler.windows_of(range(len(sampler.index.episodes.keys)), BatchNeeds(1, 1, (STATE,), {tuple(Source): 1.0}))
    )
    sampler.close()
    names = ("task_B", "episode_B", "frame_B", "source_B", "version_B", "outcome_B", "actions_BHA")
    return {**{name: getattr(windows, name) for name in names}, STATE: windows.obs[STATE]}


def newest_weights(run: Path) -> dict[str, np.ndarray]:
    store = ReleaseStore(run / "releases")
    return load(store.load(store.newest() or 0))


@pytest.mark.timeout(300)
def test_methods_get_equal_steps_and_human_steps_are_counted(tmp_path, monkeypatch):
    publish = ReleaseStore.publish
    slow = lambda *args, **fields: time.sleep(0.1) or publish(*args, **fields)  # noqa: E731 - a disk slower than updates
    monkeypatch.setattr(ReleaseStore, "publish", slow)
    outcomes = {o.method: o for o in run_all(TOY, NAMES, COUNTS, tmp_path, seeds=1, workers=1)}
    assert not [o.why for o in outcomes.values() if o.why]
    assert outcomes["bc"].learner_steps == 4 and outcomes["bc"].curve[0][0] == 4
    for name in NAMES[1:]:
        after = outcomes[name]
        assert (after.learner_steps, after.gradient_steps) == (14, 10), name
        assert after.env_steps == (0 if name == "no new data" else 85), name
        assert [point[0] for point in after.curve] == [4, 10, 14], name
    for name in NAMES[2:]:  # what is told of the log is what lies in it
        run = tmp_path / "toy" / name.replace(", ", "-").replace(" ", "-")
        steps, after = steps_of(Path(f"{run}-1")), outcomes[name]
        source_B, robots_B = steps["source_B"], steps["source_B"] != Source.DEMO
        assert robots_B.sum() == 85 and (steps["task_B"][robots_B] == 1).all()  # the robot works on one of the tasks
        assert (source_B == Source.OPERATOR).sum() == after.operator_steps > 0
        assert (source_B == Source.POLICY).sum() == after.policy_steps > 0
        assert after.human_steps == outcomes["bc"].demonstration_steps + after.operator_steps
        demonstrated = (source_B == Source.DEMO).sum()
        assert demonstrated == (0 if "gone" in name else outcomes["bc"].demonstration_steps)
    versions = {name: set(steps_of(tmp_path / "toy" / f"{name}-1")["version_B"]) for name in ("hg_dagger", "hg_dagger-first")}
    assert versions["hg_dagger"] - {-1} == {1, 2, 3} and versions["hg_dagger-first"] - {-1} == {1}


def test_only_successful_demonstrations_stay_and_so_many_of_each_task(tmp_path, monkeypatch):
    short = dataclasses.replace(TOY, robot={"max_steps": 17}, demonstrations=3)  # the expert needs 11 to 20 steps
    monkeypatch.setattr(learning_process, "learn", lambda *_: {})
    monkeypatch.setattr(learning_process, "try_releases", lambda *_, **__: {"rows": [["reach", 1, 1, 9]]})
    run_all(short, ["bc"], COUNTS, tmp_path, seeds=1, workers=1)
    (run,) = (tmp_path / "toy").iterdir()
    steps = steps_of(run)
    ends = {episode: steps["frame_B"][steps["episode_B"] == episode].max() for episode in set(steps["episode_B"])}
    tasks = [steps["task_B"][steps["episode_B"] == episode][0] for episode in ends]
    assert sorted(tasks) == [0] * 3 + [1] * 3 and max(ends.values()) < 17 and (steps["outcome_B"] == Ended.SUCCESS).all()


@pytest.mark.timeout(300)
def test_two_runs_of_a_seed_are_the_same_and_another_seed_is_not(tmp_path):
    for again in ("a", "b"):
        run_all(TOY, ["hg_dagger"], COUNTS, tmp_path / again, seeds=1 if again == "a" else 2, workers=1)
    first, second, other = (
        tmp_path / f"{folder}-{seed}"
        for folder, seed in (("a/toy/hg_dagger", 1), ("b/toy/hg_dagger", 1), ("b/toy/hg_dagger", 2))
    )
    steps, same, different = steps_of(first), steps_of(second), steps_of(other)
    assert all(np.array_equal(steps[name], same[name]) for name in steps)
    weights, equal, unequal = newest_weights(first), newest_weights(second), newest_weights(other)
    assert all(np.array_equal(weights[name], equal[name]) for name in weights)
    assert any(not np.array_equal(weights[name], unequal[name]) for name in weights)
    assert len(steps[STATE]) != len(different[STATE]) or not np.array_equal(steps[STATE], different[STATE])


def test_a_method_without_a_class_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(learning_runs.EVERY, "of no class", Method("of no class", "", "hg_daggr", policy=MLP))
    (outcome,) = run_all(TOY, ["of no class"], COUNTS, tmp_path, seeds=1, workers=1)
    (row,) = rows_of(TOY, [outcome])
    assert row.value is None and "hg_daggr" in row.why and "hg_dagger" in row.why


def test_what_was_finished_is_taken_and_what_changed_is_not(tmp_path, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(learning_runs, "execute", lambda mode, path: done.append(mode) or {"rows": [["reach", 1, 1, 9]]})
    monkeypatch.setattr(learning_runs.shutil, "copy", lambda *_: None)
    for counts in (COUNTS, COUNTS, dataclasses.replace(COUNTS, steps=11)):
        run_all(TOY, ["hg_dagger"], counts, tmp_path, seeds=1, workers=1)
    assert done == ["start", "method"] * 2
    run_all(TOY, ["no new data", "bc"], dataclasses.replace(COUNTS, steps=11), tmp_path, seeds=1, workers=1)
    assert done == ["start", "method"] * 2 + ["method"]  # the start is the same, whoever else is compared


def test_a_robot_is_due_evenly_or_at_once_and_by_the_newest_release():
    counts = dataclasses.asdict(Counts(start_steps=100, steps=40, env_steps=30, publish_every=20))
    plan = Plan(counts, "online")
    due = [plan.due(step) for step in range(90, 140)]
    assert due[:10] == [0] * 10 and due[-1] == 30 and due[29] == 15 and max(np.diff(due)) == 1
    assert {plan.released(step) for step in range(100, 120)} == {100} and plan.released(139) == 120
    assert [Plan(counts, "first").due(step) for step in (0, 99, 100, 139)] == [0, 0, 30, 30]
    assert Plan(counts, "never").due(139) == 0


def outcome(method: str, seed: int, won: int, steps: int = 50, **facts: int) -> Outcome:
    rows = [("reach", 10, 10, 100), ("mirror", 10, won, won * steps)]
    return Outcome(method, seed, rows, curve=[(4, 20, 10), (14, 20, 10 + won)], **facts)


def test_rows_say_means_over_seeds_and_differences_seed_by_seed(tmp_path):
    scenario = dataclasses.replace(TOY, robot_tasks=(), control="hg_dagger", claim=True)
    outcomes = [outcome("hg_dagger", seed, seed, demonstration_steps=100, operator_steps=20 * seed) for seed in (1, 2, 3)]
    outcomes += [outcome("iql", seed, seed + 2 + seed % 2, 40) for seed in (1, 2, 3)]
    outcomes += [outcome("iql", 4, 0)]  # of a seed that the control does not have
    outcomes += [Outcome("rlpd", 1, why="no such class")]
    rows = {row.what: row for row in rows_of(scenario, outcomes)}
    success = next(row for what, row in rows.items() if what.startswith("hg_dagger: success"))
    assert (success.value, success.repeats) == (60.0, 3) and "seeds 55.0, 60.0, 65.0; Wilson over 60 starts" in success.what
    assert success.low == pytest.approx(60 - 4.303 * 5 / math.sqrt(3), abs=0.1)  # Student, two degrees of freedom
    human = next(row for what, row in rows.items() if what.startswith("hg_dagger: human steps"))
    assert human.value == 140 and (human.low, human.high) == (90, 190)
    assert rows["hg_dagger: steps to success"].value == pytest.approx((150 / 11 + 200 / 12 + 250 / 13) / 3, abs=0.1)
    better = rows["iql minus hg_dagger, paired: success"]
    assert better.value == pytest.approx(40 / 3, abs=0.1) and better.met
    assert rows["iql minus hg_dagger, paired: steps to success"].met is False
    assert rows["rlpd: success"].value is None and rows["rlpd: success"].why == "no such class"
    picture = tmp_path / "curves.svg"
    plot(scenario, outcomes, picture)
    assert "<svg" in picture.read_text() and "iql" in picture.read_text()
    first = picture.read_bytes()
    plot(scenario, outcomes, picture)
    assert picture.read_bytes() == first


def test_tasks_that_the_robot_did_not_work_on_have_rows_of_their_own():
    outcomes = [outcome("no new data", 1, 5), outcome("hg_dagger", 1, 9)]
    rows = {row.what.split(" (")[0]: row for row in rows_of(TOY, outcomes)}
    assert rows["hg_dagger: success on tasks that the robot worked on"].value == 90
    assert rows["hg_dagger: success on the others"].value == 100
    assert rows["hg_dagger minus no new data, paired: success on tasks that the robot worked on"].value == 40


@pytest.mark.parametrize("key", SCENARIOS)
def test_scenarios_name_methods_and_make_run_files_that_are_read(key, tmp_path):
    import yaml

    scenario = SCENARIOS[key]
    assert set(scenario.robot_tasks) <= set(scenario.tasks) and scenario.control in scenario.methods
    assert set(scenario.methods) | set(scenario.helped) <= set(EVERY)
    for name in scenario.methods:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(scenario.tables(EVERY[name], COUNTS, 1)))
        assert load_plain_tables(path, [])["learner"].start_steps == COUNTS.start_steps


def test_an_imperfect_expert_is_slower_and_errs_as_its_start_says():
    pytest.importorskip("metaworld")
    from actors.operators.experts import MetaWorldExpert
    from benchmarks.learning_experts import NOISE, ImperfectExpert

    good, imperfect = MetaWorldExpert(), ImperfectExpert()
    speeds, rng = [], np.random.default_rng(0)
    for _ in range(20):
        obs = {STATE: rng.uniform(-0.1, 0.1, 39).astype(np.float32)}
        runs = []
        for expert in (good, imperfect, imperfect):
            expert.reset("reach-v3")
            runs.append(np.array([expert.action(obs) for _ in range(400)]))
        best, slow, again = runs
        assert np.array_equal(slow, again) and np.array_equal(slow[:, 3], best[:, 3])
        inside = np.abs(best[0, :3]) < 0.3  # what the clip leaves alone
        if inside.any():
            assert slow[:, :3][:, inside].std() == pytest.approx(NOISE, rel=0.35)
        speeds.append(slow[:, :3].mean(0)[~inside].sum() / best[:, :3].mean(0)[~inside].sum() if (~inside).any() else 0.7)
    assert 0.4 < np.mean(speeds) < 0.95 and np.std(speeds) > 0.05


def test_names_of_methods_are_folders_of_their_own():
    assert len({learning_runs._slug(name) for name in EVERY}) == len(EVERY) == len(METHODS) + 2
