"""Critics: how good a chunk of actions is in a state. They judge for ``algorithms/policies/best_of.py`` and are published with
the policy that they judge for.

    critic(obs, actions_BHA) -> values_KB                 K critics of an ensemble, each of which sees all rows
    critic.prefixes(obs, actions_BHA) -> values_KBH       ``causal`` alone: of the first 1 to H actions

Where several chunks are judged in each state, ``obs`` has fewer rows: B / N, each for N actions in turn.

Shape suffixes: B batch, N chunks a state, H chunk length, A action dims, K critics, F hidden width, S input dims.
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
from algorithms.policies.normalise import ActionScale
from algorithms.policies.statistics import Statistics
from algorithms.values import StateReader
from fleet.errors import PolicyError
from fleet.lookup import check_settings, resolve

CRITICS = {"mlp": "algorithms.critics:ChunkCritic", "causal": "algorithms.critics:CausalCritic"}


@dataclasses.dataclass
class ChunkCriticConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes."""
    action_dim: int
    """A."""
    horizon: int
    """H, actions of a chunk that are judged together."""
    instruction_dim: int = 32
    """Size of obs["instruction"]; 0 for one task."""
    num_critics: int = 2
    """K."""
    width: int = 512
    """F, units of each hidden layer."""
    num_layers: int = 4
    """Hidden layers."""
    vision: str = "cnn"
    """How cameras are seen, see ``algorithms.policies.vision``; one for all K."""
    vision_width: int = 64
    """Width of an image's tokens."""
    image_dims: int = 64
    """Features that are made of all tokens of one camera."""
    shift_pixels: int = 4
    """Images are moved by up to so many pixels where ``noise`` is given (DrQ, arXiv 2004.13649); 0: never."""


