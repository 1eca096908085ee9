import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from actors.robots import make_robot
from fleet.errors import RobotError
from fleet.spec import ACTION, STATE


class _Arm(gymnasium.Env):
    """Reaches success when the action has been near its upper bound for three steps."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        camera = spaces.Box(0, 255, (8, 6, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "agent_pos": spaces.Box(-1, 1, (2,), np.float64),
                "pixels": spaces.Dict({"Top-View": camera}),
                "effort": spaces.Box(0, 9, ()),
            }
        )
        self.action_space = spaces.Box(np.array([[-1.0, 0.0]], np.float32), np.array([[1.0, 4.0]], np.float32))

    def _obs(self):
        top = np.full((8, 6, 3), self._count, np.uint8)
        return {"agent_pos": self._pos, "pixels": {"Top-View": top}, "effort": np.float32(self._count)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._pos, self._count = self.np_random.uniform(-1, 1, 2), 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self._count += bool(action[0, 0] > 0.9)
        return self._obs(), 0.5, False, False, {"is_success": self._count >= 3}

    def render(self):
        return np.full((4, 4, 3), self._count, np.uint8)


gymnasium.register("FleetTestArm-v0", entry_point=lambda **kwargs: _Arm(**kwargs))


def test_box_environment_is_seeded_and_truncated():
    robot = make_robot("gym", env="Pendulum-v1", max_steps=5, control_hz=10)
    assert robot.spec.features[STATE].shape == (3,) and robot.spec.action.low == -2.0 and robot.spec.control_hz == 10
    first = robot.reset("swing up", 4)[STATE]
    robot.spec.check(robot.observe(), (STATE,))
    for _ in range(5):
        feedback = robot.send(np.array([7.0], np.float32))
    assert feedback.truncated and not feedback.terminated and feedback.success is None
    np.testing.assert_array_equal(feedback.action, [2.0])
    np.testing.assert_array_equal(robot.reset("swing up", 4)[STATE], first)
    assert not np.array_equal(robot.reset("swing up", 5)[STATE], first)
    robot.close()


def test_dict_environment_by_key_with_images_and_success():
    robot = make_robot(
        "gym", env="FleetTestArm-v0", images=True, rename={"agent_pos": STATE}, hold="last", codec="raw", tasks=["press"]
    )
    names = {
        "observation.state",
        "observation.images.pixels.top_view",
        "observation.effort",
        "observation.images.render",
        ACTION,
    }
    assert set(robot.spec.features) == names
    obs = robot.reset("press", 0)
    robot.spec.check(obs, tuple(names - {ACTION}))
    np.testing.assert_array_equal(robot.hold(), [0, 0])
    feedbacks = [robot.send(np.array([5.0, 2.0], np.float32)) for _ in range(3)]
    assert [f.success for f in feedbacks] == [False, False, True]
    assert feedbacks[-1].terminated and not feedbacks[-1].truncated and feedbacks[-1].reward == 0.5
    np.testing.assert_array_equal(feedbacks[-1].action, [1.0, 2.0])  # each element clipped to its own bound
    np.testing.assert_array_equal(robot.hold(), [1.0, 2.0])
    assert (robot.observe()["observation.images.render"] == 3).all()
    assert robot.observe()["observation.effort"] == 3
    with pytest.raises(RobotError, match="press"):
        robot.reset("pull", 0)


def test_the_time_limit_of_the_environment_is_a_truncation():
    robot = make_robot("gym", env="Pendulum-v1", kwargs={"max_episode_steps": 3})
    robot.reset("", None)
    feedbacks = [robot.send(np.zeros(1, np.float32)) for _ in range(3)]
    assert [f.truncated for f in feedbacks] == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"env": "CartPole-v1"}, "a Box of floats"),
        ({"env": "NoSuch-v0"}, "NoSuch"),
        ({"env": "Pendulum-v1", "kwargs": {"colour": 1}}, "colour"),
        ({"env": "Pendulum-v1", "hold": "zero"}, "zeros"),
        ({"env": "x", "modules": ["no_such_package"]}, "no_such_package"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(RobotError) as caught:
        make_robot("gym", **settings)
    assert said in str(caught.value)
    robot = make_robot("gym", env="Pendulum-v1")
    with pytest.raises(RobotError, match="reset starts an episode"):
        robot.send(np.zeros(1, np.float32))
