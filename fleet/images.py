"""Camera frames as bytes: jpeg through simplejpeg, loaded when the first frame needs it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fleet.errors import SpecError
from fleet.spec import Feature

JPEG_QUALITY = 90


def encode(feature: Feature, image: np.ndarray) -> Any:
    """What the steps table stores for one value of ``feature``: the array itself, or its encoded bytes.

    Raises:
        SpecError: The codec's library is not installed, or the codec is not served.
    """
    if feature.codec == "raw":
        return image
    space = "RGB" if feature.shape[2] == 3 else "GRAY"
    data: bytes = _jpeg(feature).encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace=space)
    return data


def decode(feature: Feature, data: bytes) -> np.ndarray:
    """The frame, uint8 (H, W, C).

    Raises:
        SpecError: The bytes are not an image of the stated shape, or the codec is not served.
    """
    space = "RGB" if feature.shape[2] == 3 else "GRAY"
    try:
        image: np.ndarray = _jpeg(feature).decode_jpeg(data, colorspace=space)
    except ValueError as error:
        raise SpecError(
            f"{len(data)} bytes are not a jpeg: {error}", rule="images are encoded as their feature's codec says"
        ) from None
    if image.shape != feature.shape:
        raise SpecError(f"image of shape {image.shape}", rule=f"the spec says {feature.shape}")
    return image


def _jpeg(feature: Feature) -> Any:
    if feature.codec != "jpeg":
        raise SpecError(f"codec {feature.codec!r}", rule="cameras are stored as 'jpeg' or 'raw'", remedy="set codec: jpeg")
    try:
        import simplejpeg
    except ImportError:
        raise SpecError(
            "simplejpeg is not installed", rule="codec 'jpeg' needs it", remedy="pip install 'fleet-rl[images]'"
        ) from None
    return simplejpeg