class ChunkCritic(nn.Module):
    """K networks with LayerNorm over the state and the whole chunk (Q-chunking, arXiv 2507.07969; the LayerNorm is RLPD's,
    arXiv 2302.02948)."""

    Config = ChunkCriticConfig

    def __init__(self, config: ChunkCriticConfig) -> None:
        super().__init__()
        chunk, image = (config.action_dim, config.horizon), (config.vision_width, config.image_dims)
        if min(*chunk, *image, config.num_critics, config.width, config.num_layers) < 1 or config.instruction_dim < 0:
            raise PolicyError(f"a critic of {config}", rule="sizes are at least 1, instruction_dim at least 0")
        vision = (config.vision, config.vision_width, config.image_dims, config.shift_pixels)
        self.reader, self.scale = StateReader(config.reads, config.instruction_dim, *vision), ActionScale(config.action_dim)
        self.spec = PolicySpec(self.reader.reads, self.reader.conditions, config.action_dim, config.horizon)
        widths = [self.reader.size + config.horizon * config.action_dim] + [config.width] * config.num_layers
        self.layers = nn.ModuleList(
            _Ensemble(config.num_critics, num_in, num_out) for num_in, num_out in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(_Norm(config.num_critics, config.width) for _ in range(config.num_layers))
        self.head = _Ensemble(config.num_critics, config.width, 1)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one is missing, of another shape, or not finite."""
        self.reader.set_statistics(statistics)
        self.scale.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """How images are moved while training: entries for each camera."""
        return self.reader.noise(batch_size, generator)

    def forward(self, obs: Mapping[str, Tensor], actions_BHA: Tensor, noise: Any = None) -> Tensor:
        """Values (K, B) in float32. Actions in the robot's units.

        Args:
            noise: Of ``noise``, a row for each of ``obs``; None: images are taken as they are.

        Raises:
            PolicyError: A feature is missing, or has another shape.
        """
        state_BS, chunk_BHA = self._inputs(obs, actions_BHA, noise)
        return self._judge(self.layers[0](torch.cat([state_BS, chunk_BHA.flatten(1)], 1)[None]))

    def _inputs(self, obs: Mapping[str, Tensor], actions_BHA: Tensor, noise: Any) -> tuple[Tensor, Tensor]:
        """What is known of the state, once for each chunk, and the chunks, scaled."""
        state_BS = self.reader(obs, noise)
        return state_BS.repeat_interleave(len(actions_BHA) // len(state_BS), 0), self.scale.normalise(actions_BHA)

    def _judge(self, x_KBF: Tensor) -> Tensor:
        """(K, B), from the first layer's output on."""
        for norm, layer in zip(self.norms, [*self.layers[1:], self.head], strict=True):
            x_KBF = layer(functional.relu(norm(x_KBF)))
        return x_KBF[..., 0].float()


class CausalCritic(ChunkCritic):
    """Also judges the first k actions of a chunk alone, for every k: Q_k(s, a_1 .. a_k), as the critic of CO-RFT
    (arXiv 2508.02219) does. There it is a causal transformer beside the policy's; here the first layer sums over the actions
    from the first on, so that its sum up to the k-th is what it would make of a chunk that ends there, and a learnt constant
    says how long that is. Later actions cannot reach it. For k = H it is ``ChunkCritic``."""

    def __init__(self, config: ChunkCriticConfig) -> None:
        super().__init__(config)
        self.length_KHF = nn.Parameter(torch.zeros(config.num_critics, config.horizon, config.width))

    def prefixes(self, obs: Mapping[str, Tensor], actions_BHA: Tensor, noise: Any = None) -> Tensor:
        """Values (K, B, H) in float32, the last of which are those of ``forward``. Arguments as there."""
        state_BS, chunk_BHA = self._inputs(obs, actions_BHA, noise)
        first: Any = self.layers[0]
        num_state, (num, horizon, _) = state_BS.shape[1], chunk_BHA.shape
        weight_KHAF = first.weight[:, num_state:].unflatten(1, (horizon, -1))
        state_KBF = state_BS @ first.weight[:, :num_state] + first.bias
        each_KHBF = chunk_BHA.transpose(0, 1) @ weight_KHAF
        x_KHBF = state_KBF[:, None] + each_KHBF.cumsum(1) + self.length_KHF[:, :, None]
        return self._judge(x_KHBF.flatten(1, 2)).unflatten(1, (horizon, num)).transpose(1, 2)

    def forward(self, obs: Mapping[str, Tensor], actions_BHA: Tensor, noise: Any = None) -> Tensor:
        """See ``ChunkCritic.forward``."""
        state_BS, chunk_BHA = self._inputs(obs, actions_BHA, noise)
        x_KBF = self.layers[0](torch.cat([state_BS, chunk_BHA.flatten(1)], 1)[None])
        return self._judge(x_KBF + self.length_KHF[:, -1:])


class _Ensemble(nn.Module):
    """K linear layers in one matrix product: (1 or K, B, in) -> (K, B, out)."""

    def __init__(self, num: int, num_in: int, num_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(num_in)  # as nn.Linear begins
        self.weight = nn.Parameter(torch.empty(num, num_in, num_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, num_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


class _Norm(nn.Module):
    """LayerNorm of K critics: (K, B, F) -> (K, B, F)."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num, 1, width)), nn.Parameter(torch.zeros(num, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def build_critic(family: str, config: Mapping[str, Any]) -> Any:
    """A critic with fresh weights, which keeps both as ``critic.family`` and ``critic.config``, as policies do.

    Raises:
        PolicyError: Unknown family or field, a missing field, or a value out of its range.
    """
    cls = resolve(CRITICS, family, kind="critic", error=PolicyError)
    check_settings(cls.Config, config, kind=f"critic {family!r}", error=PolicyError)
    critic = cls(cls.Config(**config))
    critic.family, critic.config = family, dict(config)
    return critic


def critic_like(spec: PolicySpec, family: str, settings: Mapping[str, Any]) -> Any:
    """A critic that reads what a policy of this spec reads, and judges its chunks.

    Args:
        settings: Fields of ``ChunkCriticConfig`` that are to differ.

    Raises:
        PolicyError: As ``build_critic``.
    """
    seen = {
        "reads": {name: list(shape) for name, shape in spec.reads.items()},
        "instruction_dim": spec.conditions.get(INSTRUCTION, (0,))[0],
    }
    return build_critic(family, {**seen, "action_dim": spec.action_dim, "horizon": spec.horizon, **settings})
