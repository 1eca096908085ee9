"""What a robot measures and accepts: Feature and RobotSpec, with LeRobot's names.

A spec is plain data. Its hash names it on the wire and on disk, so that data recorded under an older spec
stays readable.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fleet.errors import SpecError

ACTION = "action"
STATE = "observation.state"
IMAGE_PREFIX = "observation.images."
DTYPES = ("float32", "float64", "int32", "int64", "uint8", "bool")
CODECS = ("raw", "jpeg")
MAX_ELEMENTS = 64 * 1024 * 1024
_NAME = re.compile(r"^[a-z][a-z0-9_.]{0,95}$")
ROBOT_ID = re.compile(r"^[a-z0-9][a-z0-9_-]{0,31}$")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One named array of an observation or an action.

    Args:
        dtype: One of ``DTYPES``.
        shape: Static shape; images are (height, width, channels) uint8.
        unit: Physical unit for people to read, for example "rad"; "" where there is none.
        low, high: Bounds of every element in ``unit``, or None where unbounded.
        codec: How one value is stored: "raw", or for images "jpeg".
    """

    dtype: str
    shape: tuple[int, ...]
    unit: str = ""
    low: float | None = None
    high: float | None = None
    codec: str = "raw"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def np_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def is_image(self) -> bool:
        return self.dtype == "uint8" and len(self.shape) == 3


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """What one type of robot measures and accepts.

    Args:
        robot_type: Short name of the type, for example "metaworld_sawyer".
        control_hz: Rate of the control loop in Hz.
        features: By LeRobot's names; ``action`` is required and is a float32 vector.

    Raises:
        SpecError: A name, dtype, shape, bound or codec breaks the rules above.
    """

    robot_type: str
    control_hz: float
    features: Mapping[str, Feature]

    def __post_init__(self) -> None:
        if not 0 < self.control_hz <= 10_000:
            raise SpecError(f"control_hz is {self.control_hz}", rule="0 < control_hz <= 10000")
        for name, feature in self.features.items():
            _check_feature(name, feature)
        action = self.features.get(ACTION)
        if action is None or action.dtype != "float32" or len(action.shape) != 1:
            raise SpecError(
                f"feature 'action' of {self.robot_type!r} is {action}",
                rule="every robot has an action, a float32 vector",
                remedy="declare Feature('float32', (num_joints,), unit, low, high)",
            )

    @property
    def action(self) -> Feature:
        return self.features[ACTION]

    @property
    def observations(self) -> dict[str, Feature]:
        return {name: f for name, f in sorted(self.features.items()) if name.startswith("observation.")}

    def to_dict(self) -> dict[str, Any]:
        features = {name: dataclasses.asdict(f) for name, f in sorted(self.features.items())}
        for feature in features.values():
            feature["shape"] = list(feature["shape"])
        return {"robot_type": self.robot_type, "control_hz": float(self.control_hz), "features": features}

    @classmethod
    def from_dict(cls, data: Any) -> RobotSpec:
        """Reads what ``to_dict`` wrote. Safe on untrusted input.

        Raises:
            SpecError: The data is not a spec.
        """
        try:
            features = {}
            for name, raw in data["features"].items():
                fields = dict(raw)
                fields["shape"] = tuple(int(n) for n in fields["shape"])
                features[str(name)] = Feature(**fields)
            return cls(str(data["robot_type"]), float(data["control_hz"]), features)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SpecError(f"spec cannot be read: {error!r}", rule="the form that RobotSpec.to_dict writes") from None

    @functools.cached_property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON form."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def check(self, values: Mapping[str, np.ndarray], names: tuple[str, ...]) -> None:
        """Checks that ``values`` holds ``names`` with this spec's shapes and dtypes.

        Raises:
            SpecError: Names the feature, what came and what was expected.
        """
        for name in names:
            feature, value = self.features[name], values.get(name)
            if value is None:
                raise SpecError(f"feature {name!r} is missing", rule=f"{self.robot_type} has {sorted(self.features)}")
            if tuple(value.shape) != feature.shape or value.dtype != feature.np_dtype:
                raise SpecError(
                    f"feature {name!r} is {value.dtype}{tuple(value.shape)}",
                    rule=f"the spec of {self.robot_type} says {feature.dtype}{feature.shape}",
                )


def _check_feature(name: str, feature: Feature) -> None:
    where = f"feature {name!r}"
    if not _NAME.match(name) or not (name == ACTION or name.startswith(("observation.", "extra."))):
        raise SpecError(f"{where} has a name out of the rules", rule="'action', 'observation.*' or 'extra.*', lower case")
    if feature.dtype not in DTYPES:
        raise SpecError(f"{where} has dtype {feature.dtype!r}", rule=f"one of {DTYPES}")
    if not feature.shape or any(not 0 < n <= 65536 for n in feature.shape) or feature.size > MAX_ELEMENTS:
        raise SpecError(f"{where} has shape {feature.shape}", rule="1 to 65536 in each dimension, at most 64 Mi elements")
    if feature.codec not in CODECS:
        raise SpecError(f"{where} has codec {feature.codec!r}", rule=f"one of {CODECS}")
    if feature.codec != "raw" and not (feature.is_image and feature.shape[2] in (1, 3)):
        raise SpecError(f"{where} has codec {feature.codec!r}", rule="jpeg is for uint8 images (H, W, 1 or 3)")
    if not isinstance(feature.unit, str):
        raise SpecError(f"{where} has unit of type {type(feature.unit).__name__}", rule="a string")
    for bound in (feature.low, feature.high):
        if bound is not None and not isinstance(bound, (int, float)):
            raise SpecError(f"{where} has a bound {bound!r}", rule="low and high are one number each, or None")
    if feature.low is not None and feature.high is not None and not feature.low < feature.high:
        raise SpecError(f"{where} has bounds [{feature.low}, {feature.high}]", rule="low < high")
