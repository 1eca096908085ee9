"""Settings of the flow family, and what follows from them without a network.

Shape suffixes: as in flow.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from algorithms.policies.base import ADVANTAGE, INSTRUCTION, PolicySpec
from fleet.errors import PolicyError

CHAIN, INDEX, PREFIXED = "replay.chain", "replay.index", "replay.delay"


@dataclasses.dataclass
class FlowConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes; cameras too."""
    action_dim: int
    """A."""
    horizon: int = 8
    """H, actions in a chunk."""
    instruction_dim: int = 32
    """E, size of obs["instruction"]; 0 for a policy of one task."""
    width: int = 128
    """F, of every token."""
    num_layers: int = 3
    """Blocks over the actions."""
    encoder_layers: int = 1
    """Blocks over the observation."""
    num_heads: int = 4
    """Of attention; divides ``width``."""
    vision: str = "cnn"
    """How images become tokens: a key of ``algorithms.policies.vision.VISION``, or module:Class."""
    shift_pixels: int = 4
    """Images are moved by up to so many pixels while training; 0: never."""
    select: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """Elements that are read of a flattened vector feature, by its name; all of those that are not named."""
    num_steps: int = 10
    """K, steps from noise to a chunk."""
    time_sampling: str = "uniform"
    """Times of the loss: ``uniform``, or ``beta``: t ~ Beta(1.5, 1), more of them near the noise (pi0)."""
    noise_kind: str = "sde"
    """How steps are drawn: ``sde``: Flow-SDE; ``learned``: the network says how far (Flow-Noise)."""
    noise_level: float = 0.0
    """a of Flow-SDE; 0: only the start is drawn, and there is no density."""
    noise_std: tuple[float, float] = (0.08, 0.16)
    """Range of the standard deviation of ``learned`` steps; actions are about in [-1, 1]."""
    stochastic: str = "all"
    """Which steps are drawn: ``all``, or ``one`` of each chunk, the others being those of the ODE."""
    advantage: bool = False
    """Whether the policy takes the condition "advantage"."""
    max_delay: int = 0
    """D, actions that are decided already; below H."""


def flow_spec(config: FlowConfig) -> PolicySpec:
    """What a flow policy of these settings reads and writes."""
    conditions: dict[str, tuple[int, ...]] = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
    if config.advantage:
        conditions[ADVANTAGE] = ()
    density, one = config.noise_kind == "learned" or config.noise_level > 0, config.stochastic == "one"
    replay: dict[str, tuple[int, ...]] = {}
    if density:
        replay[CHAIN] = (2 if one else config.num_steps + 1, config.horizon, config.action_dim)
        replay |= {INDEX: (1,)} if one else {}
        replay |= {PREFIXED: (1,)} if config.max_delay else {}
    return PolicySpec(
        reads={name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())},
        conditions=conditions,
        action_dim=config.action_dim,
        horizon=config.horizon,
        replay=replay,
        density=density,
        max_delay=config.max_delay,
    )


def check_flow(config: FlowConfig) -> None:
    """Raises PolicyError at the first rule that the settings break."""
    sizes = (config.action_dim, config.horizon, config.width, config.num_layers, config.num_heads, config.num_steps)
    rules = {
        "reads is not empty; sizes are at least 1; instruction_dim, encoder_layers, shift_pixels are at least 0": bool(
            config.reads
        )
        and min(sizes) >= 1
        and min(config.instruction_dim, config.encoder_layers, config.shift_pixels) >= 0,
        "num_heads divides width, which is even": config.width % max(config.num_heads, 2) == 0 and config.width % 2 == 0,
        "0 <= max_delay < horizon": 0 <= config.max_delay < config.horizon,
        "time_sampling is uniform or beta": config.time_sampling in ("uniform", "beta"),
        "noise_kind is sde or learned": config.noise_kind in ("sde", "learned"),
        "stochastic is all or one": config.stochastic in ("all", "one"),
        "noise_level is at least 0; 0 < noise_std[0] < noise_std[1]": config.noise_level >= 0
        and len(config.noise_std) == 2
        and 0 < config.noise_std[0] < config.noise_std[1],
    }
    for rule, kept in rules.items():
        if not kept:
            raise PolicyError(f"flow policy of {config}", rule=rule)
