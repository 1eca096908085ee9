"""The rate limiter against Reverb's definition, and what it says."""

import json
import math

import numpy as np
import pytest

from buffer.rate import RateLimiter, State
from fleet.errors import ConfigError


def reverb_can_sample(spi, min_size, error_buffer, inserts, samples, num):
    """SampleToInsertRatio as Reverb defines it: ``inserts`` counts those of stage 1 too."""
    return inserts >= min_size and inserts * spi - samples - num >= spi * min_size - error_buffer


def test_it_samples_exactly_when_reverb_would(scale):
    rng = np.random.default_rng(0)
    held = free = 0
    for _ in range(50 * scale):
        spi, num = float(rng.choice([0.25, 1, 2, 32])), int(rng.choice([1, 8, 32]))
        min_size, error_buffer = int(rng.integers(1, 50)), max(1.0, spi) * float(rng.choice([1, 3, 40]))
        limiter = RateLimiter(spi, min_size, error_buffer)
        limiter.begin()
        inserts, samples = min_size, 0
        for _ in range(200):
            if rng.random() < 0.5:
                new = int(rng.integers(1, 4))
                limiter.insert(new)
                inserts += new
            expected = reverb_can_sample(spi, min_size, error_buffer, inserts, samples, num)
            assert (limiter.wait_for(inserts, num) is None) == expected
            held, free = held + (not expected), free + expected
            if expected:
                limiter.sample(num)
                samples += num
    assert held > 500 * scale and free > 500 * scale


def test_one_window_a_step_is_one_pass_at_the_middle_of_the_range():
    limiter = RateLimiter(256, 200, 200 * 256)
    limiter.begin()
    updates = 0
    while limiter.wait_for(200, 256) is None:
        limiter.sample(256)
        updates += 1
    assert updates == 200  # the error buffer in updates
    limiter.insert(3)
    for _ in range(3):
        assert limiter.wait_for(203, 256) is None
        limiter.sample(256)
    assert "1 more steps" in limiter.wait_for(203, 256)


def test_each_state_is_said_once_when_it_begins_and_when_it_ends():
    limiter = RateLimiter(2, 1, 20)
    limiter.begin()
    for _ in range(50):  # the learner lives from hand to mouth: held after each update, one line in all
        while limiter.wait_for(100, 4) is None:
            limiter.sample(4)
        limiter.insert(2)
    news = limiter.news()
    assert [line["state"] for line in news] == ["learner ahead"] and "waits for robots" in news[0]["why"]
    assert "samples_per_insert 2" in news[0]["why"] and "error_buffer 20" in news[0]["why"]
    limiter.insert(12)
    assert limiter.wait_for(100, 4) is None and [line["state"] for line in limiter.news()] == ["in range"]
    for _ in range(5):
        limiter.insert(10)
        assert limiter.wait_for(100, 4) is None  # robots ahead: nobody is held
    news = limiter.news()
    assert [line["state"] for line in news] == ["robots ahead"] and "no robot is held" in news[0]["why"]
    assert news[0]["cursor"] > 20
    while limiter.cursor > 0:
        limiter.sample(4)
    assert limiter.wait_for(100, 4) is None and [line["state"] for line in limiter.news()] == ["in range"]
    assert limiter.news() == []
    json.dumps(news)


def test_no_ratio_no_limit_but_a_smallest_size():
    limiter = RateLimiter(0, 10, 1)
    limiter.begin()
    limiter.sample(10**9)
    assert limiter.wait_for(10, 256) is None and limiter.news() == []
    for _ in range(3):
        assert "min_size_to_sample is 10" in limiter.wait_for(9, 256)
    assert limiter.wait_for(10, 256) is None
    assert [line["state"] for line in limiter.news()] == ["buffer too small", "in range"]


def test_state_goes_on_and_means_nothing_for_another_ratio():
    first = RateLimiter(2, 1, 20)
    first.begin()
    first.insert(100)
    first.wait_for(100, 1)
    first.sample(170)
    state = json.loads(json.dumps(first.counts()))
    second = RateLimiter(2, 1, 20)
    second.load(state)
    assert second.cursor == first.cursor == 30 and second.state is State.ROBOTS_AHEAD
    assert second.wait_for(100, 1) is None and second.news() == []  # it was said already
    other = RateLimiter(4, 1, 20)
    other.load(state)
    assert other.cursor == 0 and other.state is State.IN_RANGE


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((-1, 1, 10), "samples_per_insert = -1"),
        ((math.nan, 1, 10), "samples_per_insert = nan"),
        ((math.inf, 1, 10), "samples_per_insert = inf"),
        ((1, 0, 10), "min_size_to_sample = 0"),
        ((256, 1, 255), r"error_buffer = 255.*>= max\(1, samples_per_insert\) = 256"),
        ((0.1, 1, 0.5), "error_buffer = 0.5"),
        ((1, 1, math.inf), "error_buffer = inf"),
    ],
)
def test_a_bad_argument_is_named_with_its_rule(arguments, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        RateLimiter(*arguments)
    assert caught.value.rule
