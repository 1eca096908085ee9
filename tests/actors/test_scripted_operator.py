import numpy as np
import pytest

from actors.operators import make_operator
from actors.robots import make_robot
from fleet.errors import RobotError
from fleet.spec import STATE


class _Expert:
    """Always wants [1, 0]."""

    def reset(self, task):
        self.task = task

    def action(self, obs):
        return np.array([1.0, 0.0], np.float32)


OBS = {STATE: np.zeros(6, np.float32)}
AGREES = np.array([1.0, 0.1], np.float32)  # 0.1 away
DIFFERS = np.array([0.0, 0.0], np.float32)  # 1.0 away


def _acts(operator, proposals):
    return [operator.poll(OBS, p) is not None for p in proposals]


def _operator(**settings):
    operator = make_operator("scripted", expert=_Expert(), control_hz=10, **settings)
    operator.reset("reach", 0)
    return operator


def test_takes_over_when_the_mean_distance_of_the_window_exceeds_the_gate():
    assert _acts(_operator(), [DIFFERS] * 6) == [False] * 4 + [True] * 2
    assert not any(_acts(_operator(), [AGREES] * 50))
    # Of 5 ticks, 2 differ: mean 0.46. With 3: 0.64.
    assert _acts(_operator(), [AGREES, AGREES, AGREES, DIFFERS, DIFFERS, DIFFERS]) == [False] * 5 + [True]
    assert not any(_acts(_operator(), [AGREES, AGREES, AGREES, DIFFERS, DIFFERS, AGREES, AGREES]))
    assert _acts(_operator(window=1, gate_distance=0.95), [AGREES, DIFFERS]) == [False, True]
    assert not any(_acts(_operator(window=1, gate_distance=1.0), [DIFFERS] * 3))  # above, not at


def test_a_late_policy_is_no_observation():
    assert _acts(_operator(), [DIFFERS, None, DIFFERS, None, DIFFERS, DIFFERS, None, DIFFERS]) == [False] * 7 + [True]


def test_reacts_late_even_if_the_policy_recovers_meanwhile():
    # Noticed at tick 4 (counting from 0), acts 0.3 s = 3 ticks later.
    assert _acts(_operator(reaction_s=0.3), [DIFFERS] * 5 + [AGREES] * 5) == [False] * 7 + [True] * 3


def test_keeps_control_to_the_end_or_hands_back():
    operator = _operator()
    assert _acts(operator, [DIFFERS] * 5 + [AGREES] * 40)[4:] == [True] * 41
    operator.reset("reach", 1)
    assert operator.poll(OBS, DIFFERS) is None  # the next episode starts with an empty window
    operator = _operator(keep="steps", keep_steps=3)
    assert _acts(operator, [DIFFERS] * 14) == [False] * 4 + [True] * 3 + [False] * 4 + [True] * 3
    assert operator.num_takeovers == 2 and operator.num_steps == 6


def test_budget_counts_over_episodes_then_the_robot_goes_on_alone():
    operator = _operator(budget_steps=5)
    assert sum(_acts(operator, [DIFFERS] * 7)) == 3
    operator.reset("reach", 1)
    assert sum(_acts(operator, [DIFFERS] * 20)) == 2
    operator.reset("reach", 2)
    assert not any(_acts(operator, [DIFFERS] * 20)) and operator.num_steps == 5
    assert not any(_acts(_operator(budget_steps=0), [DIFFERS] * 9))


def test_modes_and_noise():
    assert all(_acts(_operator(mode="demonstrate"), [None, AGREES, DIFFERS]))
    assert not any(_acts(_operator(mode="off"), [DIFFERS] * 9))
    noisy, same = (_operator(mode="demonstrate", action_noise=0.1, seed=3) for _ in range(2))
    actions = np.stack([noisy.poll(OBS, None).action for _ in range(400)])
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions.std(0), 0.1, rtol=0.15)
    np.testing.assert_array_equal(same.poll(OBS, None).action, actions[0])
    takeover = _operator(mode="demonstrate", operator_id="anna").poll(OBS, None)
    assert takeover.operator_id == "anna" and takeover.action.tolist() == [1.0, 0.0]


def test_rescues_a_policy_that_stands_still():
    robot = make_robot("toy")
    operator = make_operator("scripted", expert="toy", reaction_s=0.2)
    for seed in range(5):
        obs = robot.reset("mirror", seed)
        operator.reset("mirror", seed)
        while True:
            takeover = operator.poll(obs, np.zeros(2, np.float32))
            feedback = robot.send(takeover.action if takeover else np.zeros(2, np.float32))
            obs = robot.observe()
            if feedback.terminated or feedback.truncated:
                break
        assert feedback.success
    assert operator.num_takeovers == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "help"},
        {"keep": "day"},
        {"window": 0},
        {"budget_steps": -1},
        {"reaction_s": -1.0},
        {"gate_distance": float("nan")},
    ],
)
def test_refusals(settings):
    with pytest.raises(RobotError, match=str(next(iter(settings.values())))):
        _operator(**settings)


def test_a_tasks_budget_leaves_time_for_the_others():
    operator = make_operator("scripted", expert="toy", gate_distance=0.1, window=1, task_budget_steps=5)
    obs, far = make_robot("toy").reset("reach", 1), np.array([5.0, 5.0], np.float32)
    acted = {}
    for task in ("reach", "mirror", "reach"):
        operator.reset(task, 1)
        acted[task] = acted.get(task, 0) + sum(operator.poll(obs, far) is not None for _ in range(10))
    assert acted == {"reach": 5, "mirror": 5}
