"""State values: how good it is to be in a state, for a task. What RECAP, IQL and others judge steps by.

    value(obs) -> value_B           the expected value
    value.loss(obs, target_B) -> loss_B

With ``num_bins`` above 1 the value is a distribution: categorical over so many values evenly spaced on [low, high] (C51's
support, arXiv 1707.06887), trained by the cross-entropy with the two bins next to the target, in proportion to how near they
are ("two-hot", as in RECAP, arXiv 2511.14759). With one bin it is a number, trained by half the squared error.

Shape suffixes: B batch, V bins, F hidden width, S input dims.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algorithms.policies.base import INSTRUCTION, PolicySpec
from algorithms.policies.normalise import Normaliser, full_precision
from algorithms.policies.statistics import Statistics
from algorithms.policies.vision import Cameras
from fleet.errors import PolicyError
from fleet.lookup import check_settings


@dataclasses.dataclass
class ValueConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes; cameras too."""
    instruction_dim: int = 32
    """Size of obs["instruction"]; 0 for one task."""
    num_bins: int = 201
    """V; 1: a number instead of a distribution."""
    low: float = -1.0
    """Smallest value of the distribution."""
    high: float = 0.0
    """Largest value of the distribution."""
    width: int = 256
    """F, units of each hidden layer."""
    num_layers: int = 3
    """Hidden layers."""
    vision: str = "cnn"
    """How cameras are seen, see ``algorithms.policies.vision``."""
    vision_width: int = 64
    """Width of an image's tokens."""
    image_dims: int = 64
    """Features that are made of all tokens of one camera."""


class StateReader(nn.Module):
    """obs -> (B, S): normalised vectors, the instruction, and a summary of each camera, joined. S is ``size``.

    Args:
        instruction_dim: Size of obs["instruction"]; 0: it is not read.
        shift_pixels: Images are moved by up to so many pixels where ``noise`` is given.
    """

    def __init__(
        self,
        reads: Mapping[str, tuple[int, ...]],
        instruction_dim: int,
        vision: str,
        vision_width: int,
        image_dims: int,
        shift_pixels: int = 0,
    ) -> None:
        super().__init__()
        shapes = {name: tuple(int(n) for n in shape) for name, shape in sorted(reads.items())}
        spec = PolicySpec(shapes, {INSTRUCTION: (instruction_dim,)} if instruction_dim else {}, 0, 0)
        self.reads, self.conditions = spec.reads, spec.conditions
        self.normaliser = Normaliser(spec.vectors)
        self.cameras = Cameras(spec.images, vision, vision_width, shift_pixels)
        self.summaries = self.cameras.summaries(image_dims)
        self.size = self.normaliser.size + instruction_dim + len(spec.images) * image_dims

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one of a vector is missing, of another shape, or not finite."""
        self.normaliser.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """How images are moved, see ``algorithms.policies.vision.shift_noise``."""
        return self.cameras.noise(batch_size, generator)

    def forward(self, obs: Mapping[str, Tensor], noise: Any = None) -> Tensor:
        """Without ``noise`` images are taken as they are.

        Raises:
            PolicyError: A feature is missing, or has another shape.
        """
        parts = [self.normaliser(obs)]
        if self.conditions:  # a unit vector, brought to the size of normalised features
            parts.append(obs[INSTRUCTION] * math.sqrt(obs[INSTRUCTION].shape[1]))
        parts += [summary(tokens) for summary, tokens in zip(self.summaries, self.cameras(obs, noise), strict=True)]
        return torch.cat(parts, 1)


class StateValue(nn.Module):
    """See the header: a network with LayerNorm over what ``StateReader`` reads.

    Attributes:
        bins_V: The values of the bins; of one bin: 0.

    Raises:
        PolicyError: A setting is out of its range.
    """

    Config = ValueConfig
    bins_V: Tensor

    def __init__(self, config: ValueConfig) -> None:
        super().__init__()
        sizes = (config.num_bins, config.width, config.num_layers, config.vision_width, config.image_dims)
        if not config.reads or min(sizes) < 1 or config.instruction_dim < 0 or not config.low < config.high:
            raise PolicyError(
                f"a value of {config}",
                rule="reads is not empty; sizes are at least 1, instruction_dim at least 0; low < high",
            )
        self.num_bins, self.low, self.high = config.num_bins, float(config.low), float(config.high)
        vision = (config.vision, config.vision_width, config.image_dims)
        self.reader = StateReader(config.reads, config.instruction_dim, *vision)
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise([self.reader.size] + [config.width] * config.num_layers):
            layers += [nn.Linear(num_in, num_out), nn.LayerNorm(num_out), nn.ReLU()]
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(config.width, config.num_bins)
        bins_V = torch.linspace(self.low, self.high, self.num_bins) if self.num_bins > 1 else torch.zeros(1)
        self.register_buffer("bins_V", bins_V, persistent=False)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one of a vector is missing, of another shape, or not finite."""
        self.reader.set_statistics(statistics)

    def logits(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, V) in float32: of the distribution; of one bin the value itself."""
        out_BV: Tensor = self.head(self.trunk(self.reader(obs)))
        return out_BV.float()

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B,) in float32: the expected value."""
        logits_BV = self.logits(obs)
        return logits_BV[:, 0] if self.num_bins == 1 else expectation(logits_BV, self.bins_V)

    def loss(self, obs: Mapping[str, Tensor], target_B: Tensor) -> Tensor:
        """(B,) in float32: cross-entropy with the two-hot target, or of one bin half the squared error.

        Args:
            target_B: Finite; what lies outside of [low, high] counts as the nearest of both.
        """
        logits_BV = self.logits(obs)
        if self.num_bins == 1:
            return 0.5 * (logits_BV[:, 0] - target_B.float()) ** 2
        return cross_entropy(logits_BV, two_hot(target_B, self.low, self.high, self.num_bins))


