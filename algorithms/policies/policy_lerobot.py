"""LeRobot's policies (lerobot 0.6.1) as a family: ACT, Diffusion, SmolVLA, pi0, pi0.5, with their processors.

What is LeRobot's: the networks, the processors (normalisation, prompts, tokenizers), the formulas of the losses, the sampling,
the files of a checkpoint. What is ours: features by our names, statistics of the run's data in buffers, noise by row, what is
frozen, what is published.

The networks always run as in evaluation, in training too: dropout, BatchNorm and random crops would make a loss depend on
torch's global generator and on the other rows of a batch. Against that, ``shift_pixels`` moves images while training.

No family member has a density: they can be cloned (bc, hg_dagger) and acted with, not given to algorithms of ratios.

Shape suffixes: B batch, H chunk length, A action dims, T decisions, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import get_policy_class
from torch import Tensor, nn

from algorithms.policies.base import TEXT, Chunk, PolicySpec
from algorithms.policies.checkpoint_lerobot import export, load_weights, read_checkpoint, read_statistics
from algorithms.policies.config_lerobot import make_config, same_features
from algorithms.policies.kinds_lerobot import KINDS, mean_by_row
from algorithms.policies.lora_lerobot import add_lora
from algorithms.policies.processors_lerobot import Processors
from algorithms.policies.registry import build
from algorithms.policies.statistics import Statistics
from algorithms.policies.text import NUM_BYTES
from algorithms.policies.vision import random_shift, shift_noise
from fleet.errors import PolicyError


@dataclasses.dataclass
class LerobotConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by our names, with shapes; images (height, width, channels)."""
    action_dim: int
    """A."""
    kind: str = "act"
    """``act``, ``diffusion``, ``smolvla``, ``pi0`` or ``pi05``."""
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of LeRobot's configuration of that kind; ``Kind.defaults`` in kinds_lerobot.py says where our defaults differ."""
    checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The same fields as a checkpoint has them, filled in by ``from_pretrained``; ``policy`` wins."""
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """LeRobot's name of a feature by ours, where a checkpoint has other ones."""
    pretrained: str = ""
    """A LeRobot checkpoint, folder or hub id, whose weights are the first ones. Whoever builds the policy needs it: a run that
    trains all of it names it at ``policy.pretrained`` instead."""
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """``{r, alpha, targets, train}`` (lora_lerobot.py): trains low-rank adapters and a few modules; the rest is frozen."""
    shift_pixels: int = 0
    """Images are moved by up to so many pixels while training; 0: never."""
    seed: int = 0
    """Of first weights that are loaded from nowhere. Frozen ones are not published: every robot has to draw the same."""


