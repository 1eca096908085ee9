"""Settings of RECAP, see recap.py."""

from __future__ import annotations

import dataclasses
from typing import Any

from algorithms.base import DataFacts
from fleet.errors import ConfigError

UNKNOWN_LENGTH = 500  # steps that an episode is taken for where none had ended when the run began


@dataclasses.dataclass
class RecapConfig:
    learning_rate: float = 5e-4
    """AdamW's, of the policy."""
    value_learning_rate: float = 5e-4
    """AdamW's, of the value."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    batch_size: int = 256
    """B, windows a step."""
    policy_share: float = 0.5
    """Part of a batch from the policy's own steps. A source without data leaves its part to the others."""
    operator_share: float = 0.25
    """Part of a batch from operators' steps."""
    demo_share: float = 0.25
    """Part of a batch from demonstrations."""
    lookahead: int = 50
    """N, steps after which the value judges what came of a step; 0: the end of the episode does."""
    episode_steps: int = 0
    """L, steps of an episode that goes on as long as it may, of all tasks: give the time limit. 0: those of each task's longest
    episode when the run begins."""
    failure_cost: float = 0.0
    """Of a failed episode, in steps; 0: L."""
    positive_share: float = 0.3
    """Part of each task's judged steps that are positive."""
    threshold_window: int = 2048
    """Judged steps of a task that its threshold is taken over, about."""
    demonstrations: str = "positive"
    """Demonstrations are always ``positive``, or ``judged`` as the policy's steps are."""
    indicator_dropout: float = 0.3
    """Part of the rows that are trained on without the indicator."""
    value_start_steps: int = 1000
    """Updates of the value before anything is judged."""
    online_value: bool = True
    """Whether the value is trained on after its start. False: it stays as it is then, as in SOP (arXiv 2601.03044)."""
    relabel_every: int = 0
    """Updates of the value after which a step's advantage is computed anew; 0: each time that the step is drawn."""
    label_places: int = 65536
    """Steps whose advantages are kept, at most; used with ``relabel_every``."""
    value: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ``algorithms.values.ValueConfig`` that are to differ."""
    ema_decay: float = 0.995
    """Of the average that acts; 0 publishes the newest weights."""
    fill_ends: bool = True
    """Whether windows that an episode's end cuts are filled with their last valid action."""
    seed: int = 0
    """Of the policy's noise, and of which rows lose their indicator."""


def check_recap(config: RecapConfig) -> None:
    """Raises ConfigError at the first setting that is out of its range."""
    shares = (config.policy_share, config.operator_share, config.demo_share)
    rules = {
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "policy_share": (min(shares) >= 0 and sum(shares) > 0, "no share is negative, one is above 0"),
        "lookahead": (config.lookahead >= 0, "at least 0"),
        "episode_steps": (config.episode_steps >= 0, "at least 0"),
        "failure_cost": (config.failure_cost >= 0, "at least 0"),
        "positive_share": (0 < config.positive_share < 1, "above 0 and below 1"),
        "threshold_window": (config.threshold_window >= 1, "at least 1"),
        "demonstrations": (config.demonstrations in ("positive", "judged"), "positive or judged"),
        "indicator_dropout": (0 <= config.indicator_dropout < 1, "at least 0, below 1"),
        "value_start_steps": (config.value_start_steps >= 1, "at least 1"),
        "relabel_every": (config.relabel_every >= 0, "at least 0"),
        "label_places": (config.label_places >= 1, "at least 1"),
        "ema_decay": (0 <= config.ema_decay < 1, "at least 0, below 1"),
        "value": (not {"low", "high"} & set(config.value), "values lie in [-1, 0]: low and high cannot be set"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"recap has {name} {getattr(config, name)!r}", rule=rule)


def lengths(config: RecapConfig, data: DataFacts) -> list[float]:
    """L by task; of a run of which no tasks are known, of one."""
    tasks = max(len(data.tasks), 1)
    known = list(data.longest_T) or [0] * tasks
    longest = config.episode_steps or max(known) or UNKNOWN_LENGTH
    return [float(config.episode_steps or length or longest) for length in known]
