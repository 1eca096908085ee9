import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.draw import draw_part
from buffer.priority import Scores
from fleet.batch import BatchNeeds, Priority
from fleet.errors import ConfigError, LearnerError
from fleet.robot import Source
from tests.buffer.chi_square import assert_drawn_as


def grow(scores, count):
    scores.grow(np.ones(count, bool))


def scores_of(values, alpha=1.0, beta=1.0):
    scores = Scores(Priority(alpha, beta))
    grow(scores, len(values))
    scores.set(np.arange(len(values)), np.asarray(values, float))
    return scores


def test_steps_are_drawn_in_proportion_to_their_score_to_the_alpha(scale):
    values = np.array([0.5, 1, 2, 4, 8, 0, 3])
    scores = scores_of(values, alpha=0.6)
    pools, needs = {(3, 0): np.arange(7)}, BatchNeeds(20000 * scale, 1, (), {(Source.DEMO,): 1.0}, priority=Priority())
    drawn, _ = draw_part(pools, needs, scores.accept, None, np.random.default_rng(2), None, needs.batch_size, None)
    assert_drawn_as(np.bincount(drawn, minlength=7), values**0.6)


def test_golden_values_of_the_paper():
    scores = scores_of([1, 4, 16], alpha=0.5, beta=0.4)
    assert scores.accept(np.arange(3)).tolist() == [0.25, 0.5, 1.0]  # P = 1/7, 2/7, 4/7
    chance = np.array([1, 2, 4]) / 7
    by_hand = (3 * chance) ** -0.4
    assert scores.weights(np.arange(3)) == pytest.approx(by_hand / by_hand.max())
    assert scores.weights(np.array([1, 2])) == pytest.approx([1, 2**-0.4])  # the largest of the batch is 1
    assert scores.weights(np.arange(0)).shape == (0,)


def test_weights_with_beta_1_make_the_mean_that_of_uniform_draws():
    values = np.array([1.0, 2, 3, 10])
    scores, what = scores_of(values, alpha=0.7), np.array([5.0, -1, 2, 8])
    chance = values**0.7 / (values**0.7).sum()
    weight = scores.weights(np.arange(4))
    assert (chance * weight * what).sum() / (chance * weight).sum() == pytest.approx(what.mean())


def test_new_steps_get_the_highest_score_that_there_is():
    scores = Scores(Priority(1.0, 1.0))
    grow(scores, 2)
    assert scores.accept(np.arange(2)).tolist() == [1, 1]
    scores.set(np.arange(2), np.array([3.0, 6.0]))
    grow(scores, 2)
    assert scores.accept(np.arange(4)).tolist() == [0.5, 1, 1, 1]
    scores.set(np.arange(1, 4), np.full(3, 1.5))
    grow(scores, 1)
    assert scores.accept(np.arange(5)).tolist() == [1, 0.5, 0.5, 0.5, 1]


def test_acceptance_does_not_decay_when_scores_fall():
    scores, rng = Scores(Priority(1.0, 1.0)), np.random.default_rng(0)
    grow(scores, 1000)
    for scale in 10.0 ** -np.arange(8):
        for steps in rng.permutation(1000).reshape(-1, 50):
            scores.set(steps, scale * rng.random(50))
        chance = scores.accept(np.arange(1000))
        assert chance.max() == 1 and 0.4 < chance.mean() < 0.6


def test_all_zero_scores_leave_all_steps_alike_and_new_ones_can_be_drawn():
    scores = scores_of([0, 0])
    assert scores.accept(np.arange(2)).tolist() == [1, 1] and scores.weights(np.arange(2)).tolist() == [1, 1]
    grow(scores, 1)
    assert scores.accept(np.arange(3)).tolist() == [0, 0, 1]


def test_steps_that_are_gone_do_not_hold_the_highest_score():
    scores = scores_of([100, 2, 1])
    scores.drop(np.array([0]))
    assert scores.accept(np.arange(3)).tolist() == [0, 1, 0.5]


def test_steps_that_are_not_drawn_do_not_hold_the_highest_score():
    scores = Scores(Priority(1.0, 1.0))
    scores.grow(np.array([True, False, True]))
    assert scores.accept(np.arange(3)).tolist() == [1, 0, 1]
    scores.set(np.array([0, 2]), np.array([0.1, 0.05]))
    assert scores.accept(np.arange(3)).tolist() == [1, 0, 0.5]


def test_impossible_scores_are_refused_and_change_nothing():
    scores = scores_of([1, 2])
    for steps, values, what in [
        ([0, 1], [3, -1], "step 1 is -1"),
        ([0, 1], [np.nan, 1], "step 0 is nan"),
        ([0], [np.inf], "inf"),
        ([2], [1], "steps 2 to 2"),
        ([-1], [1], "steps -1"),
    ]:
        with pytest.raises(LearnerError, match=what):
            scores.set(np.array(steps), np.array(values, float))
    with pytest.raises(LearnerError, match="power of alpha"):
        scores_of([1e200], alpha=2.0)
    assert scores.accept(np.arange(2)).tolist() == [0.5, 1]
    for alpha, beta in [(-0.1, 1), (1, -1), (np.nan, 0.4), (1, np.inf)]:
        with pytest.raises(ConfigError, match="alpha"):
            Priority(alpha, beta)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_against_a_plain_list(data):
    """Whatever is set in whatever order: the chance is the value over the highest value, also after a restart."""
    scores, values, first = Scores(Priority(1.0, 1.0)), [], 0  # a value is None for a step that is not drawn
    few = st.sampled_from([0.0, 0.25, 1.0, 3.0, 7.0])
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["grow", "set", "restart", "drop", "move", "release"]))
        highest = max((value for value in values if value), default=0)
        there = list(range(first, len(values)))
        if what == "grow":
            drawn = data.draw(st.lists(st.booleans(), max_size=3))
            scores.grow(np.array(drawn, bool))
            values += [(highest or 1.0) if may else None for may in drawn]
        elif what == "restart":
            state, scores = scores.state(), Scores(Priority(1.0, 1.0))
            scores.load_state(state)
        elif what == "release":
            more = data.draw(st.integers(0, len(there)))
            scores.release(first + more)
            values[first : first + more] = [0.0] * more
            first += more
        elif what == "move" and there:
            steps = sorted(data.draw(st.sets(st.sampled_from(there))))
            scores.move(np.array(steps, int))
            values += [values[step] for step in steps]
            for step in steps:
                values[step] = 0.0
        elif steps := [step for step in there if values[step] is not None]:
            steps = data.draw(st.lists(st.sampled_from(steps), max_size=6))
            new = [0.0 if what == "drop" else data.draw(few) for _ in steps]
            scores.drop(np.array(steps, int)) if what == "drop" else scores.set(np.array(steps, int), np.array(new))
            for step, value in zip(steps, new, strict=True):
                values[step] = value
        highest = max((value for value in values if value), default=0)
        drawn = [step for step in range(first, len(values)) if values[step] is not None]
        assert scores.accept(np.array(drawn, int)).tolist() == [values[step] / highest if highest else 1.0 for step in drawn]
