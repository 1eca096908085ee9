"""Rewards of hand-made episodes, seen through windows of four steps."""

import math

import pytest
import torch

from algorithms.rewards import Rewards, RewardWatch
from fleet.batch import Outcome
from fleet.errors import ConfigError
from tests.batches import make_batch, take_rows

HORIZON = 4
END, TIME_LIMIT, NEITHER = "terminated", "truncated", ""


def episode(length, outcome, end, *, rewards=None, finished=True, discount=0.9):
    """Windows at every step of one episode, whose last step says how it ended."""
    rewards = torch.zeros(length) if rewards is None else torch.tensor(rewards, dtype=torch.float32)
    index = torch.arange(length)[:, None] + torch.arange(HORIZON)
    mask = index < length
    index = index.clamp(max=length - 1)
    last = (index == length - 1) & mask
    total = [sum(discount**i * r for i, r in enumerate(rewards[t:].tolist())) for t in range(length)]
    return make_batch(
        {},
        torch.zeros(length, HORIZON, 1),
        mask_BH=mask,
        rewards_BH=rewards[index] * mask,
        terminated_BH=last & (end == END),
        truncated_BH=last & (end == TIME_LIMIT),
        terminated_B=torch.full((length,), end == END),
        steps_to_go_B=length - torch.arange(length) if finished else torch.full((length,), -1),
        outcome_B=torch.full((length,), int(outcome), dtype=torch.int8),
        return_B=torch.tensor(total) if finished else torch.full((length,), math.nan),
    )


def returns_by_hand(rewards, batch):
    """Returns-to-go of one whole episode from the first step of each window."""
    reward_T, total, found = rewards.rewards_BH(batch)[:, 0].tolist(), 0.0, []
    for reward in reversed(reward_T):
        total = reward + rewards.discount * total
        found.append(total)
    return torch.tensor(found[::-1])


def test_success_is_rewarded_in_the_last_step_alone_and_ends_the_task():
    batch, rewards = episode(6, Outcome.SUCCESS, END), Rewards("success", discount=0.9)
    assert rewards.rewards_BH(batch).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    assert torch.equal(rewards.terminal_BH(batch), rewards.rewards_BH(batch) == 1)
    torch.testing.assert_close(rewards.return_B(batch), 0.9 ** torch.arange(5.0, -1, -1))


def test_steps_cost_one_each_and_a_failed_end_its_cost():
    rewards = Rewards("steps", discount=1.0, failure_cost=7.0, timeouts="end")
    success, failure = episode(5, Outcome.SUCCESS, END), episode(5, Outcome.FAILURE, END)
    assert rewards.rewards_BH(success)[1].tolist() == [-1, -1, -1, 0]
    assert rewards.rewards_BH(failure)[1].tolist() == [-1, -1, -1, -7]
    assert rewards.rewards_BH(failure)[3].tolist() == [-1, -7, 0, 0]  # nothing beyond the end
    assert rewards.return_B(success).tolist() == [-4, -3, -2, -1, 0]
    assert rewards.return_B(failure).tolist() == [-11, -10, -9, -8, -7]


@pytest.mark.parametrize("kind", ["environment", "success", "steps"])
@pytest.mark.parametrize("discount", [0.9, 0.999, 1.0])
@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.FAILURE])
def test_the_return_is_the_sum_of_the_rewards(kind, discount, outcome):
    costs = {"failure_cost": 4.0} if kind == "steps" else {"step_cost": 0.25}
    rewards = Rewards(kind, discount, scale=3.0, timeouts="end", **costs)
    batch = episode(7, outcome, END, rewards=[0.5, -1, 0, 2, 0, 0, 1], discount=discount)
    torch.testing.assert_close(rewards.return_B(batch), returns_by_hand(rewards, batch), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "outcome", "end", "timeouts", "is_end"),
    [
        ("success", Outcome.SUCCESS, TIME_LIMIT, "bootstrap", True),  # judged by a person after the time limit
        ("success", Outcome.FAILURE, TIME_LIMIT, "bootstrap", False),
        ("success", Outcome.FAILURE, TIME_LIMIT, "end", True),
        ("success", Outcome.FAILURE, END, "bootstrap", True),
        ("success", Outcome.FAILURE, NEITHER, "bootstrap", False),  # a person called an aborted episode a failure
        ("success", Outcome.FAILURE, NEITHER, "end", True),
        ("steps", Outcome.SUCCESS, NEITHER, "bootstrap", True),
        ("steps", Outcome.UNKNOWN, TIME_LIMIT, "end", False),
        ("steps", Outcome.UNKNOWN, END, "bootstrap", True),
        ("steps", Outcome.ABORTED, NEITHER, "end", False),
        ("environment", Outcome.SUCCESS, TIME_LIMIT, "bootstrap", False),  # the environment says what its rewards mean
        ("environment", Outcome.UNKNOWN, TIME_LIMIT, "end", True),
        ("environment", Outcome.FAILURE, END, "bootstrap", True),
        ("environment", Outcome.ABORTED, NEITHER, "end", False),
    ],
)
def test_which_last_steps_end_the_task(kind, outcome, end, timeouts, is_end):
    batch, rewards = episode(6, outcome, end), Rewards(kind, 0.9, timeouts=timeouts)
    terminal_BH = rewards.terminal_BH(batch)
    assert terminal_BH.any().item() is is_end
    assert not terminal_BH[0].any() and terminal_BH[2].tolist() == [False, False, False, is_end]


