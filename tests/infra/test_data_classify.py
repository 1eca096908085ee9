"""``fleet data classify`` on runs whose log was written by the real ingest."""

import json
from pathlib import Path

import numpy as np
import pytest

from buffer.browse import Episode
from buffer.ingest import Ingest
from buffer.labels import Label
from buffer.log import Log
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Outcome
from fleet.images import encode
from fleet.robot import Source
from fleet.schema import build_table, encode_fragment
from fleet.spec import Feature, RobotSpec
from infra.classifier import Verdict, labels_of, load
from tests.buffer.fragments import episode_row, make_rows
from tests.buffer.runs import make_run
from tests.command_line import answer

STATE, CAMERA = "observation.state", "observation.images.top"
LENGTH = 24
TASKS = {
    "left": {"instruction": "go left", "embedding": [1.0, 0.0]},
    "right": {"instruction": "go right", "embedding": [0.0, 1.0]},
}


def classify(*arguments):
    return answer("data", "classify", *arguments)


def ask(*arguments):
    code, out, err = classify(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


class Recorder:
    """Writes episodes of one robot: it wanders, and ends near its goal, at -1 (left) or 1 (right), or near the other one."""

    def __init__(self, run, *, camera=False, state=True, robot="arm-0", seed=0):
        features = {"action": Feature("float32", (2,))}
        if state:
            features[STATE] = Feature("float32", (2,))
        if camera:
            features[CAMERA] = Feature("uint8", (16, 16, 3), codec="jpeg")
        self.spec, self.robot, self.rng = RobotSpec("toy", 20, features), robot, np.random.default_rng(seed)
        self.log = Log(run.buffer)
        self.ingest = Ingest(self.log)
        self.ingest.admit(robot, "boot", self.spec)
        self.episodes = 0

    def episode(self, task, good, outcome, *, lost=0, spoilt=0):
        """Its name. ``outcome``: as the robot says it. ``lost``: steps at the end that never arrived. ``spoilt``: images at the
        end that cannot be decoded."""
        number, self.episodes = self.episodes, self.episodes + 1
        goal = (1 if task == "right" else -1) * (1 if good else -1)
        place = np.linspace(0, goal, LENGTH) + self.rng.normal(size=LENGTH) * 0.15
        rows = make_rows(self.robot, "boot", number, 0, [Source.POLICY] * LENGTH, task, self.spec)
        for frame, row in enumerate(rows):
            if STATE in row:
                row[STATE] = np.array([place[frame], self.rng.normal()], np.float32)
            if CAMERA in row:
                image = encode(self.spec.features[CAMERA], np.full((16, 16, 3), 128 + 80 * place[frame], np.uint8))
                row[CAMERA] = image if frame < LENGTH - spoilt else image[: image.index(b"\xff\xda")]
            row["next.truncated"] = frame == LENGTH - 1
        events = [episode_row(number, "opened", task), episode_row(number, "closed", task, LENGTH + lost, outcome)]
        events[1]["judge"] = "" if outcome == "unknown" else "robot"
        tables = {"steps": build_table("steps", self.spec, rows), "episodes": build_table("episodes", self.spec, events)}
        directory, payload = encode_fragment(tables)
        seq = self.log.last(self.robot, "boot").seq + 1
        fields = {"boot_id": "boot", "seq": seq, "spec_hash": self.spec.hash, "tables": directory}
        self.ingest.offer(self.robot, fields, payload)
        self.ingest.commit()
        return f"{self.robot}/boot/{number}"

    def judged(self, num):
        """So many episodes of each task and outcome, judged by the robot."""
        for task in TASKS:
            for good in (True, False) * num:
                self.episode(task, good, "success" if good else "failure")

    def close(self):
        self.log.close()


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "tasks.json").write_text(json.dumps(TASKS))
    return run


