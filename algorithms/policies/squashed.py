"""Squashed Gaussian chunks: what an actor-critic explores with (SAC, arXiv 1812.05905, appendix C), over H future actions.

    actions_HA = center_A + half_A tanh(u_HA),    u_HA ~ N(mean_HA(obs), diag(std_HA(obs)^2))

so that every action lies within center +- half: ``bounds`` or, where there are none, a little more than the range of the
demonstrations. Each of the H steps is one decision (T = H); the density is that of the action in the robot's units:

    log p(a_h) = sum_A [ log N(u; mean, std) - log(1 - tanh(u)^2) - log half ]

Draws are differentiable in mean and deviation. The mean is kept within +-MAX_MEAN, the deviation within its range, both
softly: a gradient is left wherever they are. The imitation loss is L1 of tanh(mean) on the scale [-1, 1]; it leaves the
deviation alone.

Shape suffixes: B batch, H chunk length, A action dims, S joined observation dims, F hidden width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import INSTRUCTION, Chunk, PolicySpec
from algorithms.policies.normalise import ActionScale, Normaliser, full_precision
from algorithms.policies.statistics import Statistics
from algorithms.policies.vision import Cameras
from fleet.errors import PolicyError
from fleet.spec import ACTION

MAX_MEAN = 4.0  # tanh(4) is within 7e-4 of the bound
EDGE = 1.0 - 1e-5  # densities are of actions within this part of the range, |u| < 6.1: at the bound itself u is infinite
LOG_STD_RANGE = (-5.0, 0.0)  # a deviation above 0.87 makes tanh of a Gaussian less random, not more
WIDER = 1.1  # times the range of the data's actions
STILL = 1e-4  # half a range is at least this part of its centre: what does not move in the data is hardly moved


@dataclasses.dataclass
class SquashedConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes; cameras too."""
    action_dim: int
    """A."""
    horizon: int = 8
    """H, actions in a chunk."""
    instruction_dim: int = 32
    """E, size of obs["instruction"]; 0 for a policy of one task."""
    bounds: Sequence[float] = ()
    """Lowest and highest value of every action element, in the robot's units; empty: the smallest and largest of the data by
    element, widened by a tenth."""
    width: int = 256
    """F, units of each hidden layer."""
    num_layers: int = 3
    """Hidden layers."""
    obs_gain: float = 2.0
    """Normalised observations are multiplied by this before the first layer."""
    log_std: float = -2.0
    """Initial log standard deviation before tanh, in (-5, 0); -2 is about the entropy of -1/2 by element that SAC aims at."""
    select: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """Elements that are read of a flattened vector feature, by its name; all of those that are not named."""
    vision: str = "cnn"
    """How an image becomes tokens: a key of ``algorithms.policies.vision.VISION``, or module:Class."""
    vision_width: int = 64
    """Width of an image's tokens."""
    image_dims: int = 128
    """Features that are made of all tokens of one camera."""
    shift_pixels: int = 4
    """Images are moved by up to so many pixels in the imitation loss; 0: never."""


