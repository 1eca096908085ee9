"""Any Gymnasium environment as a robot. Needs the extra ``sim``, or the environment's own package.

    robot: {adapter: gym, env: Pendulum-v1, control_hz: 20}
    robot: {adapter: gym, env: gym_pusht/PushT-v0, modules: [gym_pusht], kwargs: {obs_type: state}, success_key: is_success}

Observations: a Box becomes ``observation.state``; a Dict one feature a key (inner Dicts joined by dots); uint8 arrays of three
dimensions become ``observation.images.<key>``. Actions: a float Box of any shape, flattened.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fleet.errors import RobotError
from fleet.robot import Feedback, Observation
from fleet.spec import ACTION, IMAGE_PREFIX, STATE, Feature, RobotSpec

HOLDS = ("zeros", "last")
RENDER_IMAGE = IMAGE_PREFIX + "render"


class GymRobot:
    """Implements ``fleet.robot.Robot``.

    Args:
        env: Id for ``gymnasium.make``.
        control_hz: Ticks per second that the control loop should keep.
        max_steps: Steps after which an episode is truncated; None: whatever the environment does.
        images: Whether a rendered image is recorded as ``observation.images.render``.
        codec: How images are stored: "jpeg" or "raw".
        success_key: Entry of ``info`` that says whether the task is done; an episode terminates when it is true.
        hold: What keeps the robot in place: "zeros", or "last" for environments whose action is a position.
        rename: Feature names for keys of the observation, for example ``{"agent_pos": "observation.state"}``.
        modules: Imported first; packages that register environments need it.
        kwargs: For ``gymnasium.make``.
        tasks: Names that ``reset`` accepts; None: any, the environment has one task.
    """

    def __init__(
        self,
        *,
        env: str,
        control_hz: float = 20.0,
        max_steps: int | None = None,
        images: bool = False,
        codec: str = "jpeg",
        success_key: str = "is_success",
        hold: str = "zeros",
        rename: Mapping[str, str] | None = None,
        modules: Sequence[str] = (),
        kwargs: Mapping[str, Any] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        if hold not in HOLDS or (max_steps is not None and max_steps < 1):
            raise RobotError(
                f"hold is {hold!r}, max_steps is {max_steps}", rule=f"hold in {HOLDS}, max_steps at least 1 or none"
            )
        self._env = _make_env(env, modules, {**(kwargs or {}), **({"render_mode": "rgb_array"} if images else {})})
        self._tasks, self._success_key, self._hold, self._max_steps = tasks, success_key, hold, max_steps
        self._action_space = _action_space(self._env, env)
        self._keys = _observation_keys(self._env.observation_space, rename or {}, env)
        features = {name: _feature(space, codec) for name, space in self._keys.values()}
        features[ACTION] = _action_feature(self._action_space)
        self._images = images
        if images:
            self._env.reset()
            features[RENDER_IMAGE] = Feature("uint8", np.asarray(self._env.render()).shape, codec=codec)
        self.spec = RobotSpec(re.sub(r"[^a-z0-9]+", "_", env.lower()).strip("_"), control_hz, features)
        self._obs: Any = None
        self._last_action = np.zeros(features[ACTION].shape, np.float32)
        self._num_steps = 0

    def reset(self, task: str, seed: int | None) -> Observation:
        if self._tasks is not None and task not in self._tasks:
            raise RobotError(f"task {task!r} is unknown", rule=f"this robot's tasks are {list(self._tasks)}")
        self._obs, _ = self._env.reset(seed=seed)
        self._num_steps = 0
        self._last_action = np.zeros_like(self._last_action)
        return self.observe()

    def observe(self) -> Observation:
        values: dict[str, np.ndarray] = {}
        for key, (name, _) in self._keys.items():
            value = self._obs
            for part in key:
                value = value[part]
            feature = self.spec.features[name]
            values[name] = np.asarray(value, feature.np_dtype).reshape(feature.shape)
        if self._images:
            values[RENDER_IMAGE] = np.ascontiguousarray(self._env.render())
        return values

    def send(self, action: np.ndarray) -> Feedback:
        """One ``env.step``, with ``action`` clipped to the bounds of the action space.

        Raises:
            RobotError: Before the first reset.
        """
        if self._obs is None:
            raise RobotError("send before reset", rule="reset starts an episode")
        space = self._action_space
        sent = np.asarray(action, space.dtype).reshape(space.shape).clip(space.low, space.high)
        self._obs, reward, terminated, truncated, info = self._env.step(sent)
        self._num_steps += 1
        self._last_action = sent.reshape(-1).astype(np.float32)
        success = bool(np.all(info[self._success_key])) if self._success_key in info else None
        ended = bool(terminated) or bool(success)
        cut = bool(truncated) or (self._max_steps is not None and self._num_steps >= self._max_steps)
        return Feedback(self._last_action, float(reward), ended, cut and not ended, success)

    def hold(self) -> np.ndarray:
        """As ``hold`` says; before the first action of an episode "last" is zeros, too."""
        return self._last_action.copy() if self._hold == "last" else np.zeros_like(self._last_action)

    def close(self) -> None:
        self._env.close()


def _make_env(env: str, modules: Sequence[str], kwargs: Mapping[str, Any]) -> Any:
    try:
        for module in modules:
            importlib.import_module(module)
        return gymnasium.make(env, **kwargs)
    except ModuleNotFoundError as missing:
        raise RobotError(f"environment {env!r} needs {missing.name!r}", remedy=f"pip install {missing.name}") from missing
    except (gymnasium.error.Error, TypeError) as error:
        raise RobotError(
            f"environment {env!r} cannot be made: {error}",
            rule="an id that is registered, with keywords that it knows",
            remedy="give modules: [package] when a package registers it",
        ) from error


def _action_space(env: Any, name: str) -> spaces.Box:
    space = env.action_space
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise RobotError(f"environment {name!r} has action space {space}", rule="a Box of floats")
    return space


def _action_feature(space: spaces.Box) -> Feature:
    """One bound for all elements, as a Feature has: the widest. ``send`` clips each element to its own."""
    low, high = float(space.low.min()), float(space.high.max())
    bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    return Feature("float32", (int(np.prod(space.shape)),), "", low if bounded else None, high if bounded else None)


def _observation_keys(space: Any, rename: Mapping[str, str], env: str) -> dict[tuple[str, ...], tuple[str, spaces.Box]]:
    """Path into the observation -> (feature name, space)."""
    keys: dict[tuple[str, ...], tuple[str, spaces.Box]] = {}

    def visit(path: tuple[str, ...], inner: Any) -> None:
        if isinstance(inner, spaces.Dict):
            for key, child in inner.spaces.items():
                visit((*path, str(key)), child)
            return
        if not isinstance(inner, spaces.Box):
            raise RobotError(f"environment {env!r} observes {'.'.join(path) or 'a'} {inner}", rule="a Box, or a Dict of them")
        name = rename.get(".".join(path)) or _default_name(path, inner)
        if name in (other for other, _ in keys.values()):
            raise RobotError(f"environment {env!r} has two observations named {name!r}", remedy="rename: {key: name}")
        keys[path] = (name, inner)

    visit((), space)
    return keys


def _default_name(path: tuple[str, ...], space: spaces.Box) -> str:
    is_image = space.dtype == np.uint8 and len(space.shape) == 3
    if not path:
        return IMAGE_PREFIX + "main" if is_image else STATE
    key = re.sub(r"[^a-z0-9_.]+", "_", ".".join(path).lower())
    return (IMAGE_PREFIX if is_image else "observation.") + key


def _feature(space: spaces.Box, codec: str) -> Feature:
    shape: tuple[int, ...] = tuple(space.shape) or (1,)
    if space.dtype == np.uint8 and len(shape) == 3:
        return Feature("uint8", shape, codec=codec if shape[2] in (1, 3) else "raw")
    return Feature("float32" if np.issubdtype(space.dtype, np.floating) else str(space.dtype), shape)
