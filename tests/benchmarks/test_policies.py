"""The benchmark of policies at its smallest: demonstrations, the learner, tests on starts, rows. What it says of a family that
cannot be trained."""

import pytest

from benchmarks.policies_cases import CONTROL_CASES, IMAGE_CASES, STATE_CASES, Case
from benchmarks.policies_data import make_demonstrations
from benchmarks.policies_learn import Outcome, learn, rows_of
from benchmarks.policies_speed import CASES, make_policy, release_bytes


def outcome(case: str, won: int, seed: int = 1) -> Outcome:
    rows = [("push-v3", 10, won, 50.0), ("door-open-v3", 10, 10, 60.0), ("all", 20, 10 + won, 55.0)]
    return Outcome(case, seed, train_s=12.0, parameters=7, inference_ms=[1.0, 2.0, 9.0], rows=rows)


def test_rows_order_families_by_success_and_judge_them_by_the_best():
    outcomes = [outcome("low", 0), outcome("high", 8), outcome("near", 7), Outcome("broken", 1, why="no such family")]
    rows = {row.what: row for row in rows_of(outcomes)}
    success = [row for what, row in rows.items() if "success of" in what]
    assert [(row.what.split(":")[0], row.value, row.met) for row in success] == [
        ("high", 90.0, True),
        ("near", 85.0, True),
        ("low", 50.0, False),
    ]
    assert success[0].low == pytest.approx(69.9, abs=0.1) and success[0].high == pytest.approx(97.2, abs=0.1)  # Wilson
    assert rows["broken: success"].value is None and rows["broken: success"].why == "no such family"
    assert rows["near: inference, batch 1, one thread"].value == 2.0 and rows["near: training, one thread"].value == 12
    assert next(row.value for what, row in rows.items() if what.startswith("low: weakest task (push 0")) == 0


def test_seeds_of_a_family_are_one_row():
    (row,) = [row for row in rows_of([outcome("mlp", 0), outcome("mlp", 10, seed=2)]) if "success" in row.what]
    assert row.what == "mlp: success of 40 starts (seeds 50.0, 100.0)" and row.value == 75.0 and row.repeats == 2


@pytest.mark.parametrize("key", CASES)
def test_every_case_can_be_built_and_weighs_what_it_has(key):
    policy = make_policy(key)
    assert release_bytes(policy) >= 4 * sum(p.numel() for p in policy.parameters())  # buffers come on top
    assert (policy.spec.horizon, policy.spec.action_dim) == (16, 4)
    if "pixels" in key:  # no image policy may see the objects' places
        assert CASES[key][0].config["select"] == {"observation.state": [0, 1, 2, 3]}


def test_names_of_cases_are_files_of_their_own():
    names = [case.name for case in (*STATE_CASES, *CONTROL_CASES, *IMAGE_CASES)]
    assert len(set(names)) == len(names)
    assert Case("x", "mlp", steps=100).shortened(0.001).steps == 2


@pytest.mark.timeout(180)
def test_a_family_goes_the_whole_way_and_one_that_cannot_says_why(tmp_path):
    pytest.importorskip("metaworld")
    demonstrations = make_demonstrations(tmp_path / "demonstrations", {"reach-v3": "reach the target"}, 1)
    assert make_demonstrations(tmp_path / "demonstrations", {}, 0).run_id == demonstrations.run_id  # taken as it is
    cases = [Case("mlp", "mlp", batch_size=16, steps=5), Case("odd", "mlp", {"width": 0})]
    done, odd = learn(demonstrations, cases, tmp_path, seeds=1, episodes=1, first_start=0, workers=2)
    assert list(done.rows[-1][:2]) == ["all", 1] and done.train_s > 0 and len(done.inference_ms) > 0
    assert done.parameters == 159_780
    assert "width" in odd.why and not odd.rows
