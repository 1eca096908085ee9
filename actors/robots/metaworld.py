"""Meta-World's 50 tasks as a robot whose starts can be seeded. Needs the extra ``sim``.

``gymnasium.make("Meta-World/MT1").reset(seed=...)`` does not fix the start. The classes underneath can, through
attributes that are private to metaworld 3.1: they are touched in ``_make_env`` only, and the constraints pin the version.

State (39,): gripper xyz, opening, up to two objects' xyz + quaternion (18), the same one tick earlier (18), goal xyz;
metres. Action (4,): change of the gripper's target position by up to 1 cm in x, y, z, and the fingers' effort, all in [-1, 1].
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np

from fleet.errors import RobotError
from fleet.lookup import nearest
from fleet.robot import Feedback, Observation
from fleet.spec import ACTION, IMAGE_PREFIX, STATE, Feature, RobotSpec

STATE_DIM, ACTION_DIM = 39, 4
IMAGE_SIZES = (0, 84, 128, 224)
CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")


class MetaWorldRobot:
    """A simulated Sawyer arm. Implements ``fleet.robot.Robot``; an episode terminates at the first success.

    Args:
        control_hz: Ticks per second that the control loop should keep; the simulation advances 1/80 s of physics a tick.
        max_steps: Steps after which an episode is truncated, 1 to 500 (Meta-World's own limit).
        images: Side of the camera image in pixels, one of ``IMAGE_SIZES``; 0 for none.
        camera: One of ``CAMERAS``.
        codec: How images are stored: "jpeg" or "raw".
    """

    simulated = True

    def __init__(
        self, *, control_hz: float = 20.0, max_steps: int = 200, images: int = 0, camera: str = "corner2", codec: str = "jpeg"
    ) -> None:
        if not 1 <= max_steps <= 500:
            raise RobotError(f"max_steps is {max_steps}", rule="1 to 500, Meta-World's own limit")
        if images not in IMAGE_SIZES or camera not in CAMERAS:
            raise RobotError(f"images = {images}, camera = {camera!r}", rule=f"images in {IMAGE_SIZES}, camera in {CAMERAS}")
        self._metaworld = _import_metaworld(with_images=images > 0)
        self._max_steps, self._images, self._camera = max_steps, images, camera
        self._image_name = IMAGE_PREFIX + camera.lower()
        features = {STATE: Feature("float32", (STATE_DIM,)), ACTION: Feature("float32", (ACTION_DIM,), "", -1.0, 1.0)}
        if images:
            features[self._image_name] = Feature("uint8", (images, images, 3), codec=codec)
        self.spec = RobotSpec("metaworld_sawyer", control_hz, features)
        self._envs: dict[str, Any] = {}
        self._renderers: dict[str, Any] = {}
        self._task = ""
        self._state = np.zeros(STATE_DIM, np.float32)
        self._last_action = np.zeros(ACTION_DIM, np.float32)
        self._num_steps = 0

    def reset(self, task: str, seed: int | None) -> Observation:
        """Starts ``task``, for example "push-v3"; the same seed gives the same start, None a new one."""
        env = self._envs.get(task)
        if env is None:
            env = self._envs[task] = _make_env(self._metaworld, task)
        env.seed(int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed)
        state, _ = env.reset()
        self._task, self._num_steps = task, 0
        self._state = state.astype(np.float32)
        self._last_action = np.zeros(ACTION_DIM, np.float32)
        return self.observe()

    def observe(self) -> Observation:
        if not self._images:
            return {STATE: self._state}
        return {STATE: self._state, self._image_name: self._render()}

    def send(self, action: np.ndarray) -> Feedback:
        """One tick. ``action`` (4,) is clipped to [-1, 1].

        Raises:
            RobotError: Before the first reset, or after the episode's end at 500 steps.
        """
        if not self._task or self._num_steps >= 500:
            raise RobotError(
                f"send at step {self._num_steps} of task {self._task!r}", rule="reset starts an episode, at most 500 steps"
            )
        sent = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        state, reward, _, _, info = self._envs[self._task].step(sent)
        self._num_steps += 1
        self._state = state.astype(np.float32)
        self._last_action = sent
        success = float(info["success"]) >= 1.0
        cut = self._num_steps >= self._max_steps and not success
        return Feedback(sent, float(reward), terminated=success, truncated=cut, success=success)

    def hold(self) -> np.ndarray:
        """No motion; the fingers keep their effort, so that what is held is not dropped."""
        action = np.zeros(ACTION_DIM, np.float32)
        action[3] = self._last_action[3]
        return action

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        for env in self._envs.values():
            env.close()
        self._renderers, self._envs, self._task = {}, {}, ""

    def _render(self) -> np.ndarray:
        env = self._envs[self._task]
        renderer = self._renderers.get(self._task)
        if renderer is None:
            renderer = self._renderers[self._task] = _make_renderer(env.model, self._images)
        renderer.update_scene(env.data, camera=self._camera)
        image: np.ndarray = renderer.render()
        return image


def _import_metaworld(with_images: bool) -> ModuleType:
    """Imports metaworld, and with it mujoco, which reads MUJOCO_GL at that moment and never again."""
    if with_images:
        os.environ.setdefault("MUJOCO_GL", "osmesa")  # without a display it is the one that works
    try:
        import metaworld
    except ModuleNotFoundError as missing:
        raise RobotError(f"Meta-World needs the package {missing.name!r}", remedy="pip install 'fleet-rl[sim]'") from missing
    except (ImportError, AttributeError) as broken:  # what a GL binding raises when its library is not there
        raise _no_gl(broken) from broken
    module: ModuleType = metaworld
    return module


def _no_gl(cause: Exception) -> RobotError:
    return RobotError(
        f"mujoco cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {cause}",
        rule="images need a GL library, chosen before mujoco is first imported",
        remedy="apt-get install libosmesa6, or set MUJOCO_GL=egl, or images: 0",
    )


def _make_env(metaworld: ModuleType, task: str) -> Any:
    classes = metaworld.env_dict.MT50_V3
    if task not in classes:
        raise RobotError(f"Meta-World has no task {task!r}", rule="names end in -v3", remedy=nearest(task, classes))
    env = classes[task]()
    env._set_task_called = True
    env._partially_observable = False  # the goal is part of the state
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True  # starts are drawn from env.np_random, which env.seed sets
    env.__dict__.pop("sawyer_observation_space", None)  # cached for the partial view; it would clip the goal to zero
    return env


def _make_renderer(model: Any, size: int) -> Any:
    """Software rendering in 11-21 ms an image: shadows, reflections and multisampling cost the other 90 %."""
    import mujoco

    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    try:
        renderer = mujoco.Renderer(model, size, size)
    except (mujoco.FatalError, RuntimeError, ImportError) as broken:
        raise _no_gl(broken) from broken
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return renderer
