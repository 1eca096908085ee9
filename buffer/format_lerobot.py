"""What of ours is what in a LeRobotDataset v3, in both directions. Needs lerobot only where ``load_lerobot`` is called.

    ours                             LeRobot
    RobotSpec.features               columns of the same names; images as "image" or "video"
    RobotSpec.control_hz             fps, a whole number
    instruction of the episode       task
    next.reward                      next.reward
    next.terminated, next.truncated  next.done (either of them) and next.truncated
    outcome                          next.success, true in the last frame of an episode that succeeded
    source, intervention             columns of their own, ``source`` as fleet.robot.Source's numbers
    version behind the step          policy_version, -1 for none
    operator_id                      operator_index, -1 for nobody; the names stand in meta/fleet.json

What LeRobot knows and we do not: names of joints. They are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fleet.errors import DatasetError
from fleet.spec import ACTION, DTYPES, IMAGE_PREFIX, Feature, RobotSpec

FORMAT_VERSION = "v3."
SIDECAR = Path("meta") / "fleet.json"
REWARD, DONE, TRUNCATED, SUCCESS = "next.reward", "next.done", "next.truncated", "next.success"
_SCALAR = {"shape": (1,), "names": None}
STEP_COLUMNS: dict[str, dict[str, Any]] = {
    REWARD: {"dtype": "float32", **_SCALAR},
    DONE: {"dtype": "bool", **_SCALAR},
    TRUNCATED: {"dtype": "bool", **_SCALAR},
    SUCCESS: {"dtype": "bool", **_SCALAR},
    "intervention": {"dtype": "bool", **_SCALAR},
    "source": {"dtype": "int64", **_SCALAR},
    "policy_version": {"dtype": "int64", **_SCALAR},
    "operator_index": {"dtype": "int64", **_SCALAR},
}
# Columns that LeRobot itself writes.
DEFAULT_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
IMAGE_DTYPES = ("image", "video")


def load_lerobot() -> Any:
    """The class LeRobotDataset, kept from asking the network.

    Raises:
        DatasetError: lerobot is not installed here.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; without it a missing file is looked for in the hub
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise DatasetError(
            f"lerobot cannot be loaded: {error}",
            rule="import and export of LeRobot datasets run where lerobot is installed, on Python 3.12 or newer",
            remedy="`make lerobot`, then use .venv-lerobot/bin/fleet in place of fleet; or pip install 'fleet-rl[lerobot]'",
        ) from None
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar an episode
    return LeRobotDataset


def features_of(spec: RobotSpec, *, video: bool) -> dict[str, dict[str, Any]]:
    """LeRobot's features of what a robot of this spec recorded, with ``STEP_COLUMNS``."""
    features: dict[str, dict[str, Any]] = {}
    for name, feature in sorted(spec.features.items()):
        if feature.is_image and name.startswith(IMAGE_PREFIX):
            kind, axes = "video" if video else "image", ["height", "width", "channels"]
            features[name] = {"dtype": kind, "shape": feature.shape, "names": axes}
        else:
            features[name] = {"dtype": feature.dtype, "shape": feature.shape, "names": None}
    return {**features, **STEP_COLUMNS}


def whole_fps(control_hz: float) -> int:
    """LeRobot's frames per second.

    Raises:
        DatasetError: The rate is not a whole number.
    """
    if control_hz != int(control_hz):
        raise DatasetError(
            f"control_hz is {control_hz:g}", rule="a LeRobot dataset has a whole number of frames per second", remedy=""
        )
    return int(control_hz)


@dataclasses.dataclass(frozen=True)
class Info:
    """A dataset as its meta/info.json describes it.

    Args:
        spec: What its robot measured, with our names.
        columns: Column of the dataset by our feature's name.
        images: Our names of those that are images; videos: columns that lie in video files, also such as are left out.
        has: Which of ``STEP_COLUMNS`` it has.
        left_out: Columns that are not taken over.
    """

    root: Path
    spec: RobotSpec
    columns: Mapping[str, str]
    images: frozenset[str]
    videos: tuple[str, ...]
    has: frozenset[str]
    left_out: tuple[str, ...]


def read_info(root: Path, *, cameras: Mapping[str, str], leave_out: Collection[str], codec: str) -> Info:
    """Reads meta/info.json and makes a spec of it.

    Args:
        cameras: New name by the dataset's name, without ``observation.images.``.
        leave_out: Columns not to take over.
        codec: Of images, "jpeg" or "raw".

    Raises:
        DatasetError: No dataset of version 3, a feature that cannot be taken over, or an unknown name in ``cameras`` or
            ``leave_out``.
    """
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version, columns, fps = str(info["codebase_version"]), dict(info["features"]), float(info["fps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} cannot be read: {error!r}", rule="the folder of a LeRobot dataset has meta/info.json"
        ) from None
    if not version.startswith(FORMAT_VERSION):
        raise DatasetError(
            f"{root} is a dataset of version {version}",
            rule="version 3 is read",
            remedy="python -m lerobot.scripts.convert_dataset_v21_to_v30",
        )
    renamed = {IMAGE_PREFIX + old: IMAGE_PREFIX + new for old, new in cameras.items()}
    unknown = sorted((set(renamed) | set(leave_out)) - set(columns))
    if unknown:
        raise DatasetError(f"the dataset has no {unknown}", rule=f"it has {sorted(columns)}")
    ours: dict[str, Feature] = {}
    of_dataset: dict[str, str] = {}
    skipped = []
    for column, described in columns.items():
        if column in DEFAULT_COLUMNS or column in STEP_COLUMNS:
            continue
        if column in leave_out:
            skipped.append(column)
            continue
        name = str(renamed.get(column, column))
        if name != ACTION and not name.startswith(("observation.", "extra.")):
            name = f"extra.{name}"
        ours[name], of_dataset[name] = _feature(column, described, codec), column
    return Info(
        root,
        RobotSpec(str(info.get("robot_type") or "lerobot"), fps, ours),
        of_dataset,
        images=frozenset(name for name, column in of_dataset.items() if columns[column]["dtype"] in IMAGE_DTYPES),
        videos=tuple(column for column in columns if columns[column]["dtype"] == "video"),
        has=frozenset(set(columns) & set(STEP_COLUMNS)),
        left_out=tuple(skipped),
    )


def _feature(column: str, described: Mapping[str, Any], codec: str) -> Feature:
    dtype, shape = str(described["dtype"]), tuple(int(n) for n in described["shape"])
    if dtype in IMAGE_DTYPES:
        info = described.get("info") or described.get("video_info") or {}
        if len(shape) != 3 or info.get("is_depth_map") or info.get("video.is_depth_map"):
            raise _not_taken(column, f"{dtype} of shape {shape}, a depth map or no image")
        names = [str(name).rstrip("s") for name in described.get("names") or ()]
        if names[:1] == ["channel"]:
            shape = (shape[1], shape[2], shape[0])
        return Feature("uint8", shape, codec=codec)
    if column == ACTION and dtype == "float64":
        dtype = "float32"
    if dtype not in DTYPES:
        raise _not_taken(column, dtype)
    return Feature(dtype, shape or (1,))


def _not_taken(column: str, found: str) -> DatasetError:
    return DatasetError(
        f"column {column!r} is {found}",
        rule=f"images, and numbers of {DTYPES}, are taken over",
        remedy=f"--leave-out {column}",
    )
