"""Camera frames as bytes: jpeg through simplejpeg, loaded when the first frame needs it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fleet.errors import ImageError, SpecError
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
        ImageError: The bytes are not an image of the stated shape.
        SpecError: The codec's library is not installed, or the codec is not served.
    """
    space = "RGB" if feature.shape[2] == 3 else "GRAY"
    try:
        # A few bytes that were damaged cost a few blocks of one frame. Raising would end the learner for them.
        image: np.ndarray = _jpeg(feature).decode_jpeg(data, colorspace=space, strict=False)
    except ValueError as error:
        raise ImageError(
            f"{len(data)} bytes are not a jpeg: {error}", rule="images are encoded as their feature's codec says"
        ) from None
    if image.shape != feature.shape:
        raise ImageError(f"image of shape {image.shape}", rule=f"the spec says {feature.shape}")
    return image


def jpeg_shape(data: bytes | memoryview) -> tuple[int, int, int] | None:
    """(H, W, C) from the header of a jpeg, without its library; None where the bytes are none. Safe on untrusted bytes."""
    at, end = 2, len(data)
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    while at + 10 <= end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header, of any kind
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8], data[at + 9]
        at += 2 + max(length, 2)
    return None


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
