import numpy as np
import pytest
import torch

from algorithms.advantages import Labels, Thresholds, lookahead_advantage, normalised_return
from fleet.batch import Outcome
from tests.batches import make_batch, take_rows

OPEN, FAILURE, SUCCESS, UNKNOWN, ABORTED = (int(o) for o in Outcome)


def episode(length, outcome, lookahead, *, judged=True):
    """A row for each step of one episode."""
    inside_B = torch.arange(length) + lookahead < length
    return make_batch(
        {},
        torch.zeros(length, 1, 1),
        inside_at={lookahead: inside_B},
        steps_to_go_B=torch.arange(length, 0, -1) if outcome != OPEN else torch.full((length,), -1),
        outcome_B=torch.full((length,), outcome),
    )


def returns(batch, length, cost):
    n = len(batch.step_B)
    return normalised_return(batch, torch.full((n,), float(length)), torch.full((n,), float(cost)))


def advantages(batch, value_B, length, cost, lookahead):
    """With V at the last step inside where the lookahead leaves the episode, as windows have it."""
    n = len(value_B)
    later_B = value_B[torch.clamp(torch.arange(n) + lookahead, max=n - 1)]
    length_B = torch.full((n,), float(length))
    return lookahead_advantage(batch, value_B, later_B, returns(batch, length, cost), length_B, lookahead)


def test_returns_by_hand():
    assert returns(episode(4, SUCCESS, 2), 8, 8).tolist() == [-3 / 8, -2 / 8, -1 / 8, 0.0]
    assert returns(episode(3, FAILURE, 2), 4, 4).tolist() == [-1.5, -1.25, -1.0]
    assert returns(episode(3, FAILURE, 2), 4, 1).tolist() == [-0.75, -0.5, -0.25]
    for outcome in (OPEN, UNKNOWN, ABORTED):
        assert returns(episode(3, outcome, 2), 4, 4).isnan().all()


@pytest.mark.parametrize("lookahead", [0, 1, 4, 9, 10, 50])
@pytest.mark.parametrize(("outcome", "cost"), [(SUCCESS, 20), (FAILURE, 7)])
def test_a_perfect_value_finds_no_step_better_than_another(lookahead, outcome, cost):
    batch = episode(10, outcome, lookahead)
    advantage_B = advantages(batch, returns(batch, 20, cost), 20, cost, lookahead)
    torch.testing.assert_close(advantage_B, torch.zeros(10), rtol=0, atol=1e-7)


def test_advantages_by_hand():
    """Lookahead 2 in an episode of 4 steps, L = 10, where the third step loses much."""
    value_B = torch.tensor([-0.3, -0.2, -0.1, -0.9])
    ahead = [-0.2 - 0.1 + 0.3, -0.2 - 0.9 + 0.2]
    expected = {
        SUCCESS: [*ahead, -0.1 + 0.1, 0.0 + 0.9],
        FAILURE: [*ahead, -0.1 - 0.5 + 0.1, -0.5 + 0.9],
        UNKNOWN: [*ahead, -0.1 - 0.9 + 0.1, np.nan],  # of the last step nothing is known
        ABORTED: [*ahead, -0.1 - 0.9 + 0.1, np.nan],
        OPEN: [*ahead, np.nan, np.nan],
    }
    for outcome, values in expected.items():
        found_B = advantages(episode(4, outcome, 2), value_B, 10, 5, 2)
        torch.testing.assert_close(found_B, torch.tensor(values), equal_nan=True, rtol=0, atol=1e-6)


def test_to_the_end_of_the_episode():
    batch, value_B = episode(3, SUCCESS, 0), torch.tensor([-0.5, -0.5, -0.5])
    batch.inside_at = {}
    found_B = lookahead_advantage(batch, value_B, value_B, returns(batch, 10, 10), torch.full((3,), 10.0), 0)
    torch.testing.assert_close(found_B, torch.tensor([0.3, 0.4, 0.5]))