def recorded(run, num=12, **options):
    """A closed log of ``num`` judged episodes of each task and outcome."""
    recorder = Recorder(run, **options)
    recorder.judged(num)
    recorder.close()
    return recorder


def outcomes(run):
    """By name: outcome and who judged, as ``fleet data list`` has them."""
    code, out, _ = answer("data", "list", run.path, "--limit", "0", "--json")
    assert code == 0
    return {e["name"]: (e["outcome"], e["judged_by"]) for e in json.loads(out)}


def trained(run, *options, steps=80):
    return ask("train", run.path, "--steps", steps, *options)


def test_trained_tested_and_applied_it_judges_what_nobody_did_and_learning_heeds_it(run):
    recorder = Recorder(run)
    recorder.judged(12)
    made = trained(run, "--false-positives", "0.3", "--false-negatives", "0.3")
    held = made["held_out_measured"]
    assert made["judge"].startswith("classifier:") and held["false_positives"]["episodes"] == 8
    assert held["false_positives"]["mistakes"] == held["false_negatives"]["mistakes"] == held["not_judged"] == 0
    assert held["false_positives"]["at_most"] == pytest.approx(1 - 0.05 ** (1 / 8))
    truth = {recorder.episode(task, good, "unknown"): good for task in TASKS for good in (True, False, False, True)}
    recorder.close()

    before = outcomes(run)
    code, out, _ = classify("apply", run.path)
    assert code == 0 and "8 labels would be written; --yes does it" in out and outcomes(run) == before
    code, out, _ = classify("apply", run.path, "--yes")
    assert code == 0 and "8 labels written" in out
    after = outcomes(run)
    for name, good in truth.items():
        assert after[name] == ("success" if good else "failure", made["judge"])
    assert {name: said for name, said in after.items() if name not in truth} == {
        name: said for name, said in before.items() if name not in truth
    }
    assert "0 labels" in classify("apply", run.path, "--yes")[1]  # all is said

    sampler = Sampler(run.buffer, list(TASKS), 0)
    sampler.poll()
    windows = sampler.batch(BatchNeeds(256, 1, (STATE,), {(Source.POLICY,): 1.0}), 0)
    sampler.close()
    said = dict(zip(windows.episode_B.tolist(), windows.outcome_B.tolist(), strict=True))
    keys = {f"{robot}/{boot}/{number}": i for i, (robot, boot, number) in enumerate(sampler.index.episodes.keys)}
    drawn = [name for name in truth if keys[name] in said]
    assert drawn and all(said[keys[name]] == (Outcome.SUCCESS if truth[name] else Outcome.FAILURE) for name in drawn)


def test_the_test_is_of_episodes_that_it_was_not_made_of(run):
    recorder = Recorder(run)
    recorder.judged(8)
    made = trained(run)
    code, _, err = classify("test", run.path)
    assert code == 2 and "was not made of" in err and "fleet data label" in err
    # What a classifier said is no test: only people and robots count.
    unknown = recorder.episode("left", True, "unknown")
    assert classify("apply", run.path, "--yes")[0] == 0 and classify("test", run.path)[0] == 2
    for good in (True, False, False):
        recorder.episode("left", good, "success" if good else "failure")
    wrong = recorder.episode("right", False, "success")
    recorder.close()
    found = ask("test", run.path)
    assert (found["judge"], found["episodes"]) == (made["judge"], 4)
    assert found["by_task"]["left"]["false_positives"]["mistakes"] == 0
    assert found["false_negatives"] == {**found["false_negatives"], "mistakes": 1, "episodes": 2}
    assert unknown not in made["train"] + made["held_out"] and wrong not in made["train"]
    code, out, _ = classify("test", run.path)
    assert code == 0 and "1 of 2 other successes pass for failures" in out


