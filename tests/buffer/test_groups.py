import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.episodes import EpisodeTable
from buffer.groups import groups, pairs
from buffer.labels import BY_ROBOT, Label
from fleet.batch import Outcome
from fleet.errors import NoData
from tests.buffer.chi_square import assert_drawn_as

WON, LOST = Outcome.SUCCESS, Outcome.FAILURE


@dataclasses.dataclass
class One:
    """An episode, as it is most often."""

    outcome: int = WON
    task: int = 0
    group_id: str = "g"
    start: str = "seed:1"
    first_version: int = 3
    last_version: int = 3
    num_operator_steps: int = 0
    excluded: bool = False
    finished: bool = True
    first_step: int = 0


class Columns:
    def __init__(self, episodes):
        for field in dataclasses.fields(One):
            values = [getattr(episode, field.name) for episode in episodes]
            setattr(self, field.name, values if field.type == "str" else np.array(values))


def numbers(found):
    return [members.tolist() for members in found]


def test_a_group_is_of_one_task_one_group_id_and_one_version():
    episodes = Columns(
        [
            One(LOST),
            One(WON, group_id="h"),
            One(WON, task=1),
            One(WON),
            One(WON, first_version=4, last_version=4),
            One(LOST, group_id="h"),
            One(LOST, first_version=4, last_version=4),
            One(LOST, first_version=3, last_version=4),  # the policy changed meanwhile
            One(LOST, group_id=""),
            One(WON, group_id=""),
            One(LOST, first_version=-1, last_version=-1),
        ]
    )
    assert numbers(groups(episodes)) == [[0, 3], [1, 5], [4, 6]]
    assert numbers(groups(episodes, one_version=False)) == [[0, 3, 4, 6, 7, 10], [1, 5]]
    assert numbers(groups(episodes, one_version=False, min_size=3)) == [[0, 3, 4, 6, 7, 10]]
    with pytest.raises(NoData, match="no group among 9 usable of 11 episodes: 4 groups were begun, 0 of them"):
        groups(episodes, min_size=3)


def test_groups_of_one_outcome_have_no_advantage():
    episodes = Columns([One(WON), One(WON), One(LOST, group_id="h"), One(WON, group_id="h"), One(LOST, group_id="i")] * 2)
    assert numbers(groups(episodes)) == [[2, 3, 7, 8]]
    assert numbers(groups(episodes, drop_uniform=False)) == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]


@pytest.mark.parametrize(
    "unusable",
    [
        One(LOST, excluded=True),
        One(LOST, finished=False),
        One(Outcome.OPEN),
        One(Outcome.UNKNOWN),
        One(Outcome.ABORTED),
        One(LOST, num_operator_steps=2),
        One(LOST, task=-1),
        One(LOST, first_step=-1),
    ],
)
def test_what_cannot_be_compared_is_in_no_group_and_no_pair(unusable):
    episodes = Columns([One(WON), unusable])
    with pytest.raises(NoData, match="1 usable of 2"):
        groups(episodes)
    with pytest.raises(NoData, match="1 usable of 2"):
        pairs(episodes, np.random.default_rng(0), 3)


def test_operators_are_let_in_where_it_is_asked_for():
    episodes = Columns([One(WON, num_operator_steps=2), One(LOST)])
    assert numbers(groups(episodes, with_operator=True)) == [[0, 1]]
    assert pairs(episodes, np.random.default_rng(0), 2, with_operator=True).tolist() == [[0, 1]] * 2


