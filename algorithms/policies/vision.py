"""Images as tokens: small encoders that are trained with the policy from random weights, and the shift that augments.

An encoder is a module made from (shape, width), shape = (height, width, channels) of a camera's images. It has ``num_tokens``
and takes uint8 (B, height, width, channels) to (B, N, F). Your own is named "module:Class" in the policy's ``vision``.

Shape suffixes: B batch, N tokens, F width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.transformer import Block
from fleet.errors import PolicyError
from fleet.lookup import resolve

VISION = {"cnn": "algorithms.policies.vision:Cnn", "vit": "algorithms.policies.vision:Vit"}
MAX_SIDE = 10  # rows and columns of tokens that an image is reduced to, at most
MIN_PIXELS, MAX_PIXELS = 16, 1024  # sides of images


def make_vision(name: str, shape: tuple[int, ...], width: int, camera: str = "") -> Any:
    """An encoder, see the header.

    Args:
        name: A key of ``VISION``, or module:Class.
        shape: Of the camera's images.
        camera: Its name, for messages.

    Raises:
        PolicyError: The name is unknown, or the encoder is not made for such images.
    """
    cls = resolve(VISION, name, kind="vision encoder", error=PolicyError)
    try:
        return cls(tuple(shape), width)
    except PolicyError as error:
        raise PolicyError(f"camera {camera!r}: {error.what}", rule=error.rule, remedy=error.remedy) from None


class Cameras(nn.Module):
    """An encoder for each camera; images are shifted by the policy's noise while training.

    Args:
        images: Shapes by name, ``PolicySpec.images``.
        shift_pixels: Images are moved by up to so many pixels (DrQ, arXiv 2004.13649); 0: never.

    Raises:
        PolicyError: As ``make_vision``; or ``shift_pixels`` is negative.
    """

    def __init__(self, images: Mapping[str, tuple[int, ...]], vision: str, width: int, shift_pixels: int) -> None:
        super().__init__()
        if shift_pixels < 0:
            raise PolicyError(f"shift_pixels is {shift_pixels}", rule="at least 0")
        self._images, self._width, self._shift = dict(images), width, shift_pixels
        encoders = [make_vision(vision, shape, width, name) for name, shape in self._images.items()]
        self.encoders = nn.ModuleList(encoders)
        self.num_tokens = [int(encoder.num_tokens) for encoder in encoders]

    def summaries(self, num_out: int) -> nn.ModuleList:
        """Layers that make (B, num_out) of the tokens of each camera. Each place has weights of its own: where things are is
        kept, which a mean over the tokens forgets."""
        sizes = [num_tokens * self._width for num_tokens in self.num_tokens]
        return nn.ModuleList(nn.Sequential(nn.Flatten(1), nn.Linear(size, num_out), nn.LayerNorm(num_out)) for size in sizes)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """An entry of the policy's noise for each camera, see ``shift_noise``."""
        return shift_noise(batch_size, list(self._images), self._shift, generator)

    def forward(self, obs: Mapping[str, Tensor], noise: Any = None) -> list[Tensor]:
        """Tokens (B, N, F) of each camera. Without ``noise`` images are taken as they are.

        Raises:
            PolicyError: A camera is missing, or its images are others than those that the policy was made for.
        """
        tokens = []
        for (name, shape), encoder in zip(self._images.items(), self.encoders, strict=True):
            image_BHWC = obs.get(name)
            if image_BHWC is None or image_BHWC.shape[1:] != shape or image_BHWC.dtype != torch.uint8:
                said = "is missing" if image_BHWC is None else f"is {image_BHWC.dtype} {tuple(image_BHWC.shape[1:])}"
                raise PolicyError(f"camera {name!r} {said} in an observation", rule=f"the policy reads uint8 {shape}")
            tokens.append(encoder(random_shift(image_BHWC, name, self._shift, noise)))
        return tokens


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
    """Convolutions that halve an image until it has at most 10 rows and columns (84 x 84: four of them, 6 x 6). Each place of
    the last map is a token.

    Raises:
        PolicyError: ``width`` is no multiple of 8, or a side is not 16 to 1024 pixels.
    """

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        height, columns, channels = _check_image(shape)
        if width % 8:
            raise PolicyError(f"a vision encoder 'cnn' of width {width}", rule="the width is a multiple of 8")
        layers: list[nn.Module] = []
        num_out = 16
        while max(height, columns) > MAX_SIDE:
            height, columns = -(-height // 2), -(-columns // 2)
            last, first = max(height, columns) <= MAX_SIDE, not layers
            num_in, num_out = (channels, num_out) if first else (num_out, min(128, 2 * num_out))
            num_out = width if last else num_out
            # The first map is most of the work: few channels, and none for a norm.
            kernel = 5 if first else 3
            layers += [nn.Conv2d(num_in, num_out, kernel, stride=2, padding=kernel // 2)]
            layers += [nn.ReLU()] if first else [nn.GroupNorm(8, num_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.num_tokens = height * columns

    def forward(self, image_BHWC: Tensor) -> Tensor:
        tokens_BNF: Tensor = self.layers(_scaled(image_BHWC, self)).flatten(2).mT
        return tokens_BNF


class Vit(nn.Module):
    """A small vision transformer: square patches, as large as makes at most 10 rows and columns of them (84 x 84: 7 x 7 of 12
    pixels), and four blocks. It has no convolution to tell it what is near: it wants more demonstrations than ``cnn``.

    Raises:
        PolicyError: ``width`` is no multiple of 4, a side is not 16 to 1024 pixels, or both sides have no common patch.
    """

    NUM_BLOCKS, NUM_HEADS = 4, 4

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        height, columns, channels = _check_image(shape)
        patch = next((p for p in range(-(-max(height, columns) // MAX_SIDE), 65) if height % p == columns % p == 0), 0)
        if width % self.NUM_HEADS or not patch:
            raise PolicyError(
                f"a vision encoder 'vit' of width {width} for images of shape {shape}",
                rule=f"the width is a multiple of {self.NUM_HEADS}; at most 10 patches of at most 64 pixels fit each side",
                remedy="use images of 84, 96, 128 or 224 pixels a side, or the vision encoder 'cnn'",
            )
        self.num_tokens = (height // patch) * (columns // patch)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.place_NF = nn.Parameter(torch.randn(self.num_tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, self.NUM_HEADS) for _ in range(self.NUM_BLOCKS))
        self.norm = nn.LayerNorm(width)

    def forward(self, image_BHWC: Tensor) -> Tensor:
        x_BNF = self.patches(_scaled(image_BHWC, self)).flatten(2).mT + self.place_NF
        for block in self.blocks:
            x_BNF = block(x_BNF)
        tokens_BNF: Tensor = self.norm(x_BNF)
        return tokens_BNF


def _scaled(image_BHWC: Tensor, module: nn.Module) -> Tensor:
    """(B, channels, height, width), -0.5 to 0.5, in the dtype of the module's weights."""
    return image_BHWC.permute(0, 3, 1, 2).to(next(module.parameters()).dtype) / 255 - 0.5


def _check_image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or not all(MIN_PIXELS <= side <= MAX_PIXELS for side in shape[:2]) or not 1 <= shape[2] <= 4:
        raise PolicyError(
            f"images of shape {shape}",
            rule=f"(height, width, channels), sides of {MIN_PIXELS} to {MAX_PIXELS} pixels, 1 to 4 channels",
            remedy="let the robot send other images, or name a vision encoder of your own",
        )
    return shape[0], shape[1], shape[2]
