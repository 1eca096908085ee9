"""What a batch may ask for: values out of range are named before anything is drawn."""

from __future__ import annotations

import pytest

from fleet.batch import Adaptive, BatchNeeds, Priority
from fleet.errors import ConfigError
from fleet.robot import Source

GOOD = {"batch_size": 4, "horizon": 2, "observations": (), "shares": {(Source.DEMO,): 1.0}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("horizon", 0),
        ("shares", {(Source.DEMO,): -1.0, (Source.POLICY,): 2.0}),
        ("shares", {(Source.DEMO,): 0.0}),
        ("offsets", (1, 2)),
        ("offsets", (0, 0)),
        ("discount", 0.0),
        ("discount", 1.01),
        ("cached_share", 1.0),
        ("cached_share", -0.1),
    ],
)
def test_a_batch_out_of_range_names_value_and_rule(name, value):
    BatchNeeds(**GOOD)
    with pytest.raises(ConfigError, match=name) as caught:
        BatchNeeds(**{**GOOD, name: value})
    assert caught.value.rule


def test_an_adaptive_batch_needs_no_shares():
    assert BatchNeeds(**{**GOOD, "shares": {}}, adaptive=Adaptive()).adaptive == Adaptive()


@pytest.mark.parametrize("make", [lambda: Priority(alpha=-1), lambda: Priority(beta=float("nan")), lambda: Adaptive(window=0)])
def test_rules_of_drawing_out_of_range(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("low_high", [(0.9, 0.1), (-0.1, 0.5), (0.5, 1.5)])
def test_a_clip_range_is_a_range(low_high):
    with pytest.raises(ConfigError, match="clip range"):
        Adaptive(low=low_high[0], high=low_high[1])
