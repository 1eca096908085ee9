"""What every part of the buffer's benchmark stores: steps of a robot with two cameras, state and action.

Raw: two uint8 128 x 128 x 3 cameras, state of 39 and action of 7 float32: 98,488 bytes a step, on every system alike.
Frames are noise, as a real camera's lowest bits are: no system may gain from compressing what a robot could not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from actors.fragments import encode_rows
from buffer import sidecar
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.manifest import live_segments
from fleet.files import Files
from fleet.images import encode
from fleet.robot import Source
from fleet.spec import Feature, RobotSpec

STATE, ACTION, CAMERAS = 39, 7, ("observation.images.front", "observation.images.wrist")
STEP_BYTES = 2 * 128 * 128 * 3 + 4 * (STATE + ACTION)
FRAGMENT_STEPS, EPISODE_STEPS = 20, 400  # 1 s and 20 s at 20 Hz
WARM_STEPS = 480  # sent before the clock starts
TASK = "benchmark"
_POOL = 64  # different frames; each step takes the next one


def make_spec(codec: str = "raw", size: int = 0) -> RobotSpec:
    """``size`` of the square cameras; 0: 128 for ``raw``, 224 for ``jpeg``."""
    size = size or (128 if codec == "raw" else 224)
    features = {name: Feature("uint8", (size, size, 3), codec=codec) for name in CAMERAS}
    features["observation.state"] = Feature("float32", (STATE,))
    features["action"] = Feature("float32", (ACTION,))
    return RobotSpec("benchmark", 20.0, features)


def make_frames(size: int, seed: int, smooth: bool = False) -> np.ndarray:
    """(64, size, size, 3) uint8 frames: noise, or shades with a little noise, as jpeg is made for."""
    rng = np.random.default_rng(seed)
    if not smooth:
        return rng.integers(0, 256, (_POOL, size, size, 3), dtype=np.uint8)
    y, x = np.mgrid[:size, :size] / size
    phase = rng.uniform(0, 6, (_POOL, 1, 1, 3))
    shades = 128 + 90 * np.sin(6 * x[None, :, :, None] + 4 * y[None, :, :, None] + phase)
    return (shades + rng.normal(0, 3, (_POOL, size, size, 3))).clip(0, 255).astype(np.uint8)


class Robot:
    """Makes the rows of one robot's fragments, step by step, from arrays as its cameras would hand them over."""

    def __init__(self, robot_id: str, boot_id: str, codec: str = "raw", seed: int = 0, size: int = 0) -> None:
        self.spec, self.robot_id, self.boot_id = make_spec(codec, size), robot_id, boot_id
        size = self.spec.features[CAMERAS[0]].shape[0]
        self._frames = make_frames(size, seed, smooth=codec != "raw")
        self._vectors = np.random.default_rng(seed).normal(size=(_POOL, STATE)).astype(np.float32)
        self._step = 0

    def fragments(self, num_steps: int) -> Iterator[tuple[int, dict[str, list[dict[str, Any]]]]]:
        """(episode, rows by table) of fragments of ``FRAGMENT_STEPS`` steps, or fewer at the end and at an episode's."""
        end = self._step + num_steps
        while self._step < end:
            first, episode = self._step, self._step // EPISODE_STEPS
            self._step = min(first + FRAGMENT_STEPS, end, (episode + 1) * EPISODE_STEPS)
            yield episode, {"steps": [self._row(step) for step in range(first, self._step)]}

    def _row(self, step: int) -> dict[str, Any]:
        episode, frame = divmod(step, EPISODE_STEPS)
        row = {
            "robot_id": self.robot_id,
            "boot_id": self.boot_id,
            "episode_id": episode,
            "frame_index": frame,
            "time_ns": time.time_ns(),
            "mono_ns": time.monotonic_ns(),
            "task": TASK,
            "source": int(Source.OPERATOR),
            "operator_id": "",
            "intervention": False,
            "chunk_id": -1,
            "chunk_index": -1,
            "next.reward": 0.0,
            "next.terminated": False,
            "next.truncated": False,
            "action": self._vectors[step % _POOL, :ACTION],
            "observation.state": self._vectors[step % _POOL],
        }
        for i, name in enumerate(CAMERAS):
            row[name] = encode(self.spec.features[name], self._frames[(step + i) % _POOL])
        return row


def fill_log(folder: Path, num_steps: int, codec: str = "raw", boot_id: str = "0" * 16, size: int = 0) -> None:
    """Writes ``num_steps`` steps of one robot into a log, past the wire, as ingest stores them; and the
    sidecars, as the keeper makes them."""
    robot, log = Robot("robot-0", boot_id, codec, size=size), Log(folder)
    ingest = Ingest(log)
    first = ingest.admit(robot.robot_id, boot_id, robot.spec) + 1
    for seq, (_, rows) in enumerate(robot.fragments(num_steps), first):
        directory, payload = encode_rows(robot.spec, rows)
        fields = {"boot_id": boot_id, "seq": seq, "spec_hash": robot.spec.hash, "tables": directory}
        ingest.offer(robot.robot_id, fields, payload)
        if seq % 16 == 0:
            ingest.commit()
    ingest.commit()
    log.close()
    for name in live_segments(folder):
        if not name.index_path.exists():
            sidecar.write(Files(), folder, name)