class LerobotPolicy(nn.Module):
    """See the header. Implements ``algorithms.policies.base.Policy``.

    Raises:
        PolicyError: Unknown kind or field, features that the kind cannot read, or files that cannot be had.
    """

    Config = LerobotConfig
    config: dict[str, Any]  # set by ``build``
    _start_HA: Tensor | None
    cameras = True  # reads all cameras that the robots share, where the run file does not say

    def __init__(self, config: LerobotConfig) -> None:
        super().__init__()
        self._config = config
        theirs = make_config(config)
        self._kind = KINDS[config.kind]
        horizon = int(getattr(theirs, self._kind.length))
        reads = {name: tuple(shape) for name, shape in config.reads.items()}
        conditions = {TEXT: (NUM_BYTES,)} if self._kind.reads_text else {}
        self.spec = PolicySpec(reads, conditions, config.action_dim, horizon)
        self._processors = Processors(theirs, self.spec, config.rename)
        self.lacks_statistics: list[str] = []  # features for which a checkpoint has none that fit
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.lerobot = _construct(theirs)
            if config.pretrained:
                load_weights(self.lerobot, config.pretrained)
                self.lacks_statistics = self._processors.load_statistics(read_statistics(theirs, config.pretrained))
            if config.lora:
                add_lora(self.lerobot, config.lora)
            start = self._kind.start_shape(theirs)
            self.register_buffer("_start_HA", None if start is None else torch.randn(start))
        self.frozen = tuple(_frozen(self.lerobot, "lerobot"))
        self.eval()

    @classmethod
    def from_pretrained(cls, where: str, config: Mapping[str, Any]) -> LerobotPolicy:
        """A policy with the weights and statistics of a LeRobot checkpoint.

        Args:
            where: A folder, or an id on the hub.
            config: Of ``LerobotConfig``; what it lacks is read from the checkpoint. Fields of ``policy`` win over its own.

        Raises:
            PolicyError: No such checkpoint, or one of another kind, of other features, or without statistics.
        """
        kind, fields, features = read_checkpoint(where)
        if config.get("kind", kind) != kind:
            raise PolicyError(f"{where} is a checkpoint of {kind!r}", rule=f"policy.config.kind is {config['kind']!r}")
        whole = {**config, "kind": kind, "checkpoint": fields, "pretrained": str(where)}
        same_features(where, KINDS[kind], features, whole)
        policy: LerobotPolicy = build("lerobot", whole)
        if not policy.frozen:  # a release holds all of it: robots do not need the checkpoint
            whole["pretrained"] = ""
            policy.config = whole
        return policy

    def export(self, folder: str | Path) -> None:
        """Writes a LeRobot checkpoint: configuration, weights with adapters merged in, and processors with statistics. They
        rename our features to LeRobot's. lerobot's own ``from_pretrained`` reads it."""
        export(self.lerobot, self._processors.statistics(), self._config.rename, Path(folder))

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of vector features and of "action". Images have fixed ones."""
        self._processors.set_statistics(statistics)
        self.lacks_statistics = []

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """What the kind draws (kinds_lerobot.py), and how images are moved."""
        drawn = self._kind.noise(self.lerobot.config, batch_size, generator)
        return {**drawn, **shift_noise(batch_size, list(self.spec.images), self._config.shift_pixels, generator)}

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """Without noise every row starts from one draw, which lies in the weights."""
        batch = self._processors.before(obs)
        start = self._start_HA
        if start is not None:
            size = len(next(iter(obs.values())))
            start = start.expand(size, -1, -1) if noise is None else noise["start"].to(start)
        actions_BHA = self._kind.act(self.lerobot, batch, start)
        return Chunk(self._processors.after(actions_BHA))

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        raise _no_density(self._config.kind)

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        raise _no_density(self._config.kind)

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """The kind's own loss (kinds_lerobot.py), mean over the valid actions of a row."""
        if noise is None and self._start_HA is not None:
            raise PolicyError(f"the loss of {self._config.kind!r} was given no noise", rule="it draws a time and a start")
        shift = self._config.shift_pixels
        moved = {name: random_shift(obs[name], name, shift, noise) for name in self.spec.images if name in obs}
        valid_BH = mask_BH > 0
        actions_BHA = torch.where(valid_BH[..., None], chunk.actions_BHA, 0.0)
        batch = self._processors.before({**obs, **moved}, actions_BHA)
        batch["action_is_pad"] = ~valid_BH
        losses_BHA, more_B = self._kind.losses(self.lerobot, batch, noise or {})
        return mean_by_row(losses_BHA, mask_BH) + more_B * valid_BH.any(1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        return self._kind.embed(self.lerobot, self._processors.before(obs))

    def train(self, mode: bool = True) -> LerobotPolicy:
        """The networks stay as in evaluation; see the header."""
        super().train(mode)
        self.lerobot.eval()
        return self


def _construct(config: Any) -> Any:
    """LeRobot's policy; what it says of a setting, or of a file that is not there, becomes our error."""
    try:
        return get_policy_class(config.type)(config)
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        raise PolicyError(
            f"LeRobot cannot make a policy of kind {config.type!r}: {str(error).splitlines()[0]}",
            rule="its own rules for settings and files",
            remedy="look at policy.config.policy, and at which files this machine has",
        ) from error


def _frozen(module: nn.Module, name: str) -> Iterator[str]:
    """The largest modules of which no parameter is trained."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield name
    else:
        for child_name, child in module.named_children():
            yield from _frozen(child, f"{name}.{child_name}")


def _no_density(kind: str) -> PolicyError:
    return PolicyError(
        f"LeRobot's {kind!r} has no density",
        rule="log_prob needs one",
        remedy="clone it (bc, hg_dagger), or take the families flow or token for algorithms of ratios",
    )
