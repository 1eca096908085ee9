import dataclasses
import math

import numpy as np
import pytest

from buffer.draw import draw_part
from buffer.mixture import OnlineShare, loss_table, share_of
from fleet.batch import Adaptive, BatchNeeds, Windows
from fleet.errors import ConfigError, LearnerError
from fleet.robot import Source
from tests.buffer.chi_square import assert_drawn_as

P, O, S, D = Source.POLICY, Source.OPERATOR, Source.SCRIPT, Source.DEMO  # noqa: E741


def table_of(task_B, source_B, loss_B, shard_weight=1.0):
    """The table of a batch of which nothing else matters."""
    fields = {field.name: None for field in dataclasses.fields(Windows)}
    fields |= {"task_B": np.array(task_B), "source_B": np.array(source_B, np.uint8), "index_B": np.arange(len(task_B))}
    fields["shard_weight"] = shard_weight
    return loss_table(Windows(**fields), np.array(loss_B), 5)


def fed(mixture, losses, task=0):
    """Feeds batches of one sample a side: (online loss, offline loss)."""
    for online, offline in losses:
        mixture.add(table_of([task, task], [O, D], [online, offline]))
    return mixture


def test_golden_values_of_the_formula():
    for loss in (0.0, 0.3, 7.0):
        assert share_of(loss, loss, Adaptive(alpha=1.0)) == 0.5
    above = math.log(4) + 1e-6
    assert share_of(above, 0.0, Adaptive(alpha=1.0)) == share_of(900.0, 1.0, Adaptive()) == 0.8
    assert share_of(1.0, 1.5 - math.log(4) - 1e-6, Adaptive(alpha=1.5)) == 0.8
    assert share_of(math.log(4) - 0.01, 0.0, Adaptive(alpha=1.0)) < 0.8
    assert share_of(0.0, 5.0, Adaptive()) == share_of(-1e6, 1e6, Adaptive()) == 0.2
    assert share_of(0.4, 0.1, Adaptive(alpha=1.5)) == pytest.approx(math.exp(0.6) / (math.exp(0.6) + math.exp(0.1)))
    assert share_of(5.0, 0.0, Adaptive(low=0.1, high=0.95)) == 0.95


def test_one_half_until_both_sides_have_a_loss():
    mixture = OnlineShare(Adaptive())
    assert mixture.share(0) == 0.5
    mixture.add(table_of([0, 0, 0], [O, P, O], [9.0, 8.0, 9.0]))
    assert mixture.share(0) == 0.5
    mixture.add(table_of([0], [D], [1.0]))
    assert mixture.share(0) == 0.8 and mixture.share(1) == 0.5


def test_each_side_gets_the_mean_loss_of_its_own_samples_by_task():
    mixture = OnlineShare(Adaptive(alpha=1.0))
    task, source = [0, 0, 0, 1, 1, 0], [O, P, D, O, D, S]
    mixture.add(table_of(task, source, [1.0, 2.0, 1.0, 1.0, 2.0, 2.0]))  # task 0: 1.5 and 1.5; task 1: 1 and 2
    assert mixture.share(0) == 0.5
    assert mixture.share(1) == pytest.approx(share_of(1 / 1.5, 2 / 1.5, Adaptive(alpha=1.0)))
    only = OnlineShare(Adaptive(online=(O,), offline=(D,)))
    only.add(table_of(task, source, [2.0, 99.0, 1.0, 1.0, 2.0, 99.0]))  # the policy's and the script's are on no side
    assert only.share(0) == pytest.approx(share_of(4 / 3, 2 / 3, Adaptive()))


def test_one_loss_for_both_sides_never_moves_the_share_and_two_do():
    same, apart = OnlineShare(Adaptive(alpha=1.0)), OnlineShare(Adaptive(alpha=1.0))
    for loss in (5.0, 1.0, 0.1):
        fed(same, [(loss, loss)])
        fed(apart, [(2 * loss, loss)])
        assert same.share(0) == 0.5
    assert apart.share(0) == pytest.approx(share_of(4 / 3, 2 / 3, Adaptive(alpha=1.0)))
    assert apart.share(0) > 0.6