def test_pairs_are_of_one_start_and_all_alike(scale):
    episodes = Columns(
        [
            *[One(WON, start="seed:1")] * 2,
            *[One(LOST, start="seed:1")] * 3,
            One(LOST, start="seed:2"),  # no success from there
            One(WON, start="seed:1", task=1),
            One(LOST, start="seed:1", task=1),
            One(WON, start="", group_id="x"),
            *[One(LOST, start="", group_id="x")] * 2,
            One(WON, start="", group_id=""),
            One(LOST, start="", group_id=""),
            One(LOST, start="x", group_id=""),  # the start x is not the group x
        ]
    )
    want = [(w, f) for w in (0, 1) for f in (2, 3, 4)] + [(6, 7), (8, 9), (8, 10)]
    drawn = pairs(episodes, np.random.default_rng(1), 5000 * scale)
    counts = collections.Counter(map(tuple, drawn.tolist()))
    assert set(counts) == set(want)
    assert_drawn_as([counts[pair] for pair in want], np.ones(len(want)))
    assert np.array_equal(drawn, pairs(episodes, np.random.default_rng(1), 5000 * scale))
    assert drawn.dtype == np.int64 and pairs(episodes, np.random.default_rng(1), 0).shape == (0, 2)


def test_groups_and_pairs_of_the_samplers_own_table():
    table = EpisodeTable()
    for number, outcome in enumerate(["success", "failure", "success"]):
        row = {"episode_id": number, "group_id": "g", "reset_state_id": "", "seed": 5, "length": 3, "outcome": outcome}
        table.add_row(("r", "b"), {**row, "event": "closed", "first_version": 1, "last_version": 1}, 0)
        table.add_steps(number, 0, 3 * number, 3, 2, 0, False)
    assert numbers(groups(table)) == [[0, 1, 2]]
    assert set(map(tuple, pairs(table, np.random.default_rng(0), 50).tolist())) == {(0, 1), (2, 1)}
    table.add_label(Label("r", "b", 2, "excluded", "true", "test", 1), BY_ROBOT)
    assert numbers(groups(table)) == [[0, 1]]
    for made in (groups, lambda none: pairs(none, np.random.default_rng(0), 1)):
        with pytest.raises(NoData, match="0 usable of 0"):
            made(EpisodeTable())


episode = st.builds(
    One,
    outcome=st.sampled_from(list(Outcome)),
    task=st.integers(-1, 1),
    group_id=st.sampled_from(["", "a", "b"]),
    start=st.sampled_from(["", "seed:0", "seed:1"]),
    first_version=st.integers(-1, 1),
    last_version=st.integers(-1, 1),
    num_operator_steps=st.sampled_from([0, 0, 1]),
    excluded=st.sampled_from([False, False, True]),
    finished=st.sampled_from([True, True, False]),
)


@given(st.lists(episode, max_size=30), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_group_and_pair_keeps_its_rule(made, min_size, one_version, drop_uniform):
    def usable(e):
        return e.outcome in (WON, LOST) and e.finished and not e.excluded and e.task >= 0 and not e.num_operator_steps

    def key(e):
        return (e.task, e.group_id, e.first_version if one_version else 0)

    fit = [i for i, e in enumerate(made) if usable(e) and e.group_id]
    fit = [i for i in fit if not one_version or made[i].first_version == made[i].last_version >= 0]
    by_key = collections.defaultdict(list)
    for i in fit:
        by_key[key(made[i])].append(i)
    want = [m for m in by_key.values() if len(m) >= min_size and (not drop_uniform or len({made[i].outcome for i in m}) == 2)]
    try:
        got = numbers(groups(Columns(made), min_size=min_size, one_version=one_version, drop_uniform=drop_uniform))
    except NoData:
        got = []
    assert got == want
    matches = {
        (i, j)
        for i, a in enumerate(made)
        for j, b in enumerate(made)
        if usable(a) and usable(b) and (a.outcome, b.outcome) == (WON, LOST) and a.task == b.task
        if (a.start and a.start == b.start) or (not a.start and not b.start and a.group_id and a.group_id == b.group_id)
    }
    try:
        drawn = pairs(Columns(made), np.random.default_rng(0), 20)
    except NoData:
        assert not matches
        return
    assert {tuple(pair) for pair in drawn.tolist()} <= matches
