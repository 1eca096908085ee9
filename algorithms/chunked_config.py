"""Settings of chunked_rl.py and its methods."""

from __future__ import annotations

import dataclasses
from typing import Any

from algorithms.rewards import RewardConfig
from algorithms.sampling import AGGREGATES
from fleet.errors import ConfigError

CONSERVATIVE = ("cal_ql", "cql", "none")
IMITATE = ("experts", "all")
AUTO = "auto"


@dataclasses.dataclass
class ChunkedRlConfig(RewardConfig):
    method: str = "q_chunking"
    """``cal_ql`` (CO-RFT), ``q_chunking``, ``q_chunking_distilled`` (QC-FQL), or ``iql``."""
    batch_size: int = 256
    """B, windows a step."""
    demo_share: float = 0.5
    """Fraction of a batch from demonstrations; the rest is the policy's and operators' steps. Whoever has no data leaves it all
    to the other."""
    imitate: str = AUTO
    """Whose steps are imitated: ``experts``: demonstrations and operators; ``all``: the policy's own too. ``auto``: experts of
    cal_ql, all of the others, which choose among what they imitate."""
    fill_ends: bool = True
    """Whether imitated windows that an episode's end cuts are filled with their last action."""
    critic_family: str = AUTO
    """``mlp``: judges whole chunks; ``causal``: every beginning of one too. ``auto``: causal of cal_ql, else mlp."""
    critic: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of the critic's Config: width, num_layers, vision, instruction_dim."""
    num_critics: int = 2
    """K."""
    prefix_stride: int = 1
    """Of ``causal``: every so manieth beginning is trained, and the whole chunk; each needs an observation of its own."""
    aggregate: str = AUTO
    """How K values become one in targets: ``mean`` or ``min``. ``auto``: mean of the q_chunking methods, else min."""
    tau: float = 0.005
    """How far targets follow in an update."""
    critic_learning_rate: float = 3e-4
    """AdamW's, of critics and state values; without weight decay."""
    learning_rate: float = 3e-4
    """AdamW's, of the policy."""
    weight_decay: float = 1e-2
    """Of the policy."""
    policy_every: int = 0
    """The policy is updated in every so manieth step; 0: 2 of cal_ql (TD3), else 1."""
    critic_steps: int = 500
    """Of cal_ql and q_chunking_distilled: in the first so many updates nothing climbs the critics, which know nothing yet."""
    ema_decay: float = 0.995
    """Of the average that acts; 0 publishes the newest weights."""
    conservative: str = "cal_ql"
    """Of cal_ql: which gap the critic keeps small: ``cal_ql``, ``cql``, or ``none``."""
    conservative_weight: float = 0.1
    """Of cal_ql: of that gap. It lifts values of the data by up to half of it: small beside the returns."""
    conservative_samples: int = 1
    """Of cal_ql: chunks of the policy in each state; 1: the one that it would act by, else samples."""
    temperature: float = 1.0
    """Of cal_ql with several samples: T of their logsumexp."""
    q_weight: float = 2.5
    """Of cal_ql: TD3+BC's alpha: weight of Q, over the mean |Q|, beside the imitation loss."""
    target_noise: float = 0.2
    """Of cal_ql: deviation of the noise on target chunks, in units of the actions' range."""
    target_noise_clip: float = 0.5
    """Of cal_ql: where that noise is clipped."""
    num_samples: int = 32
    """Of q_chunking: N, chunks of which the best acts."""
    target_samples: int = 32
    """Of q_chunking: N of the targets."""
    distill_weight: float = 1.0
    """Of q_chunking_distilled: weight of the distance to the flow's chunk beside Q over the mean |Q|."""
    value: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of iql: fields of the state value's Config: width, num_layers, vision, instruction_dim."""
    expectile: float = 0.7
    """Of iql: tau; 0.5 values what was done on average, near 1 the best of it."""
    beta: float = 3.0
    """Of iql: how much more a step is imitated that was better than expected; 0: all alike."""
    max_weight: float = 100.0
    """Of iql: the largest weight of a step."""
    normalise_advantages: bool = True
    """Of iql: whether ``beta`` is in units of the advantages' root mean square; false: of the returns, as in the paper."""
    seed: int = 0
    """Of all noise."""


def check_chunked(config: ChunkedRlConfig, horizon: int) -> None:
    """Raises ConfigError at the first value that is out of its range."""
    rules = {
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "demo_share": (0 <= config.demo_share <= 1, "0 to 1"),
        "imitate": (config.imitate in (AUTO, *IMITATE), f"auto, {' or '.join(IMITATE)}"),
        "critic_family": (config.critic_family in (AUTO, "mlp", "causal"), "auto, mlp or causal"),
        "num_critics": (config.num_critics >= 1, "at least 1"),
        "prefix_stride": (1 <= config.prefix_stride <= horizon, f"1 to {horizon}, the policy's horizon"),
        "aggregate": (config.aggregate in (AUTO, *AGGREGATES), f"auto, {' or '.join(AGGREGATES)}"),
        "tau": (0 < config.tau <= 1, "above 0, at most 1"),
        "critic_learning_rate": (config.critic_learning_rate > 0, "above 0"),
        "learning_rate": (config.learning_rate > 0, "above 0"),
        "policy_every": (config.policy_every >= 0, "at least 0"),
        "critic_steps": (config.critic_steps >= 0, "at least 0"),
        "ema_decay": (0 <= config.ema_decay < 1, "at least 0, below 1"),
        "conservative": (config.conservative in CONSERVATIVE, f"one of {', '.join(CONSERVATIVE)}"),
        "conservative_weight": (config.conservative_weight >= 0, "at least 0"),
        "conservative_samples": (config.conservative_samples >= 1, "at least 1"),
        "temperature": (config.temperature > 0, "above 0"),
        "q_weight": (config.q_weight >= 0, "at least 0"),
        "target_noise": (config.target_noise >= 0, "at least 0"),
        "target_noise_clip": (config.target_noise_clip >= 0, "at least 0"),
        "num_samples": (config.num_samples >= 1, "at least 1"),
        "target_samples": (config.target_samples >= 1, "at least 1"),
        "distill_weight": (config.distill_weight >= 0, "at least 0"),
        "expectile": (0 < config.expectile < 1, "between 0 and 1"),
        "beta": (config.beta >= 0, "at least 0"),
        "max_weight": (config.max_weight > 0, "above 0"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"chunked_rl has {name} = {getattr(config, name)!r}", rule=rule)
