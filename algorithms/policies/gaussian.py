"""Gaussian chunks: a network gives the mean of H future actions, one learned constant by action dimension the deviation.

Vector features are joined and normalised; the instruction's embedding and, in the family ``cnn``, what an encoder makes of each
camera is appended; layers of LayerNorm + ReLU follow.

    actions_HA ~ N(mean_HA(obs), diag(std_A^2)),    std_A = half_A exp(log_std_A)

half_A is the scale of normalised actions, 1 where they are taken as they are. Each of the H steps is one decision (T = H).

Shape suffixes: B batch, H chunk length, A action dims, S joined observation dims, F hidden width, N tokens of an image.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import INSTRUCTION, Chunk, PolicySpec
from algorithms.policies.normalise import ActionScale, Normaliser, full_precision
from algorithms.policies.statistics import Statistics
from algorithms.policies.vision import Cameras
from fleet.errors import PolicyError


@dataclasses.dataclass
class MlpConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes. Images are not for the family ``mlp``."""
    action_dim: int
    """A."""
    horizon: int = 8
    """H, actions in a chunk."""
    instruction_dim: int = 32
    """E, size of obs["instruction"]; 0 for a policy of one task."""
    width: int = 256
    """F, units of each hidden layer."""
    num_layers: int = 3
    """Hidden layers."""
    obs_gain: float = 2.0
    """Normalised observations are multiplied by this before the first layer."""
    log_std: float = -2.0
    """Initial log standard deviation of an action, in the mean's units; the imitation loss leaves it alone."""
    normalise_actions: bool = False
    """Whether the network's unit is the 1 % to 99 % range of the data's actions (normalise.py) instead of the robot's units."""
    select: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """Elements that are read of a flattened vector feature, by its name; all of those that are not named."""


@dataclasses.dataclass
class CnnConfig(MlpConfig):
    normalise_actions: bool = True
    """As in ``mlp``."""
    vision: str = "cnn"
    """How an image becomes tokens: a key of ``algorithms.policies.vision.VISION``, or module:Class."""
    vision_width: int = 64
    """Width of an image's tokens."""
    image_dims: int = 128
    """Features that are made of all tokens of one camera."""
    shift_pixels: int = 4
    """Images are moved by up to so many pixels while training (DrQ, arXiv 2004.13649); 0: never."""