def test_the_scale_of_a_loss_does_not_matter():
    losses = [(0.2, 0.5), (0.4, 0.6)]
    want = fed(OnlineShare(Adaptive()), losses).share(0)
    assert 0.2 < want < 0.5
    for scale in (1e-6, 1e4):
        assert fed(OnlineShare(Adaptive()), [(scale * a, scale * b) for a, b in losses]).share(0) == pytest.approx(want)
    assert fed(OnlineShare(Adaptive()), [(0.0, 0.0)]).share(0) == 0.5
    assert fed(OnlineShare(Adaptive(alpha=1.0)), [(-1.0, -3.0)]).share(0) > 0.5  # a density: the lower one is better


def test_samples_of_an_emptier_shard_count_for_less():
    mixture, uneven = OnlineShare(Adaptive(alpha=1.0)), OnlineShare(Adaptive(alpha=1.0))
    mixture.add(table_of([0] * 5, [O, O, O, O, D], [2.0, 2.0, 2.0, 6.0, 3.0]))
    many = table_of([0] * 3, [O, O, D], [2.0, 2.0, 3.0], 1.5)
    few = table_of([0] * 2, [O, O], [6.0, 6.0], 0.5)
    uneven.add(many + few)
    assert uneven.share(0) == mixture.share(0) == 0.5


def test_only_the_window_counts():
    mixture = fed(OnlineShare(Adaptive(alpha=1.0, window=3)), [(100.0, 1.0)] * 5)
    assert mixture.share(0) == 0.8
    assert fed(mixture, [(1.0, 1.0)] * 2).share(0) == 0.8
    assert fed(mixture, [(1.0, 1.0)]).share(0) == 0.5


def test_state_goes_on_where_it_was():
    one = fed(fed(OnlineShare(Adaptive(window=3)), [(0.3, 0.4), (0.5, 0.4), (0.6, 0.1), (0.5, 0.6)]), [(1.0, 2.0)], task=4)
    two = OnlineShare(Adaptive(window=3))
    two.load_state(one.state())
    for mixture in (one, two):
        fed(mixture, [(0.1, 0.2)])
    assert [one.share(task) for task in (0, 4, 7)] == [two.share(task) for task in (0, 4, 7)]
    assert all(isinstance(value, np.ndarray) for value in one.state().values())
    OnlineShare(Adaptive()).load_state(OnlineShare(Adaptive()).state())


def test_what_is_drawn_follows_the_shares(scale):
    mixture = fed(fed(OnlineShare(Adaptive()), [(0.5, 0.7)]), [(9.0, 1.0)], task=1)
    pools = {(O, 0): np.arange(4), (D, 0): np.arange(4, 10), (P, 1): np.arange(10, 13), (D, 1): np.arange(13, 15)}
    needs = BatchNeeds(10000 * scale, 1, (), {}, adaptive=Adaptive())
    drawn, _ = draw_part(pools, needs, None, mixture.share, np.random.default_rng(0), None, needs.batch_size, None)
    share = mixture.share(0)
    want = [share / 8] * 4 + [(1 - share) / 12] * 6 + [0.8 / 6] * 3 + [0.2 / 4] * 2
    assert_drawn_as(np.bincount(drawn, minlength=15), want)


def test_impossible_settings_and_losses_are_refused():
    for wrong in (
        {"low": 0.8, "high": 0.2},
        {"high": 1.5},
        {"window": 0},
        {"alpha": -1.0},
        {"alpha": math.nan},
        {"online": (O, D)},
    ):
        with pytest.raises(ConfigError, match="mixture"):
            Adaptive(**wrong)
    mixture = OnlineShare(Adaptive())
    with pytest.raises(LearnerError, match="sample 1"):
        table_of([0, 0], [O, D], [1.0, np.nan])
    with pytest.raises(LearnerError, match="a sum of losses"):
        mixture.add(table_of([0, 0], [O, D], [1.0, 2.0]) + np.inf)
    assert len(mixture.state()["loss"]) == 0