class SquashedPolicy(nn.Module):
    """See the header. Implements ``algorithms.policies.base.Policy``."""

    Config = SquashedConfig

    def __init__(self, config: SquashedConfig) -> None:
        super().__init__()
        self.check(config)
        reads = {name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())}
        conditions = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
        self.spec = PolicySpec(reads, conditions, config.action_dim, config.horizon, density=True)
        self._obs_gain, self._bounds = config.obs_gain, tuple(float(bound) for bound in config.bounds)
        self.normaliser, self.scale = Normaliser(self.spec.vectors, config.select), ActionScale(config.action_dim)
        if self._bounds:
            self._set_range(*(torch.full((config.action_dim,), bound) for bound in self._bounds))
        self.vision = Cameras(self.spec.images, config.vision, config.vision_width, config.shift_pixels)
        self.summaries = self.vision.summaries(config.image_dims)
        num_inputs = self.normaliser.size + config.instruction_dim + config.image_dims * len(self.spec.images)
        layers: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise([num_inputs] + [config.width] * config.num_layers):
            layers += [nn.Linear(num_in, num_out), nn.LayerNorm(num_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(config.width, config.horizon * config.action_dim)
        self.spread = nn.Linear(config.width, config.horizon * config.action_dim)
        nn.init.zeros_(self.spread.weight)  # the deviation begins alike everywhere
        low, high = LOG_STD_RANGE
        nn.init.constant_(self.spread.bias, math.log((config.log_std - low) / (high - config.log_std)))

    @staticmethod
    def check(config: SquashedConfig) -> None:
        """See ``Policy``."""
        sizes = (config.action_dim, config.horizon, config.width, config.num_layers, config.vision_width, config.image_dims)
        if not config.reads or min(sizes) < 1 or config.instruction_dim < 0:
            raise PolicyError(
                f"squashed policy of {config}", rule="reads is not empty; sizes are at least 1, instruction_dim at least 0"
            )
        low, high = LOG_STD_RANGE
        if not low < config.log_std < high:
            raise PolicyError(f"log_std is {config.log_std}", rule=f"{low} < log_std < {high}")
        bounds = list(config.bounds)
        if bounds and not (len(bounds) == 2 and all(map(math.isfinite, bounds)) and bounds[0] < bounds[1]):
            raise PolicyError(f"bounds are {bounds}", rule="empty, or a lower and a higher finite number")

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of observations, and of actions: their range, unless ``bounds`` say it."""
        self.normaliser.set_statistics(statistics)
        self.scale.set_statistics(statistics)  # which are checked in any case
        if self._bounds:
            self._set_range(*(torch.full_like(self.scale.half_A, bound) for bound in self._bounds))
            return
        low, high = (torch.as_tensor(getattr(statistics[ACTION], end), dtype=torch.float32) for end in ("min", "max"))
        center, half = (high + low) / 2, WIDER * (high - low) / 2
        self._set_range(center - half, center + half)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """ "action": standard normal (B, H, A); "shift.CAMERA", see vision.py."""
        drawn = torch.randn(batch_size, self.spec.horizon, self.spec.action_dim, generator=generator)
        return {"action": drawn, **self.vision.noise(batch_size, generator)}

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """tanh of the mean, or of a sample if ``noise`` is given. This family has no guidance: the value is not used."""
        mean_BHA, std_BHA = self._distribution(obs)
        before_BHA = mean_BHA if noise is None else mean_BHA + std_BHA * noise["action"].to(mean_BHA.device)
        actions_BHA = self.scale.restore(before_BHA.tanh())
        return Chunk(actions_BHA, self._log_density(mean_BHA, std_BHA, actions_BHA))

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, H): log density of each action of the chunk in the robot's units, summed over A. Actions at or beyond the bounds
        count as those just inside."""
        return self._log_density(*self._distribution(obs), chunk.actions_BHA)

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """Each step is a decision."""
        return mask_BH

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): L1 distance of tanh(mean) on the scale [-1, 1], averaged over A and valid actions; 0 where none is valid."""
        # Masked actions may be padded with anything, NaN included: they must not reach the difference.
        target_BHA = torch.where(mask_BH[..., None] > 0, chunk.actions_BHA, torch.zeros_like(chunk.actions_BHA))
        scaled_BHA = self.scale.normalise(target_BHA).clamp(-1, 1)
        error_BH = (self._mean(self._hidden(obs, noise)).tanh() - scaled_BHA).abs().mean(-1) * mask_BH
        return error_BH.sum(-1) / mask_BH.sum(-1).clamp(min=1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): the last hidden layer."""
        return self._hidden(obs, None)

    def _set_range(self, low_A: Tensor, high_A: Tensor) -> None:
        center_A = (high_A + low_A) / 2
        least_A = STILL * center_A.abs().clamp(min=1)
        self.scale.center_A.copy_(center_A)
        self.scale.half_A.copy_(torch.maximum((high_A - low_A) / 2, least_A))

    def _hidden(self, obs: Mapping[str, Tensor], noise: Any) -> Tensor:
        """(B, F). ``noise`` of the policy moves images."""
        inputs = [self._obs_gain * self.normaliser(obs)]
        if self.spec.conditions:
            # A unit vector of E elements would be drowned by the features, which have about unit variance each.
            inputs.append(obs[INSTRUCTION] * math.sqrt(obs[INSTRUCTION].shape[1]))
        inputs += [summary(tokens) for summary, tokens in zip(self.summaries, self.vision(obs, noise), strict=True)]
        hidden_BF: Tensor = self.trunk(torch.cat(inputs, 1))
        return hidden_BF

    def _mean(self, hidden_BF: Tensor) -> Tensor:
        """(B, H, A) in float32, before tanh."""
        mean_BHA: Tensor = self.head(hidden_BF).unflatten(1, (self.spec.horizon, self.spec.action_dim)).float()
        return MAX_MEAN * (mean_BHA / MAX_MEAN).tanh()

    def _distribution(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """mean_BHA and std_BHA before tanh; in full precision, or ratios would be of rounding."""
        with full_precision(self.head.weight):
            hidden_BF = self._hidden(obs, None)
            mean_BHA, (low, high) = self._mean(hidden_BF), LOG_STD_RANGE
            return mean_BHA, (low + (high - low) * self.spread(hidden_BF).sigmoid()).exp().view_as(mean_BHA)

    def _log_density(self, mean_BHA: Tensor, std_BHA: Tensor, actions_BHA: Tensor) -> Tensor:
        """(B, H). u is taken from the actions also where it is known: the same number for who has the actions alone."""
        scaled_BHA = self.scale.normalise(actions_BHA).clamp(-EDGE, EDGE)
        z_BHA = (scaled_BHA.atanh() - mean_BHA) / std_BHA
        normal_BHA = -0.5 * z_BHA**2 - std_BHA.log() - 0.5 * math.log(2 * math.pi)
        return (normal_BHA - torch.log1p(-(scaled_BHA**2)) - self.scale.half_A.log()).sum(-1)
