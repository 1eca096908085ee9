"""A small vision-language-action model: cameras, proprioception and instruction -> chunks, by flow matching (flow.py).

    images -> encoder (vision.py, from random weights)  \\
    vectors, or the elements of them that it may read    }-> blocks over all tokens -> flow head over H actions
    instruction: embedding of a frozen sentence encoder  /

It is the family ``flow`` with cameras and other sizes: about 7 million parameters, which a laptop trains. The sentence encoder
is no part of it: an instruction is encoded once per task, where the run's tasks are made, and sent with the task.

Where a simulator's state holds more than a robot can feel, say which elements are the robot's own, or cameras are not needed:
``select={"observation.state": [0, 1, 2, 3]}``.
"""

from __future__ import annotations

import dataclasses

from algorithms.policies.flow import FlowPolicy
from algorithms.policies.flow_config import FlowConfig
from fleet.errors import PolicyError
from fleet.spec import IMAGE_PREFIX


@dataclasses.dataclass
class SmallVlaConfig(FlowConfig):
    width: int = 256
    """F, of every token."""
    encoder_layers: int = 2
    """Blocks over the tokens of the observation."""


class SmallVla(FlowPolicy):
    """See the header. Implements ``algorithms.policies.base.Policy``."""

    Config = SmallVlaConfig
    cameras = True  # a run file that does not list what it reads means all cameras

    def __init__(self, config: SmallVlaConfig) -> None:
        if not any(name.startswith(IMAGE_PREFIX) for name in config.reads):
            raise PolicyError(
                f"family 'small_vla' is to read {sorted(config.reads)}",
                rule="it reads at least one camera",
                remedy="add a camera to policy.config.reads, or use the family 'flow'",
            )
        super().__init__(config)