def test_a_time_out_that_was_judged_a_failure_goes_on_for_ever_or_ends():
    batch = episode(6, Outcome.FAILURE, TIME_LIMIT)
    endless = Rewards("steps", 0.9, failure_cost=50.0)
    assert endless.rewards_BH(batch)[2].tolist() == [-1, -1, -1, -1]  # the clock is not the task: no cost of failing
    torch.testing.assert_close(endless.return_B(batch), torch.full((6,), -10.0))
    ended = Rewards("steps", 0.9, failure_cost=50.0, timeouts="end")
    assert ended.rewards_BH(batch)[2].tolist() == [-1, -1, -1, -50]
    torch.testing.assert_close(ended.return_B(batch), returns_by_hand(ended, batch))
    assert Rewards("success", 0.9).return_B(batch).tolist() == [0] * 6
    torch.testing.assert_close(Rewards("success", 0.9, step_cost=0.5).return_B(batch), torch.full((6,), -5.0))


def test_a_cut_of_equal_rewards_goes_on_for_ever_in_the_environments_units_too():
    rewards = Rewards("environment", 0.9, scale=2.0, step_cost=1.0)
    for outcome in (Outcome.FAILURE, Outcome.UNKNOWN):
        cut = episode(6, outcome, TIME_LIMIT, rewards=[-1.0] * 6)
        torch.testing.assert_close(rewards.return_B(cut), torch.full((6,), -30.0))
    # From where the rewards are alike; before, the sum up to the cut is all that is known.
    mixed = episode(6, Outcome.FAILURE, TIME_LIMIT, rewards=[0, 5, -1, -1, -1, -1])
    by_hand = returns_by_hand(rewards, mixed)
    torch.testing.assert_close(rewards.return_B(mixed), torch.cat([by_hand[:2], torch.full((4,), -30.0)]))
    for other in (episode(6, Outcome.FAILURE, END, rewards=[-1.0] * 6), episode(6, Outcome.SUCCESS, END, rewards=[-1.0] * 6)):
        torch.testing.assert_close(rewards.return_B(other), returns_by_hand(rewards, other))


def test_of_what_nobody_knows_the_end_there_is_no_return():
    for kind in ("success", "steps"):
        for outcome, end, finished in (
            (Outcome.OPEN, NEITHER, False),
            (Outcome.SUCCESS, NEITHER, False),  # a label came before the end
            (Outcome.ABORTED, NEITHER, True),
            (Outcome.UNKNOWN, TIME_LIMIT, True),
        ):
            batch = episode(5, outcome, end, finished=finished)
            assert Rewards(kind, 0.9).return_B(batch).isnan().all()
            assert not Rewards("success", 0.9).rewards_BH(batch).any() and not Rewards(kind, 0.9).terminal_BH(batch).any()
    environment = Rewards("environment", 0.9)
    assert environment.return_B(episode(5, Outcome.OPEN, NEITHER, finished=False, rewards=[1.0] * 5)).isnan().all()
    assert environment.return_B(episode(5, Outcome.ABORTED, NEITHER, rewards=[1.0] * 5)).isnan().all()
    assert environment.return_B(episode(5, Outcome.UNKNOWN, END, rewards=[0, 0, 0, 0, 1.0]))[4] == 1


def test_a_label_changes_rewards_that_were_recorded_before():
    batch, rewards = episode(6, Outcome.UNKNOWN, TIME_LIMIT), Rewards("success", 0.9)
    assert not rewards.rewards_BH(batch).any()
    batch.outcome_B.fill_(int(Outcome.SUCCESS))
    assert rewards.rewards_BH(batch).sum() == 4 and rewards.terminal_BH(batch).sum() == 4


def test_where_the_mask_ends_a_window_early_nothing_is_rewarded_or_ended():
    batch = episode(6, Outcome.SUCCESS, END, rewards=[1.0] * 6)
    batch.mask_BH[:, 2:] = False  # an operator took over
    for kind in ("environment", "success", "steps"):
        rewards = Rewards(kind, 0.9)
        assert not rewards.rewards_BH(batch)[:, 2:].any() and not rewards.terminal_BH(batch)[:, 2:].any()
    assert Rewards("success", 0.9).rewards_BH(batch)[4].tolist() == [0, 1, 0, 0]


