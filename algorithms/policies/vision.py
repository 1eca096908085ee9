"""Images as tokens: small encoders that are trained with the policy, and the shift that augments them.

Shape suffixes: B batch, N tokens, F width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fleet.errors import PolicyError
from fleet.lookup import resolve

VISION = {"cnn": "algorithms.policies.vision:Cnn"}


def make_vision(name: str, shape: tuple[int, ...], width: int, camera: str = "") -> Any:
    """A module (B, height, width, channels) uint8 -> (B, N, F), with the attribute ``num_tokens``.

    Args:
        name: A key of ``VISION``, or module:Class.
        shape: Of the camera's images.
        camera: Its name, for messages.

    Raises:
        PolicyError: The name is unknown, or the images are too small.
    """
    return resolve(VISION, name, kind="vision encoder", error=PolicyError)(shape, width)


def shift_noise(batch_size: int, cameras: list[str], pixels: int, generator: torch.Generator | None) -> dict[str, Tensor]:
    """By camera, under the key "shift.NAME": (B, 2) rows and columns in [0, 2 pixels]."""
    if not pixels:
        return {}
    return {f"shift.{name}": torch.randint(0, 2 * pixels + 1, (batch_size, 2), generator=generator) for name in cameras}


def random_shift(image_BHWC: Tensor, camera: str, pixels: int, noise: Mapping[str, Tensor] | None) -> Tensor:
    """Images moved by what ``noise`` says, their edges repeated; unchanged without noise (DrQ, arXiv 2004.13649)."""
    shift = None if not isinstance(noise, Mapping) else noise.get(f"shift.{camera}")
    if shift is None or not pixels:
        return image_BHWC
    batch, height, width, _ = image_BHWC.shape
    shift = shift.to(image_BHWC.device)
    rows = (torch.arange(height, device=shift.device) + shift[:, :1] - pixels).clamp(0, height - 1)
    columns = (torch.arange(width, device=shift.device) + shift[:, 1:] - pixels).clamp(0, width - 1)
    index = torch.arange(batch, device=shift.device)[:, None, None]
    return image_BHWC[index, rows[:, :, None], columns[:, None, :]]


class Cnn(nn.Module):
    """Four strided convolutions; each place of the last map is a token."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        sizes = [shape[2], 32, 64, 128, width]
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(sizes):
            layers += [nn.Conv2d(num_in, num_out, 3, stride=2, padding=1), nn.GroupNorm(8, num_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():
            self.num_tokens = self.layers(torch.zeros(1, shape[2], shape[0], shape[1])).flatten(2).shape[2]

    def forward(self, image_BHWC: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        x = self.layers(image_BHWC.permute(0, 3, 1, 2).to(dtype) / 255 - 0.5)
        return x.flatten(2).mT
