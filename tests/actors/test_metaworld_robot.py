import ctypes.util
import os
import subprocess
import sys

import numpy as np
import pytest

from actors.operators.experts import MetaWorldExpert
from actors.robots import make_robot
from fleet.errors import RobotError
from fleet.spec import STATE

pytest.importorskip("metaworld")
TASKS = ("push-v3", "pick-place-v3", "door-open-v3")


def _episode(robot, task, seed, num_steps=200):
    expert = MetaWorldExpert()
    expert.reset(task)
    states = [robot.reset(task, seed)[STATE]]
    for _ in range(num_steps):
        feedback = robot.send(expert.action({STATE: states[-1]}))
        states.append(robot.observe()[STATE])
        if feedback.terminated or feedback.truncated:
            break
    return feedback, np.stack(states)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_the_whole_episode_whatever_ran_before(task):
    used = make_robot("metaworld")
    _episode(used, task, 77, num_steps=30)
    _, again = _episode(used, task, 5, num_steps=40)
    _, fresh = _episode(make_robot("metaworld"), task, 5, num_steps=40)
    np.testing.assert_array_equal(fresh, again)
    assert not np.array_equal(used.reset(task, 6)[STATE], fresh[0])
    assert np.abs(fresh[0][36:]).sum() > 0  # the goal is visible
    assert np.array_equal(fresh[0][:18], fresh[0][18:36])


def test_expert_succeeds_and_success_ends_the_episode():
    robot = make_robot("metaworld")
    for seed in range(3):
        feedback, states = _episode(robot, "push-v3", seed)
        assert feedback.success and feedback.terminated and not feedback.truncated and len(states) < 200


def test_time_limit_clipping_and_hold():
    robot = make_robot("metaworld", max_steps=3)
    robot.spec.check(robot.reset("push-v3", None), (STATE,))
    feedbacks = [robot.send(np.array([0, 0, 9, 9], np.float32)) for _ in range(3)]
    assert [f.truncated for f in feedbacks] == [False, False, True] and not feedbacks[-1].terminated
    np.testing.assert_array_equal(feedbacks[0].action, [0, 0, 1, 1])
    np.testing.assert_array_equal(robot.hold(), [0, 0, 0, 1])  # still gripping
    assert feedbacks[0].success is False


def test_refusals():
    robot = make_robot("metaworld")
    with pytest.raises(RobotError, match="did you mean 'push-v3'"):
        robot.reset("push-v2", 0)
    with pytest.raises(RobotError, match="reset starts an episode"):
        robot.send(np.zeros(4, np.float32))
    with pytest.raises(RobotError, match="84"):
        make_robot("metaworld", images=100)


_IMAGES = """
import numpy as np
from actors.robots import make_robot
from fleet.errors import RobotError
try:
    robot = make_robot("metaworld", images=84)
    name = "observation.images.corner2"
    first = robot.reset("push-v3", 1)
    robot.spec.check(first, ("observation.state", name))
    for _ in range(10):
        robot.send(np.array([1, 1, 0, 0], np.float32))
    change = np.abs(robot.observe()[name].astype(int) - first[name]).max()
    robot.close()
    print("drew", bool(first[name].std() > 10 and change > 50))
except RobotError as error:
    print("refused", error)
"""


def _draw(gl):
    # In a process of its own: mujoco reads MUJOCO_GL once, when it is imported.
    env = {**os.environ, "MUJOCO_GL": gl}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _IMAGES], env=env, capture_output=True, text=True, timeout=60)
    return done.stdout or done.stderr


@pytest.mark.parametrize(("gl", "library"), [("osmesa", "OSMesa"), ("egl", "EGL")])
def test_images_or_a_clear_word_about_the_library(gl, library):
    said = _draw(gl)
    if said.startswith("drew"):
        assert said.split() == ["drew", "True"]
    else:
        assert said.startswith("refused") and "libosmesa6" in said and f"MUJOCO_GL='{gl}'" in said, said
        assert ctypes.util.find_library(library) is None or gl == "egl"  # EGL may be there without a device