def follow(thresholds, draw, num_batches, rows=128, num_tasks=1):
    """Feeds batches; returns the share above the threshold of the last half, by task."""
    above = []
    for number in range(num_batches):
        task_B, advantage_B, judged_B = draw(number, rows)
        stats = thresholds.stats(task_B, advantage_B, judged_B)
        read = {name: float(top / max(float(weight), 1e-9)) for name, (top, weight) in stats.items()}
        above.append([read[f"above_{k}"] for k in range(num_tasks)])
        thresholds.update(read, rows)
    return np.mean(above[num_batches // 2 :], 0)


def distributions(rng, task):
    """Three kinds of advantages: normal, skewed (few failures far below), and near zero with a rare lump above."""
    if task == 0:
        return rng.normal(0.02, 0.05)
    if task == 1:
        return -0.6 if rng.random() < 0.1 else rng.normal(0.0, 0.004)
    return rng.normal(-0.1, 0.01) if rng.random() < 0.8 else rng.normal(0.1, 0.01)


@pytest.mark.parametrize(("share", "scale"), [(0.1, 1.0), (0.3, 0.01), (0.3, 1.0), (0.3, 10.0), (0.4, 1.0)])
def test_thresholds_are_the_quantiles_of_each_task(share, scale):
    rng = np.random.default_rng(0)
    samples = scale * np.array([[distributions(rng, task) for _ in range(4000)] for task in range(3)], np.float32)

    def draw(number, rows):
        task_B, which_B = rng.integers(3, size=rows), rng.integers(4000, size=rows)
        advantage_B = samples[task_B, which_B]
        return torch.from_numpy(task_B), torch.from_numpy(advantage_B), torch.ones(rows, dtype=torch.bool)

    thresholds = Thresholds(3, share)
    follow(thresholds, draw, 400, num_tasks=3)
    for task in range(3):
        found = (samples[task] > thresholds.state(task)[0]).mean()
        assert abs(found - share) < 0.05, (task, found)
        low, high = np.quantile(samples[task], [1 - share - 0.05, 1 - share + 0.05])
        assert low <= thresholds.state(task)[0] <= high, task


def test_thresholds_follow_values_that_drift():
    """The mean moves by 6 deviations."""
    rng = np.random.default_rng(1)

    def draw(number, rows):
        advantage_B = torch.from_numpy(rng.normal(0.001 * number, 0.05, rows)).float()
        return torch.zeros(rows, dtype=torch.long), advantage_B, torch.ones(rows, dtype=torch.bool)

    thresholds = Thresholds(1, 0.3, window=1024)
    share = follow(thresholds, draw, 300)
    assert abs(share[0] - 0.3) < 0.08
    assert thresholds.state(0)[0] == pytest.approx(np.quantile(rng.normal(0.3, 0.05, 20000), 0.7), abs=0.03)


def test_thresholds_move_by_judged_steps_alone_and_stay_where_there_are_none():
    thresholds = Thresholds(2, 0.3)
    task_B, advantage_B = torch.tensor([0, 0, 1, 1]), torch.tensor([5.0, np.nan, np.nan, 9.0])
    judged_B = torch.tensor([True, False, False, False])
    stats = thresholds.stats(task_B, advantage_B, judged_B)
    assert [float(x) for x in stats["judged_0"]] == [1, 4] and [float(x) for x in stats["above_1"]] == [0, 0]
    thresholds.update({name: float(a / b) if b else 0.0 for name, (a, b) in stats.items()}, 4)
    assert thresholds.state(0)[0] > 0 and thresholds.state(0)[2] == 1
    assert thresholds.state(1) == Thresholds(1, 0.3).state(0)


def test_thresholds_of_equal_advantages_stay_finite():
    thresholds = Thresholds(1, 0.3)
    equal = (torch.zeros(8, dtype=torch.long), torch.full((8,), -0.25), torch.ones(8, dtype=torch.bool))
    follow(thresholds, lambda number, rows: equal, 500, rows=8)
    assert thresholds.state(0)[0] == pytest.approx(-0.25, abs=0.05)


def test_thresholds_come_away_from_advantages_that_were_alike_for_long():
    rng = np.random.default_rng(2)

    def draw(number, rows):
        advantage_B = torch.from_numpy(rng.normal(0.0, 0.05, rows) if number >= 1000 else np.full(rows, -0.25)).float()
        return torch.zeros(rows, dtype=torch.long), advantage_B, torch.ones(rows, dtype=torch.bool)

    thresholds = Thresholds(1, 0.3)
    follow(thresholds, draw, 1300)
    assert thresholds.state(0)[0] == pytest.approx(0.05 * 0.524, abs=0.01)


def rows_of_steps(steps, outcome=SUCCESS):
    step_B = torch.tensor(steps)
    actions = torch.stack([step_B * 0.25, -step_B.float()], 1)[:, None]
    return make_batch({}, actions, step_B=step_B, frame_B=step_B % 50, outcome_B=torch.full_like(step_B, outcome))


def test_labels_are_found_until_they_are_out_of_date():
    table = Labels(64, max_age=10)
    batch = rows_of_steps([3, 70, 41])
    assert not table.look_up(batch, 0)[1].any()
    table.put(batch, torch.tensor([0.1, np.nan, -0.3]), now=100)
    advantage_B, fresh_B = table.look_up(batch, 109)
    assert fresh_B.tolist() == [True, False, True]  # what is not known is not kept
    assert advantage_B[fresh_B].tolist() == pytest.approx([0.1, -0.3])
    assert not table.look_up(batch, 110)[1].any()


def test_a_label_is_of_one_step_with_one_outcome():
    table, batch = Labels(64, max_age=10), rows_of_steps([3, 41])
    table.put(batch, torch.tensor([0.1, -0.3]), now=0)
    for name in ("frame_B", "outcome_B"):
        other = take_rows(batch, [0, 1])
        setattr(other, name, getattr(batch, name) + torch.tensor([1, 0]))
        assert table.look_up(other, 0)[1].tolist() == [False, True], name
    other = take_rows(batch, [0, 1])
    other.actions_BHA[0, 0, 1] += 1e-6  # numbers of steps were given anew
    assert table.look_up(other, 0)[1].tolist() == [False, True]
    moved = take_rows(batch, [0, 1])
    moved.step_B = moved.step_B + 64
    assert not table.look_up(moved, 0)[1].any()


def test_the_table_is_bounded_and_the_last_of_one_place_stays():
    table = Labels(4, max_age=10)
    batch = rows_of_steps(list(range(40)))
    table.put(batch, torch.arange(40) / 40.0, now=0)
    advantage_B, fresh_B = table.look_up(batch, 0)
    assert torch.nonzero(fresh_B)[:, 0].tolist() == [36, 37, 38, 39]
    torch.testing.assert_close(advantage_B[36:], torch.arange(36, 40) / 40.0)
    assert sum(value.numel() for value in table.state_dict().values()) == 12
    other = Labels(4, max_age=10)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.look_up(batch, 0)[1], fresh_B)
    larger = Labels(8, max_age=10)
    larger.load_state_dict(table.state_dict())
    assert not larger.look_up(batch, 0)[1].any()