class MlpPolicy(nn.Module):
    """See the header: of vectors alone. Implements ``algorithms.policies.base.Policy``."""

    Config: type[MlpConfig] = MlpConfig

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.check(config)
        reads = {name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())}
        self._instruction_dim, self._obs_gain = config.instruction_dim, config.obs_gain
        conditions = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
        self.spec = PolicySpec(reads, conditions, config.action_dim, config.horizon, density=True)
        self.normaliser = Normaliser(self.spec.vectors, config.select)
        self.scale = ActionScale(config.action_dim) if config.normalise_actions else None
        num_inputs = self.normaliser.size + config.instruction_dim + self._add_cameras(config)
        widths = [num_inputs] + [config.width] * config.num_layers
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(widths):
            layers += [nn.Linear(num_in, num_out), nn.LayerNorm(num_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(config.width, config.horizon * config.action_dim)
        self.log_std_A = nn.Parameter(torch.full((config.action_dim,), float(config.log_std)))

    @staticmethod
    def check(config: MlpConfig) -> None:
        """See ``Policy``."""
        sizes = (config.action_dim, config.horizon, config.width, config.num_layers)
        if not config.reads or min(sizes) < 1 or config.instruction_dim < 0:
            raise PolicyError(
                f"gaussian policy of {config}", rule="reads is not empty; sizes are at least 1, instruction_dim at least 0"
            )

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of observations, and of actions where they are normalised."""
        self.normaliser.set_statistics(statistics)
        if self.scale is not None:
            self.scale.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """ "action": standard normal (B, H, A)."""
        return {"action": torch.randn(batch_size, self.spec.horizon, self.spec.action_dim, generator=generator)}

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """The mean, or a sample if ``noise`` is given. This family has no guidance: the value is not used."""
        mean_BHA, std_A = self._distribution(obs)
        actions_BHA = mean_BHA if noise is None else mean_BHA + std_A * noise["action"].to(mean_BHA.device)
        return Chunk(actions_BHA, _log_density(mean_BHA, std_A, actions_BHA))

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, H): log density of each action of the chunk in the robot's units, summed over A."""
        return _log_density(*self._distribution(obs), chunk.actions_BHA)

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """Each step is a decision."""
        return mask_BH

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): L1 distance of the network's mean, averaged over A and the valid actions; 0 where none is valid."""
        # Masked actions may be padded with anything, NaN included: they must not reach the difference.
        target_BHA = torch.where(mask_BH[..., None] > 0, chunk.actions_BHA, torch.zeros_like(chunk.actions_BHA))
        if self.scale is not None:
            target_BHA = self.scale.normalise(target_BHA)
        error_BH = (self._output(self._hidden(obs, noise)) - target_BHA).abs().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): the last hidden layer."""
        return self._hidden(obs, None)

    def _add_cameras(self, config: Any) -> int:
        """Makes whatever reads images; the number of features that come of them."""
        for name, shape in self.spec.images.items():
            raise PolicyError(
                f"family 'mlp' is to read {name!r} of shape {shape}",
                rule="it reads vectors alone",
                remedy="use the family 'cnn', or leave the camera out of policy.config.reads",
            )
        return 0

    def _see(self, obs: Mapping[str, Tensor], noise: Any) -> list[Tensor]:
        """Features of the images, each (B, image_dims)."""
        return []

    def _hidden(self, obs: Mapping[str, Tensor], noise: Any) -> Tensor:
        """(B, F). ``noise`` of the policy moves images."""
        inputs = [self._obs_gain * self.normaliser(obs)]
        if self.spec.conditions:
            # A unit vector of E elements would be drowned by the features, which have about unit variance each.
            inputs.append(obs[INSTRUCTION] * math.sqrt(self._instruction_dim))
        hidden_BF: Tensor = self.trunk(torch.cat([*inputs, *self._see(obs, noise)], 1))
        return hidden_BF

    def _output(self, hidden_BF: Tensor) -> Tensor:
        """(B, H, A) in float32: the mean in the network's units."""
        out: Tensor = self.head(hidden_BF)
        return out.unflatten(1, (self.spec.horizon, self.spec.action_dim)).float()

    def _distribution(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """mean_BHA and std_A in the robot's units; in full precision, or ratios would be of rounding."""
        with full_precision(self.log_std_A):
            mean_BHA, std_A = self._output(self._hidden(obs, None)), self.log_std_A.exp()
            return (mean_BHA, std_A) if self.scale is None else (self.scale.restore(mean_BHA), self.scale.half_A * std_A)


class CnnPolicy(MlpPolicy):
    """See the header: of cameras and vectors."""

    Config = CnnConfig
    cameras = True  # a run file that does not list what it reads means all cameras

    def _add_cameras(self, config: CnnConfig) -> int:
        images = self.spec.images
        if not images:
            raise PolicyError(
                f"family 'cnn' is to read {sorted(self.spec.reads)}",
                rule="it reads at least one camera",
                remedy="add a camera to policy.config.reads, or use the family 'mlp'",
            )
        if min(config.vision_width, config.image_dims) < 1:
            raise PolicyError(
                f"vision_width is {config.vision_width}, image_dims is {config.image_dims}", rule="both are at least 1"
            )
        self.vision = Cameras(images, config.vision, config.vision_width, config.shift_pixels)
        self.summaries = self.vision.summaries(config.image_dims)
        return config.image_dims * len(images)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Also "shift.CAMERA", see vision.py."""
        return {**super().noise(batch_size, generator), **self.vision.noise(batch_size, generator)}

    def _see(self, obs: Mapping[str, Tensor], noise: Any) -> list[Tensor]:
        return [summary(tokens) for summary, tokens in zip(self.summaries, self.vision(obs, noise), strict=True)]


def _log_density(mean_BHA: Tensor, std_A: Tensor, actions_BHA: Tensor) -> Tensor:
    """(B, H)."""
    scaled_BHA = (actions_BHA - mean_BHA) / std_A
    return (-0.5 * scaled_BHA**2 - std_A.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