def test_rows_do_not_see_each_other():
    batch, rewards = episode(6, Outcome.FAILURE, TIME_LIMIT, rewards=[-1.0] * 6), Rewards("environment", 0.9)
    rows = [4, 1]
    assert torch.equal(rewards.return_B(take_rows(batch, rows)), rewards.return_B(batch)[rows])
    assert torch.equal(rewards.rewards_BH(take_rows(batch, rows)), rewards.rewards_BH(batch)[rows])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "sparse"}, "sparse"),
        ({"timeouts": "ignore"}, "ignore"),
        ({"discount": 0.0}, "discount"),
        ({"discount": 1.01}, "discount"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"step_cost": -1.0}, "step_cost"),
        ({"kind": "steps", "step_cost": 1.0}, "step_cost"),
        ({"kind": "steps", "failure_cost": math.inf}, "failure_cost"),
        ({"kind": "steps", "discount": 1.0}, "discount 1"),
        ({"step_cost": 1.0, "discount": 1.0}, "discount 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, named):
    with pytest.raises(ConfigError, match=named):
        Rewards(**fields)


def advice_on(rewards, *batches, updates=RewardWatch.MIN_UPDATES, **options):
    """What the watch says of batches that come in turn, each reduced as the engine reduces stats."""
    watch = RewardWatch(rewards, **options)
    for update in range(updates):
        sums = rewards.stats(batches[update % len(batches)])
        watch.see({name: (total / weight if weight else total * 0).item() for name, (total, weight) in sums.items()})
    return watch.advice


WON, LOST = episode(6, Outcome.SUCCESS, END), episode(6, Outcome.FAILURE, TIME_LIMIT)
PAID = episode(6, Outcome.SUCCESS, END, rewards=[0, 0, 0, 0, 0, 1.0])
UNPAID = episode(6, Outcome.FAILURE, TIME_LIMIT, rewards=[0.0] * 6)


@pytest.mark.parametrize(
    ("rewards", "batches", "said"),
    [
        (Rewards("success", 0.9), (WON, LOST), ""),
        (Rewards("steps", 0.9), (WON, LOST), ""),
        (Rewards("environment", 0.9), (PAID, UNPAID), ""),
        (Rewards("success", 0.9), (episode(6, Outcome.UNKNOWN, TIME_LIMIT),), "no episode has ended and was judged"),
        (Rewards("environment", 0.9), (episode(6, Outcome.OPEN, NEITHER, finished=False),), "no episode has ended:"),
        (Rewards("success", 0.9), (LOST,), "no successful episode yet"),
        (Rewards("steps", 0.9), (WON,), "no failed episode yet"),
        (Rewards("environment", 0.9), (UNPAID,), "all rewards of the robots are 0"),
        (Rewards("environment", 0.9), (episode(6, Outcome.FAILURE, TIME_LIMIT, rewards=[-1.0] * 6),), "every reward is -1 and"),
        (Rewards("environment", 0.9), (episode(6, Outcome.SUCCESS, END, rewards=[1.0] * 6),), "longer episodes are always"),
        (Rewards("environment", 0.9), (episode(6, Outcome.SUCCESS, END, rewards=[-1.0] * 6),), ""),  # the sooner the better
        (
            Rewards("environment", 0.9),
            (episode(6, Outcome.SUCCESS, END, rewards=[0, 0, 0, 0, 0, -1.0]), UNPAID),
            "the sign of the rewards is wrong",
        ),
        (Rewards("environment", 0.9, scale=1e5), (PAID, UNPAID), "returns are of the size of 1e5: critics learn"),
        (Rewards("environment", 0.9, scale=1e-4), (PAID, UNPAID), "multiply reward_scale by 1e4"),
    ],
)
def test_rewards_from_which_nothing_can_be_learnt_are_noticed(rewards, batches, said):
    advice = advice_on(rewards, *batches)
    assert said in advice if said else advice == ""
    assert advice_on(rewards, *batches, updates=RewardWatch.MIN_UPDATES - 1) == ""


def test_a_lack_that_is_over_is_not_spoken_of_any_more_and_sentences_do_not_flicker():
    rewards = Rewards("success", 0.9)
    watch = RewardWatch(rewards)
    said = []
    for batch in [LOST] * 30 + [WON] * 30:
        sums = rewards.stats(batch)
        watch.see({name: (total / weight if weight else total * 0).item() for name, (total, weight) in sums.items()})
        said.append(watch.advice)
    assert len(set(said[19:30])) == 1 and set(said[30:]) == {""}


def test_an_algorithm_that_scales_returns_itself_is_not_told_of_their_size():
    assert advice_on(Rewards("environment", 0.9, scale=1e5), PAID, UNPAID, any_size=True) == ""