def two_hot(value_B: Tensor, low: float, high: float, num_bins: int) -> Tensor:
    """(B, V): probabilities of ``num_bins`` values evenly spaced on [low, high], of which the two next to each value have all,
    so that the expectation is the value. Values outside of the range count as its nearest end; none is NaN.

    Example: -0.3337 on 201 bins of [-1, 0] lies at 133.26: 0.74 on bin 133, 0.26 on bin 134.
    """
    with full_precision(value_B):
        place_B = (value_B.double().clamp(low, high) - low) / (high - low) * (num_bins - 1)
        below_B = place_B.floor().clamp(max=num_bins - 2).long()
        upper_B = (place_B - below_B).to(torch.float64 if value_B.dtype == torch.float64 else torch.float32)
        hot_BV = upper_B.new_zeros(len(value_B), num_bins)
        hot_BV.scatter_(1, below_B[:, None], (1 - upper_B)[:, None])
        return hot_BV.scatter_(1, below_B[:, None] + 1, upper_B[:, None])


def expectation(logits_BV: Tensor, bins_V: Tensor) -> Tensor:
    """(B,): mean of the distribution."""
    with full_precision(logits_BV):
        return (logits_BV.softmax(-1) * bins_V.to(logits_BV.dtype)).sum(-1)


def cross_entropy(logits_BV: Tensor, target_BV: Tensor) -> Tensor:
    """(B,): -sum_v target log softmax(logits), in the logits' precision."""
    with full_precision(logits_BV):
        return -(target_BV.to(logits_BV.dtype) * functional.log_softmax(logits_BV, -1)).sum(-1)


def build_value(config: Mapping[str, Any]) -> StateValue:
    """A value with fresh weights; ``config`` has fields of ``ValueConfig``.

    Raises:
        PolicyError: Unknown or missing field, or a value out of its range.
    """
    check_settings(ValueConfig, config, kind="value", error=PolicyError)
    return StateValue(ValueConfig(**config))


def value_like(spec: PolicySpec, settings: Mapping[str, Any]) -> StateValue:
    """A value that reads what a policy of this spec reads.

    Args:
        settings: Fields of ``ValueConfig`` that are to differ.

    Raises:
        PolicyError: As ``build_value``.
    """
    instruction_dim = spec.conditions.get(INSTRUCTION, (0,))[0]
    return build_value({"reads": spec.reads, "instruction_dim": instruction_dim, **settings})