def test_a_rate_that_too_few_episodes_can_show_is_said_not_to_be_shown(run):
    recorded(run, 6)
    code, out, _ = classify("train", run.path, "--steps", "60")
    assert code == 0 and "of 4 held-out failures pass for successes; with 95 % confidence at most 52.7 %" in out
    assert "the 1 % that were asked for are NOT shown: that takes 299 episodes without a mistake" in out
    code, out, _ = classify("train", run.path, "--steps", "60", "--false-positives", "0.5", "--held-out", "0.5")
    assert code == 0 and "the 50 % that were asked for" not in out


def test_people_and_robots_are_overruled_only_when_told(run):
    recorder = Recorder(run)
    recorder.judged(10)
    trained(run)
    robots = recorder.episode("left", False, "success")  # the robot was wrong
    persons, unsure = recorder.episode("left", False, "unknown"), recorder.episode("left", True, "unknown")
    recorder.episode("left", True, "unknown", lost=3)  # its end cannot be seen
    excluded, aborted = recorder.episode("left", True, "unknown"), recorder.episode("left", True, "aborted")
    recorder.close()
    assert answer("data", "label", run.path, "outcome", "success", persons, "--judge", "ann")[0] == 0
    assert answer("data", "label", run.path, "outcome", "unknown", unsure, "--judge", "ann")[0] == 0
    assert answer("data", "exclude", run.path, excluded)[0] == 0
    before = outcomes(run)
    assert "0 labels written" in classify("apply", run.path, "--yes")[1] and outcomes(run) == before
    assert classify("apply", run.path, "--yes", "--over")[0] == 0
    after = outcomes(run)
    assert after[robots][0] == after[persons][0] == "failure" and after[unsure][0] == "success"
    assert after[robots][1].startswith("classifier:") and after[excluded] == before[excluded]
    assert after[aborted] == ("aborted", "robot")
    # What a person says from then on counts again.
    assert answer("data", "label", run.path, "outcome", "success", persons, "--judge", "ann")[0] == 0
    classify("apply", run.path, "--yes")
    assert outcomes(run)[persons] == ("success", "ann")


def test_what_a_person_says_while_a_classifier_judges_counts(run, monkeypatch):
    """A label between reading and writing is newer than the classifier's."""
    recorder = Recorder(run)
    recorder.judged(8)
    trained(run)
    name = recorder.episode("left", True, "unknown")
    recorder.close()
    import infra.classifier

    judge = infra.classifier.verdicts

    def meanwhile(*arguments):
        answer("data", "label", run.path, "outcome", "failure", name, "--judge", "ann")
        return judge(*arguments)

    monkeypatch.setattr(infra.classifier, "verdicts", meanwhile)
    assert "1 labels written" in classify("apply", run.path, "--yes")[1]
    assert outcomes(run)[name] == ("failure", "ann")


def test_a_newer_classifier_replaces_what_an_older_one_said_and_never_learns_from_it(run):
    recorder = Recorder(run)
    recorder.judged(8)
    old = trained(run, "--seed", "1")
    name = recorder.episode("right", True, "unknown")
    recorder.close()
    classify("apply", run.path, "--yes")
    assert outcomes(run)[name] == ("success", old["judge"])
    new = trained(run, "--seed", "2")
    assert name not in new["train"] + new["held_out"] and new["judge"] != old["judge"]
    classify("apply", run.path, "--yes")
    assert outcomes(run)[name] == ("success", new["judge"])
    # By name the older one can still be asked.
    assert "1 labels would be written" in classify("apply", run.path, "--classifier", old["folder"])[1]


def test_a_camera_alone_is_enough_and_an_end_that_it_did_not_see_is_not_judged(run):
    recorder = Recorder(run, camera=True, state=False)
    recorder.judged(8)
    made = trained(run, steps=60)
    held = made["held_out_measured"]
    assert list(made["config"]["reads"]) == [CAMERA]
    assert held["false_positives"]["mistakes"] == held["false_negatives"]["mistakes"] == held["not_judged"] == 0
    names = [recorder.episode("left", good, "unknown", spoilt=spoilt) for good, spoilt in ((True, 0), (False, 2), (True, 5))]
    recorder.close()
    rows = {row["name"]: row["outcome"] for row in ask("apply", run.path)["episodes"]}
    assert [rows[name] for name in names] == ["success", "failure", ""]


