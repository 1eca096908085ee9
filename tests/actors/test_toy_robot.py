import numpy as np
import pytest

from actors.robots.toy import IMAGE, ToyExpert, ToyRobot
from fleet.errors import RobotError
from fleet.spec import STATE


def _run(robot, expert, task, seed):
    obs = robot.reset(task, seed)
    expert.reset(task)
    states = [obs[STATE]]
    while True:
        feedback = robot.send(expert.action(robot.observe()))
        states.append(robot.observe()[STATE])
        if feedback.terminated or feedback.truncated:
            return feedback, np.stack(states)


@pytest.mark.parametrize("task", ["reach", "mirror"])
def test_expert_succeeds_and_same_seed_gives_same_episode(task):
    for seed in range(10):
        feedback, first = _run(ToyRobot(), ToyExpert(), task, seed)
        used = ToyRobot()
        _run(used, ToyExpert(), "reach", 999)
        _, second = _run(used, ToyExpert(), task, seed)
        assert feedback.success and feedback.terminated and not feedback.truncated
        assert 5 < len(first) < 60
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(ToyRobot().reset(task, 1)[STATE], ToyRobot().reset(task, 2)[STATE])


def test_tasks_differ_only_in_their_goal():
    """A policy that does not look at the instruction cannot solve both."""
    robot = ToyRobot()
    assert np.array_equal(robot.reset("reach", 3)[STATE], robot.reset("mirror", 3)[STATE])
    expert = ToyExpert()
    obs = robot.reset("mirror", 3)
    expert.reset("reach")
    for _ in range(60):
        feedback = robot.send(expert.action(obs))
        obs = robot.observe()
    assert feedback.truncated and not feedback.terminated and feedback.success is False


def test_actions_are_clipped_and_images_follow_the_arm():
    robot = ToyRobot(images=32)
    before = robot.reset("reach", 0)[IMAGE]
    feedback = robot.send(np.array([9.0, -9.0], np.float32))
    np.testing.assert_array_equal(feedback.action, [1.0, -1.0])
    for _ in range(10):
        robot.send(np.ones(2, np.float32))
    after = robot.observe()
    robot.spec.check(after, (STATE, IMAGE))
    assert not np.array_equal(before, after[IMAGE])
    assert np.array_equal(before[..., 1], after[IMAGE][..., 1])  # the target stays


def test_refusals():
    with pytest.raises(RobotError, match="reset starts an episode"):
        ToyRobot().send(np.zeros(2, np.float32))
    with pytest.raises(RobotError, match="did you mean 'mirror'"):
        ToyRobot().reset("miror", 0)
    with pytest.raises(RobotError, match="max_steps is 0"):
        ToyRobot(max_steps=0)
