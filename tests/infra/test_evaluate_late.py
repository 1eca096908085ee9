"""Policies that are late, in simulated time: how chunks follow each other then."""

import json

import numpy as np
import pytest
from safetensors.torch import save

from actors.policy_inference import ActingPolicy
from actors.safety import SafetyConfig
from algorithms.policies.registry import build, describe
from fleet.errors import ConfigError, PolicyError
from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder
from fleet.seeds import held_out_seeds
from fleet.server.releases import ReleaseStore
from infra.evaluate import evaluate
from infra.evaluation import evaluate_version
from infra.run_config import RunConfig, write_catalogue

JUMPY = "tests.actors.odd_policies:Jumpy"
TASKS = {"reach": np.ones(4)}
STEPS = 40


def run(policy_config=None, **settings):
    policy = build(JUMPY, policy_config or {})
    table = evaluate(policy, "toy", {"max_steps": STEPS}, TASKS, held_out_seeds(1), num_workers=0, **settings)
    return table.episodes[0]


def test_a_policy_in_time_is_never_held_whatever_the_chunking():
    results = [run(execute=4, chunking=mode) for mode in ("execute", "async")]
    assert results[0] == results[1] and results[0].num_held == 0
    assert results[0].border_change == pytest.approx(0.02) and results[0].other_change == 0
    assert run(execute=4, chunking="ensemble").border_change < 0.015  # averages of chunks that contradict each other


@pytest.mark.parametrize("mode", ["execute", "ensemble", "async"])
def test_a_late_policy_is_held_until_its_first_chunk_only_while_chunks_are_long_enough(mode):
    assert run(execute=4, chunking=mode, delay=3).num_held == 3
    assert run({"horizon": 8}, execute=4, chunking=mode, delay=8).num_held == STEPS


def test_a_chunk_that_continues_what_is_executed_does_not_jump():
    naive, continued = (run({"max_delay": n}, execute=4, chunking="async", delay=3) for n in (0, 4))
    assert naive.border_change == pytest.approx(0.02, abs=0.003)
    assert continued.border_change == pytest.approx(0.001, abs=0.001)


def test_what_is_continued_is_what_the_robot_does_not_what_it_was_told(monkeypatch):
    told, act = [], ActingPolicy.__call__

    def listen(self, obs, embedding, prefix_DA, *others):
        told.append(prefix_DA)
        return act(self, obs, embedding, prefix_DA, *others)

    monkeypatch.setattr(ActingPolicy, "__call__", listen)
    run(execute=4, chunking="async", delay=3, safety=SafetyConfig(max_delta=0.0004))  # on its way all the time
    changes = np.concatenate([np.diff(prefix_DA[:, 0]) for prefix_DA in told if len(prefix_DA)])
    assert len(changes) > 10 and np.abs(changes) == pytest.approx(0.0004, rel=1e-3)


def test_a_prefix_that_is_longer_than_the_policy_can_continue_is_cut():
    cut = run({"max_delay": 1}, execute=4, chunking="async", delay=3)
    assert 0.0 < cut.border_change < 0.003 and cut.num_held == 3


def test_without_asking_ahead_nothing_is_certain_and_nothing_continued():
    assert run({"max_delay": 4}, execute=4, delay=3).border_change == pytest.approx(0.02, abs=0.003)


@pytest.mark.parametrize("wrong", [{"delay": -1}, {"chunking": "rtc"}, {"execute": 17}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        run(**{"execute": 4, **wrong})


def test_actions_go_through_what_stands_before_a_robots_motors():
    assert run(execute=4, safety=SafetyConfig(max_delta=0.005)).border_change == pytest.approx(0.005, abs=1e-6)


def test_a_release_is_tested_with_the_settings_of_its_robots(tmp_path):
    actor = {"chunking": "ensemble", "execute": 2, "ensemble_decay": -3.0, "safety": {"max_delta": 0.0077}}
    run_file = {"run": {"tasks": {"reach": "reach it"}}, "robot": {"settings": {"max_steps": STEPS}}, "actor": actor}
    folder, policy = RunFolder.create(tmp_path / "run"), build(JUMPY, {})
    folder.config.write_text(json.dumps(run_file))
    write_catalogue(folder, RunConfig(run_file["run"]["tasks"]))
    create_run_keys(folder.keys)
    store = ReleaseStore(folder.releases, folder.keys)
    store.publish(save(policy.state_dict()), algorithm="bc", step=1, metrics={}, policy=describe(policy))
    tested = evaluate_version(folder, 1, "final", held_out_seeds(1), workers=0).episodes[0]
    settings = {"chunking": "ensemble", "execute": 2, "ensemble_decay": -3.0, "safety": SafetyConfig(0.0077)}
    assert tested == run(**settings)
    for name in settings:
        assert tested != run(**{"execute": 4} | {other: value for other, value in settings.items() if other != name})


def test_a_policy_that_overflows_ends_the_evaluation_and_names_the_action():
    with pytest.raises(PolicyError, match="'action' is inf"):
        run({"bad": float("inf")}, execute=4)