def test_what_an_older_classifier_said_is_taken_back_where_a_newer_one_does_not_know():
    def said(outcome, judge):
        labels = (Label("arm-0", "boot", 0, "outcome", outcome, judge, 1),) if judge else ()
        return Verdict(Episode(("arm-0", "boot", 0), said="unknown", labels=labels), "", 0.5)

    found = [said("success", "classifier:old"), said("unknown", "classifier:old"), said("success", "ann"), said("", "")]
    assert [(label.value, label.judge) for label in labels_of(found, "classifier:new", 2)] == [("unknown", "classifier:new")]


def test_it_reads_what_it_is_told_to(run):
    recorded(run, 6, camera=True)
    assert list(trained(run, "--read", STATE, steps=5)["config"]["reads"]) == [STATE]
    code, _, err = classify("train", run.path, "--read", "observation.images.wrist")
    assert code == 2 and "'observation.images.wrist' is no observation of all robots" in err and STATE in err


def test_one_kind_alone_or_too_few_are_refused_with_what_to_do(run):
    code, _, err = classify("train", run.path)
    assert code == 2 and "0 successful and 0 failed" in err
    recorder = Recorder(run)
    for _ in range(9):
        recorder.episode("left", True, "success")
    for _ in range(4):
        recorder.episode("left", False, "failure")
    recorder.close()
    code, _, err = classify("train", run.path)
    assert code == 2 and "9 successful and 4 failed" in err and "at least 5 of each" in err and "fleet data label" in err


def test_a_run_with_other_features_or_a_spoilt_folder_is_refused(run, tmp_path):
    recorded(run, 6)
    made = trained(run, steps=5)
    other = make_run(tmp_path / "other")
    (other.path / "tasks.json").write_text(json.dumps(TASKS))
    recorder = Recorder(other, camera=True, state=False)
    recorder.episode("left", True, "unknown")
    recorder.close()
    code, _, err = classify("apply", other.path)
    assert code == 2 and "has no classifier" in err
    code, _, err = classify("apply", other.path, "--classifier", made["folder"])
    assert code == 2 and f"{STATE!r} is no observation of all robots" in err
    weights = Path(made["folder"]) / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    code, _, err = classify("apply", run.path)
    assert code == 2 and "no classifier that can be used" in err


def test_episodes_of_other_tasks_are_left_and_named(run):
    tasks = {**TASKS, "up": {"instruction": "go up", "embedding": [0.5, 0.5]}}
    (run.path / "tasks.json").write_text(json.dumps(tasks))
    recorder = Recorder(run)
    recorder.judged(6)
    trained(run, steps=30)
    recorder.episode("up", True, "unknown")
    recorder.close()
    code, out, _ = classify("apply", run.path, "--yes")
    assert code == 0 and "1 episodes of tasks that" in out and "up" in out and "0 labels written" in out


def test_the_same_data_and_seed_make_the_same_classifier(run, tmp_path):
    recorded(run, 6)
    first, second = (trained(run, "--out", tmp_path / name, steps=20) for name in ("a", "b"))
    assert first["weights_sha256"] == second["weights_sha256"] and first["thresholds"] == second["thresholds"]
    assert load(tmp_path / "a").made_of == load(tmp_path / "b").made_of
    assert len(first["train"]) == 16 and len(first["held_out"]) == 8  # two of each task and outcome
    assert not set(first["train"]) & set(first["held_out"])
    assert trained(run, "--seed", "3", steps=20)["held_out"] != first["held_out"]
    code, _, err = classify("train", run.path, "--steps", "1", "--out", tmp_path / "a")
    assert code == 2 and "is not empty" in err
