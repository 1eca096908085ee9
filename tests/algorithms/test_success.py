"""The success classifier's mathematics: bounds, thresholds, calibration."""

import math

import numpy as np
import pytest
import torch

from algorithms.success import (
    MAX_TEMPERATURE,
    SuccessClassifier,
    SuccessConfig,
    Thresholds,
    calibration_error,
    choose_thresholds,
    episode_scores,
    episodes_needed,
    fit_temperature,
    upper_bound,
)
from fleet.errors import ConfigError, NoData


@pytest.mark.parametrize(
    ("mistakes", "num", "confidence", "bound"),
    [  # of none in n it is 1 - (1 - confidence)^(1/n); the others are quantiles of Beta(k + 1, n - k)
        (0, 24, 0.95, 1 - 0.05 ** (1 / 24)),
        (0, 299, 0.95, 0.009969147),
        (3, 60, 0.95, 0.124187210),
        (1, 10, 0.9, 0.336847713),
        (5, 5, 0.95, 1.0),
        (0, 0, 0.95, 1.0),
    ],
)
def test_the_bound_is_clopper_and_pearsons(mistakes, num, confidence, bound):
    assert upper_bound(mistakes, num, confidence) == pytest.approx(bound, rel=1e-6)


def test_episodes_needed_are_the_fewest_whose_bound_is_the_rate():
    for rate in (0.5, 0.1, 0.01, 0.001):
        needed = episodes_needed(rate)
        assert upper_bound(0, needed) <= rate < upper_bound(0, needed - 1)


def test_the_stated_rate_holds_on_fresh_episodes_as_often_as_stated(scale):
    """In at most 5 % of all runs more failures pass than the bound of the held-out ones says, whatever was allowed."""
    rng, repeats = np.random.default_rng(0), 400 * scale
    for allowed, num_failures in ((0.1, 40), (0.05, 20)):  # 20: too few, so that less is sure
        broken = 0
        for _ in range(repeats):
            failed, succeeded = torch.tensor(rng.normal(size=num_failures)), torch.tensor(rng.normal(size=30) - 1.0)
            score, success = torch.cat([failed, succeeded]), torch.arange(num_failures + 30) >= num_failures
            thresholds = choose_thresholds(score, success, allowed, 0.1)
            sure, _ = thresholds.errors(score, success, 0.95)
            rate = 0.5 * math.erfc(thresholds.success_above / math.sqrt(2))  # of all failures
            broken += rate > sure.at_most
            assert sure.at_most <= allowed or sure.mistakes == 0
        assert broken / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
        assert broken > 0  # else the bound would be no bound at this confidence but something wider


def test_thresholds_allow_as_many_mistakes_as_the_rate_does():
    failed, succeeded = torch.arange(200.0), torch.arange(100.0, 300.0)
    score, success = torch.cat([failed, succeeded]), torch.arange(400) >= 200
    thresholds = choose_thresholds(score, success, 0.05, 0.05)
    (passed, _), allowed = thresholds.errors(score, success, 0.95), 4  # upper_bound(4, 200) = 0.045, of 5: 0.052
    assert passed.mistakes == allowed and passed.at_most <= 0.05 < upper_bound(allowed + 1, 200)
    assert thresholds.success_above == 195 and thresholds.failure_below == 104
    assert thresholds.judge(torch.tensor([195.5, 195.0, 104.0, 103.5, math.nan])).tolist() == [1, -1, -1, 0, -1]


def test_between_sides_that_lie_apart_nothing_is_left_open():
    score, success = torch.tensor([-3.0, -2.0, 4.0, 6.0]), torch.tensor([False, False, True, True])
    assert choose_thresholds(score, success, 0.01, 0.01) == Thresholds(1.0, 1.0)


def test_thresholds_need_both_sides_and_rates_that_can_be():
    score = torch.tensor([1.0, 2.0])
    for success in ([True, True], [False, False]):
        with pytest.raises(NoData, match="successful"):
            choose_thresholds(score, torch.tensor(success), 0.01, 0.05)
    with pytest.raises(ConfigError, match="false_negatives is 0"):
        choose_thresholds(score, torch.tensor([True, False]), 0.01, 0.0)


def test_the_temperature_repairs_logits_that_are_too_sure():
    """Of logits that were right and then blown up by 6, 6 is found, and the calibration error falls to what chance leaves."""
    rng = np.random.default_rng(1)
    logit = torch.tensor(rng.normal(size=4000) * 1.5)
    success = torch.tensor(rng.random(4000)) < logit.sigmoid()
    temperature = fit_temperature(6 * logit, success)
    assert temperature == pytest.approx(6, rel=0.15)
    before, after = (calibration_error((6 * logit / t).sigmoid(), success) for t in (1.0, temperature))
    assert before > 0.15 and after < 0.03


def test_the_temperature_of_sides_without_a_mistake_is_finite_and_says_how_few_there_were():
    """With n of each side a mean score is p = (n + 1) / (n + 2) of success, Platt's target."""
    for num in (3, 300):
        score, success = torch.tensor([8.0] * num + [-8.0] * num), torch.arange(2 * num) < num
        p = torch.tensor(8.0 / fit_temperature(score, success)).sigmoid()
        assert p.item() == pytest.approx((num + 1) / (num + 2), abs=1e-4)
    hopeless = fit_temperature(torch.tensor([-1.0, 1.0]), torch.tensor([True, False]))  # always wrong
    assert hopeless == pytest.approx(MAX_TEMPERATURE, rel=1e-3)


def test_the_calibration_error_by_hand():
    p, success = torch.tensor([0.95, 0.95, 0.15, 0.15]), torch.tensor([True, False, False, False])
    assert calibration_error(p, success) == pytest.approx((0.9 + 0.3) / 4)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0


def test_an_episodes_score_is_the_mean_of_its_rows_in_any_order():
    score = episode_scores(torch.tensor([1.0, 5.0, 3.0, -2.0]), torch.tensor([0, 2, 0, 2]), 3)
    assert score[[0, 2]].tolist() == [2.0, 1.5] and score[1].isnan()


def test_the_loss_teaches_the_classifier_by_instruction():
    """The same state is a success of one task and none of the other."""
    torch.manual_seed(0)
    classifier = SuccessClassifier(SuccessConfig({"observation.state": (1,)}, 2, width=32))
    obs = {"observation.state": torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]), "instruction": torch.eye(2)[[0, 0, 1, 1]]}
    success = torch.tensor([False, True, True, False])
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
    for _ in range(60):
        loss = classifier.loss(obs, success)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((classifier(obs) > 0) == success).all() and loss < 0.05


def test_a_classifier_of_no_step_is_refused():
    with pytest.raises(ConfigError, match="last 0"):
        SuccessClassifier(SuccessConfig({"observation.state": (1,)}, 0, last=0))
