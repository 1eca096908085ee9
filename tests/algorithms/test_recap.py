"""RECAP on a point on a line, whose episodes are of all kinds."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from algorithms.advantages import lookahead_advantage, normalised_return
from algorithms.base import NO_FACTS, DataFacts
from algorithms.policies.base import ADVANTAGE, INSTRUCTION
from algorithms.policies.registry import build
from algorithms.recap import JUDGEMENT, STALE, TARGET, Recap, RecapConfig
from fleet.batch import Outcome, Within
from fleet.errors import ConfigError
from fleet.robot import Source
from fleet.spec import STATE
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.ranks import RankPlace, Ranks
from tests.algorithms.line import MAX_STEPS, TASKS, Episodes, mixed, success
from tests.batches import take_rows

H, B = 4, 64
CPU = torch.device("cpu")
FLOW = {
    "reads": {STATE: [1]},
    "action_dim": 1,
    "horizon": H,
    "instruction_dim": 4,
    "width": 32,
    "num_layers": 2,
    "num_heads": 2,
    "encoder_layers": 0,
    "num_steps": 4,
}
SMALL = {"batch_size": B, "lookahead": H, "value_start_steps": 1, "episode_steps": MAX_STEPS}


def make_recap(data=NO_FACTS, seed=0, *, started=True, **config):
    """Small; ``started``: its value counts as trained."""
    torch.manual_seed(seed)
    policy = build("flow", {**FLOW, "advantage": True})
    if data.statistics:
        policy.set_statistics(data.statistics)
    value = {"width": 32, "num_layers": 2, **config.pop("value", {})}
    algorithm = Recap(policy, RecapConfig(**{**SMALL, "value": value, **config}), data)
    algorithm._value_updates = algorithm.config.value_start_steps if started else 0
    return algorithm


def facts(episodes):
    return DataFacts(tuple(f"task{k}" for k in range(TASKS)), episodes.statistics(), (MAX_STEPS,) * TASKS)


def engine_of(algorithm):
    return make_engine(EngineConfig(), algorithm, CPU, Ranks(RankPlace()))


def train(algorithm, engine, episodes, steps, first=0):
    """As the loop does."""
    for step in range(first, first + steps):
        with torch.no_grad():
            batch = algorithm.prepare(episodes.draw(algorithm.needs, step))
        stats = {}
        for name in algorithm.parts:
            stats |= {f"{name}.{key}": value for key, value in engine.update(name, algorithm.loss, batch).items()}
        algorithm.after_step(step, stats)
    return stats


def two_tasks():
    """Episodes of all kinds and sources, of two tasks."""
    episodes = mixed(12, seed=1)
    rng = np.random.default_rng(2)
    kinds = [
        (Outcome.SUCCESS, Source.DEMO),
        (Outcome.OPEN, Source.POLICY),
        (Outcome.UNKNOWN, Source.POLICY),
        (Outcome.SUCCESS, np.repeat([0, 1, 0, 1, 0], [4, 2, 3, 2, 3])),
        (Outcome.FAILURE, Source.POLICY),
    ]
    for task, (outcome, source) in ((task, kind) for task in range(TASKS) for kind in kinds):
        episodes.add(rng.uniform(-1, 1, 15), rng.uniform(-1, 1, 14), outcome, source, task)
    return episodes


@pytest.fixture(scope="module")
def episodes():
    return two_tasks()


@pytest.fixture
def whole(episodes):
    """Every step of the two tasks once, in one batch."""

    def make(algorithm):
        algorithm.config.batch_size = len(episodes)
        return episodes.windows(np.arange(len(episodes)), H, algorithm.needs.offsets)

    return make


def test_targets_and_advantages_are_those_of_the_value_of_now(episodes, whole):
    algorithm = make_recap(facts(episodes))
    batch = whole(algorithm)
    with torch.no_grad():
        prepared = algorithm.prepare(batch)
        value = algorithm.parts["value"].module
        now_B, later_B = value(batch.obs), value(batch.obs_at[H])
    length_B = torch.full_like(now_B, MAX_STEPS)
    return_B = normalised_return(batch, length_B, length_B)
    torch.testing.assert_close(prepared.replay[TARGET], return_B, equal_nan=True)
    advantage_B = lookahead_advantage(batch, now_B, later_B, return_B, length_B, H)
    torch.testing.assert_close(prepared.replay[JUDGEMENT], advantage_B, equal_nan=True)
    assert advantage_B.isnan().sum() == TASKS * (H + 1) and prepared.replay[STALE].all()


def test_the_lookahead_goes_to_the_end_of_the_episode_with_zero(episodes, whole):
    algorithm = make_recap(facts(episodes), lookahead=0)
    assert algorithm.needs.offsets == (0,)
    batch = whole(algorithm)
    with torch.no_grad():
        prepared = algorithm.prepare(batch)
        now_B = algorithm.parts["value"].module(batch.obs)
    torch.testing.assert_close(prepared.replay[JUDGEMENT], prepared.replay[TARGET] - now_B, equal_nan=True)


@pytest.mark.parametrize("demonstrations", ["positive", "judged"])
def test_who_is_positive(episodes, whole, demonstrations):
    algorithm = make_recap(facts(episodes), demonstrations=demonstrations, indicator_dropout=0.0)
    algorithm._thresholds.load_state(0, [0.01, 0.1, 50.0])
    algorithm._thresholds.load_state(1, [-0.4, 0.1, 50.0])
    batch = whole(algorithm)
    prepared = algorithm.prepare(batch)
    advantage_B, indicator_B = prepared.replay[JUDGEMENT], prepared.obs[ADVANTAGE]
    threshold_B = torch.where(batch.task_B == 0, 0.01, -0.4)
    always_B = batch.source_B == Source.OPERATOR
    if demonstrations == "positive":
        always_B |= batch.source_B == Source.DEMO
    judged_B = torch.where(advantage_B.isnan(), 0.0, torch.where(advantage_B > threshold_B, 1.0, -1.0))
    assert torch.equal(indicator_B, torch.where(always_B, 1.0, judged_B))
    by_task = [set(indicator_B[(batch.task_B == k) & (batch.source_B == Source.POLICY)].tolist()) for k in range(2)]
    assert by_task[0] == {1.0, 0.0, -1.0} and 0.0 in by_task[1]
    forward = algorithm._policy.imitation_loss
    seen = {}
    algorithm._policy.imitation_loss = lambda obs, *rest: seen.update(obs) or forward(obs, *rest)
    algorithm.loss("policy", prepared)
    assert torch.equal(seen[ADVANTAGE], indicator_B)


def test_the_indicator_is_left_out_of_the_stated_share_of_the_rows_as_a_function_of_seed_step_and_row(episodes):
    """Whoever has the row, however the batch is cut."""
    batch = episodes.windows(np.resize(np.flatnonzero(np.array(episodes.columns["source"]) == Source.DEMO), 4000), H, (0, H))
    algorithm = make_recap(batch_size=4000)
    indicator_B = algorithm.prepare(batch).obs[ADVANTAGE]
    assert (indicator_B == 0).float().mean().item() == pytest.approx(0.3, abs=0.03) and set(indicator_B.tolist()) == {0, 1}
    for rows in (range(1500), range(1500, 4000)):
        assert torch.equal(algorithm.prepare(take_rows(batch, rows)).obs[ADVANTAGE], indicator_B[list(rows)])
    algorithm._step = 1
    other_B = algorithm.prepare(batch).obs[ADVANTAGE]
    assert (other_B != indicator_B).any()
    assert (make_recap(batch_size=4000, seed=3).prepare(batch).obs[ADVANTAGE] == indicator_B).all()
    assert (make_recap(batch_size=4000, **{"indicator_dropout": 0.0}).prepare(batch).obs[ADVANTAGE] == 1).all()


def test_before_the_value_is_trained_nothing_of_the_policy_is_judged(episodes, whole):
    """And demonstrations are positive even where they are to be judged."""
    algorithm = make_recap(facts(episodes), value_start_steps=5, started=False, demonstrations="judged", indicator_dropout=0.0)
    batch = whole(algorithm)

    def positive(sources):
        indicator_B = algorithm.prepare(batch).obs[ADVANTAGE]
        return torch.equal(indicator_B, torch.isin(batch.source_B.long(), torch.tensor(sources)).float())

    assert positive([Source.DEMO, Source.OPERATOR])
    algorithm.config.batch_size = B
    engine = engine_of(algorithm)
    train(algorithm, engine, open_episodes(), 7)
    algorithm.config.batch_size = len(episodes)
    assert positive([Source.DEMO, Source.OPERATOR])  # updates without any return do not count
    algorithm.config.batch_size = B
    train(algorithm, engine, episodes, 5, first=7)
    algorithm.config.batch_size = len(episodes)
    assert not positive([Source.DEMO, Source.OPERATOR])


def test_a_value_that_is_not_refreshed_stays_as_its_start_left_it(episodes):
    algorithm = make_recap(facts(episodes), value_start_steps=4, started=False, online_value=False)
    engine = engine_of(algorithm)
    start = copy.deepcopy(algorithm.parts["value"].module.state_dict())
    train(algorithm, engine, episodes, 4)
    trained = copy.deepcopy(algorithm.parts["value"].module.state_dict())
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    stats = train(algorithm, engine, episodes, 3, first=4)
    after = algorithm.parts["value"].module.state_dict()
    assert all(torch.equal(after[name], trained[name]) for name in trained)
    assert stats["value.weight"] == 0 and stats["policy.negative"] > 0 and stats["value.success"] > 0


def gradients(algorithm, part, batches):
    module = algorithm.parts[part].module
    module.zero_grad()
    outs = [algorithm.loss(part, batch) for batch in batches]
    (sum(out.sum for out in outs) / sum(out.weight for out in outs)).backward()
    return outs, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", ["value", "policy"])
def test_micro_batches_and_ranks_add_up(episodes, whole, part):
    algorithm = make_recap(facts(episodes))
    batch = whole(algorithm)
    prepared = algorithm.prepare(batch)
    [one], together = gradients(algorithm, part, [prepared])
    cuts = [range(0, 70), range(70, 75), range(75, len(batch.step_B))]
    for pieces in ([take_rows(prepared, rows) for rows in cuts], [algorithm.prepare(take_rows(batch, r)) for r in cuts]):
        outs, added = gradients(algorithm, part, pieces)
        for name, gradient in together.items():
            torch.testing.assert_close(added[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sum(out.sum for out in outs), one.sum)
        for name, value in one.stats.items():
            for i in range(2):
                torch.testing.assert_close(sum(out.stats[name][i] for out in outs), value[i], msg=name)
        torch.testing.assert_close(torch.cat([out.per_sample_B for out in outs]), one.per_sample_B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fill_ends", [True, False])
def test_what_is_masked_or_another_actors_changes_nothing(episodes, whole, fill_ends):
    algorithm = make_recap(facts(episodes), fill_ends=fill_ends)
    batch = whole(algorithm)
    dirty = copy.deepcopy(batch)
    dirty.actions_BHA[~dirty.mask_BH] = torch.nan
    dirty.rewards_BH[:] = torch.nan
    other_BH = (batch.source_BH != batch.source_B[:, None]).cumsum(1) > 0
    assert (other_BH & batch.mask_BH).any() and (~batch.mask_BH).any()
    dirty.actions_BHA[other_BH] = torch.nan
    for part in ("value", "policy"):
        [clean_out], clean = gradients(algorithm, part, [algorithm.prepare(batch)])
        [dirty_out], found = gradients(algorithm, part, [algorithm.prepare(dirty)])
        torch.testing.assert_close(dirty_out.sum, clean_out.sum)
        for name in clean:
            torch.testing.assert_close(found[name], clean[name])
    filled_BH = algorithm.prepare(batch).mask_BH.bool()
    expected_BH = ~other_BH if fill_ends else batch.mask_BH & ~other_BH
    assert torch.equal(filled_BH, expected_BH)


def test_the_value_learns_from_judged_episodes_alone(episodes, whole):
    algorithm = make_recap(facts(episodes))
    prepared = algorithm.prepare(whole(algorithm))
    known_B = torch.isin(prepared.outcome_B, torch.tensor([int(Outcome.SUCCESS), int(Outcome.FAILURE)]))
    out = algorithm.loss("value", prepared)
    assert out.weight == known_B.sum() < len(known_B) and (out.per_sample_B[~known_B] == 0).all()
    value = algorithm.parts["value"].module
    return_B = prepared.replay[TARGET][known_B].clamp(-1, 0)
    expected = value.loss({name: part[known_B] for name, part in prepared.obs.items()}, return_B).sum()
    torch.testing.assert_close(out.sum, expected)


def test_labels_are_made_anew_when_the_value_has_moved_on(episodes):
    """Only for steps that are out of date: the others keep what an older value said, to the bit."""
    algorithm = make_recap(facts(episodes), relabel_every=3, label_places=4096)
    engine, asked = engine_of(algorithm), []
    value = algorithm.parts["value"].module
    value.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0][STATE])))
    batch = episodes.windows(np.arange(len(episodes) - B, len(episodes)), H, (0, H))

    def labels():
        asked.clear()
        with torch.no_grad():
            prepared = algorithm.prepare(batch)
        return prepared.replay[JUDGEMENT], int(prepared.replay[STALE].sum()), sum(asked)

    first_B, stale, rows = labels()
    known = int((~first_B.isnan()).sum())
    assert stale == B and rows == 2 * B and 0 < known < B
    for made in range(3):
        again_B, stale, rows = labels()
        assert torch.equal(again_B[1:].nan_to_num(9), first_B[1:].nan_to_num(9)) and stale == B - known
        assert rows == 2 * max(B - known, 1), made
        train(algorithm, engine, episodes, 1, first=made)
    third_B, stale, _ = labels()
    assert stale == B and not torch.equal(third_B.nan_to_num(9), first_B.nan_to_num(9))


def test_a_batch_without_a_step_that_is_out_of_date_asks_the_value_once_all_the_same(episodes):
    """Ranks must ask it equally often."""
    algorithm = make_recap(facts(episodes), relabel_every=100)
    batch = episodes.windows(np.arange(8), H, (0, H))
    calls = []
    algorithm.parts["value"].module.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0][STATE])))
    for _ in range(2):
        prepared = algorithm.prepare(batch)
    assert calls == [16, 2] and not prepared.replay[STALE].any()


@pytest.mark.parametrize("config", [{}, {"relabel_every": 5}, {"value_start_steps": 12}, {"online_value": False}])
def test_a_resumed_run_goes_on_as_it_would_have(episodes, config):
    config = {"value_start_steps": 3, **config}
    straight = make_recap(facts(episodes), started=False, **config)
    engine = engine_of(straight)
    train(straight, engine, episodes, 9)
    state = copy.deepcopy((engine.weights(), straight.state_dict(), engine.state()))
    last = train(straight, engine, episodes, 6, first=9)
    resumed = make_recap(facts(episodes), seed=5, **config)
    other = engine_of(resumed)
    other.load_weights(state[0])
    resumed.load_state_dict(state[1])
    other.load_state(state[2])
    assert resumed.advice == straight.advice
    assert train(resumed, other, episodes, 6, first=9) == last
    for name, tensor in straight.acting().state_dict().items():
        assert torch.equal(resumed.acting().state_dict()[name], tensor), name
    assert resumed.state_dict()["tasks"] == straight.state_dict()["tasks"]


def test_lengths_and_thresholds_stay_with_their_task_when_a_run_is_resumed(episodes):
    """A task was put before the others, and the longest episode is another one now."""
    algorithm = make_recap(dataclasses.replace(facts(episodes), longest_T=(20, 30)), episode_steps=0)
    algorithm._thresholds.load_state(1, [0.25, 0.1, 7.0])
    data = DataFacts(("new", "task0", "task1"), episodes.statistics(), (15, 99, 99))
    resumed = make_recap(data, episode_steps=0)
    resumed.load_state_dict(algorithm.state_dict())
    assert resumed.state_dict()["tasks"]["task1"] == [30.0, 0.25, 0.1, 7.0]
    assert resumed.state_dict()["tasks"]["new"][0] == 15.0 and resumed.state_dict()["tasks"]["task0"][0] == 20.0


@pytest.mark.parametrize(
    ("longest", "config", "expected"),
    [((20, 0), {}, [20, 20]), ((0, 0), {}, [500, 500]), ((20, 30), {"episode_steps": 9}, [9, 9]), ((), {}, [500])],
)
def test_the_length_of_an_episode(longest, config, expected):
    data = DataFacts(("a", "b")[: len(longest)], {}, longest)
    algorithm = make_recap(data, **{"episode_steps": 0, **config})
    assert [task[0] for task in algorithm.state_dict()["tasks"].values()] == expected


def test_guidance_leaves_the_indicator_out_or_takes_it_as_given(episodes):
    """0 is the policy without the indicator, 1 the one given "positive"; in between and beyond it is linear in the velocity."""
    algorithm = make_recap(facts(episodes))
    engine = engine_of(algorithm)
    train(algorithm, engine, episodes, 30)
    policy = algorithm.acting()
    obs = episodes.windows(np.arange(10), H, (0,)).obs
    positive = {**obs, ADVANTAGE: torch.ones(10)}
    noise = policy.noise(10, torch.Generator().manual_seed(0))
    plain, given = policy.act(obs, noise).actions_BHA, policy.act(positive, noise).actions_BHA
    assert torch.equal(policy.act(positive, noise, 0.0).actions_BHA, plain) and not torch.equal(given, plain)
    assert torch.equal(policy.act(positive, noise, 1.0).actions_BHA, given)
    x_BHA, time_B = noise["start"], torch.full((10,), 0.7)
    absent, told, twice = (policy.flow(positive, guidance=g)(x_BHA, time_B)[0] for g in (0.0, 1.0, 2.0))
    torch.testing.assert_close(twice, absent + 2 * (told - absent))


def open_episodes(num=4):
    episodes, rng = Episodes(), np.random.default_rng(0)
    for _ in range(num):
        episodes.add(rng.uniform(-1, 1, 10), rng.uniform(-1, 1, 9), Outcome.OPEN)
    return episodes


def only(outcome, source=Source.POLICY, num=4):
    episodes, rng = Episodes(), np.random.default_rng(0)
    for _ in range(num):
        episodes.add(rng.uniform(-1, 1, 10), rng.uniform(-1, 1, 9), outcome, source)
    return episodes


def together(*parts):
    episodes = Episodes()
    for part in parts:
        first = len(episodes)
        for name, column in part.columns.items():
            episodes.columns[name].extend([x + first for x in column] if name == "end" else column)
    return episodes


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (open_episodes(), "no finished episode was judged"),
        (only(Outcome.UNKNOWN), "no finished episode was judged"),
        (only(Outcome.FAILURE), "no successful episode"),
        (only(Outcome.SUCCESS, Source.DEMO), "no step of the policy"),
        (only(Outcome.SUCCESS), "no failed episode"),
        (only(Outcome.SUCCESS, num=1), "no failed episode"),
        (together(only(Outcome.SUCCESS), only(Outcome.FAILURE)), ""),
    ],
)
def test_data_that_lacks_something_is_trained_on_and_told(data, said):
    algorithm = make_recap(facts(two_tasks()), ema_decay=0.0, started=False)
    engine = engine_of(algorithm)
    before = copy.deepcopy(algorithm.acting().state_dict())
    stats = train(algorithm, engine, data, 3)
    assert algorithm.advice.startswith(said) and bool(algorithm.advice) == bool(said)
    after = algorithm.acting().state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if "finished" in said:
        assert stats["value.weight"] == stats["policy.negative"] == stats["policy.judged_0"] == 0


def test_successes_that_take_longer_than_episodes_may_are_told():
    algorithm = make_recap(facts(two_tasks()), episode_steps=3)
    train(algorithm, engine_of(algorithm), together(only(Outcome.SUCCESS), only(Outcome.FAILURE)), 30)
    assert "episode_steps" in algorithm.advice


def test_needs_are_sources_by_share_within_the_episode():
    algorithm = make_recap(policy_share=0.6, operator_share=0.3, demo_share=0.1, lookahead=7)
    needs = algorithm.needs
    assert needs.shares == {(Source.POLICY,): 0.6, (Source.OPERATOR,): 0.3, (Source.DEMO,): 0.1}
    assert needs.offsets == (0, 7) and needs.within is Within.EPISODE and needs.horizon == H
    assert needs.observations == (STATE,) and list(algorithm.parts) == ["value", "policy"]


@pytest.mark.parametrize(
    "config",
    [
        {"batch_size": 0},
        {"policy_share": -0.1},
        {"lookahead": -1},
        {"episode_steps": -1},
        {"failure_cost": -1.0},
        {"positive_share": 1.0},
        {"threshold_window": 0},
        {"demonstrations": "negative"},
        {"indicator_dropout": 1.0},
        {"value_start_steps": 0},
        {"relabel_every": -1},
        {"label_places": 0},
        {"ema_decay": 1.0},
        {"value": {"low": -2.0}},
    ],
)
def test_refusals(config):
    with pytest.raises(ConfigError, match=next(iter(config))):
        make_recap(**config)


def test_a_policy_that_takes_no_advantage_is_refused():
    policy = build("mlp", {"reads": {STATE: [1]}, "action_dim": 1, "instruction_dim": 4, "width": 8})
    with pytest.raises(ConfigError, match=r"mlp.*instruction.*advantage=true"):
        Recap(policy, RecapConfig())
    assert INSTRUCTION in policy.spec.conditions


def test_from_good_and_bad_data_the_positive_policy_succeeds_where_cloning_does_not():
    """A data set in which half of the chunks lead away: without the indicator the policy does as the data did."""
    episodes = mixed(200, good=0.5)
    algorithm = make_recap(
        facts(episodes), learning_rate=2e-3, value_learning_rate=2e-3, ema_decay=0.98, value_start_steps=100, started=False
    )
    train(algorithm, engine_of(algorithm), episodes, 500)
    policy = algorithm.acting()
    cloned, positive = success(policy), success(policy, {ADVANTAGE: torch.ones(128)})
    negative = success(policy, {ADVANTAGE: -torch.ones(128)})
    guided = success(policy, {ADVANTAGE: torch.ones(128)}, guidance=2.0)
    own = np.mean(np.array(episodes.columns["outcome"])[np.array(episodes.columns["left"]) == 1] == Outcome.SUCCESS)
    assert abs(cloned - own) < 0.2 and positive > cloned + 0.4 and positive > 0.8
    assert negative < cloned and guided >= positive - 0.05
