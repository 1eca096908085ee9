"""A policy that acts: numpy in, numpy out. The robot's runner and the evaluation in simulators both go through here.

Shape suffixes: H chunk length, A action dims, T decisions, D actions of a prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.records import MAX_HORIZON
from fleet.errors import PolicyError
from fleet.spec import RobotSpec


@dataclasses.dataclass(frozen=True)
class Answer:
    """actions_HA: float32, the robot's units. log_prob_T: empty where a chunk has no density. replay: flat, by column."""

    actions_HA: np.ndarray
    log_prob_T: np.ndarray
    replay: dict[str, np.ndarray]


class ActingPolicy:
    """A policy on one type of robot.

    Args:
        policy: In eval mode from here on.
        execute: Actions that will be used of each chunk.
        guidance: See ``Policy.act``.
        sample: Draws chunks; else each is the policy's one best.
        device: Where it runs, by torch's name; the policy is moved there.

    Raises:
        PolicyError: The policy cannot drive this robot: features, action bounds or horizon do not fit. Or there is no such
            device.
    """

    def __init__(
        self,
        policy: Any,
        spec: RobotSpec,
        *,
        execute: int = 1,
        guidance: float = 1.0,
        sample: bool = False,
        device: str = "cpu",
    ) -> None:
        from algorithms.policies.normalise import ActionScale

        policy.spec.check_robot(spec)
        for module in policy.modules():
            if isinstance(module, ActionScale):
                module.check_robot(spec)
        if not execute <= policy.spec.horizon <= MAX_HORIZON:
            raise PolicyError(
                f"the policy has a horizon of {policy.spec.horizon} actions",
                rule=f"at least the {execute} that are executed of each chunk, at most {MAX_HORIZON}",
                remedy="set actor.execute to at most the horizon",
            )
        try:
            self.policy, self.spec, self.device = policy.eval().to(device), spec, device
        except (RuntimeError, AssertionError) as error:
            raise PolicyError(f"actor.device = {device!r}: {error}"[:300], rule="a device that torch has here") from None
        self.guidance, self.sample = guidance, sample
        self.num_short_prefixes = 0  # requests that came with more actions than the policy can continue

    def __call__(
        self,
        obs: Mapping[str, np.ndarray],
        embedding: np.ndarray,
        prefix_DA: np.ndarray | None = None,
        seed: int = 0,
        instruction: str = "",
    ) -> Answer:
        """The chunk for one observation.

        Args:
            obs: At least what the policy reads.
            embedding: (E,), of the task's instruction.
            prefix_DA: What will be executed while the chunk is computed. Policies that continue a prefix begin the chunk with
                these actions, at most their ``max_delay``; others take no notice.
            seed: Of the draw, where chunks are drawn.
            instruction: Its text, for policies that read it.

        Raises:
            PolicyError: The observation or the chunk is not finite, the instruction is of another size, or the policy fails:
                then this error's cause says where.
        """
        try:
            return self._answer(obs, embedding, prefix_DA, seed, instruction)
        except PolicyError:
            raise
        except Exception as error:  # a family's own defect, or a library's: it costs a chunk, not the robot's process
            raise PolicyError(f"the policy fails: {error!r}"[:500], rule="it acts on the robot's observations") from error

    def _answer(
        self, obs: Mapping[str, np.ndarray], embedding: np.ndarray, prefix_DA: np.ndarray | None, seed: int, instruction: str
    ) -> Answer:
        import torch

        from algorithms.policies.base import acting_conditions

        spec = self.policy.spec
        batch = {name: torch.from_numpy(self._finite(name, obs[name]))[None] for name in spec.reads}
        batch |= acting_conditions(spec, torch.from_numpy(np.asarray(embedding, np.float32)), instruction)
        batch |= self._prefix(prefix_DA)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        noise = self.policy.noise(1, torch.Generator().manual_seed(seed)) if self.sample else None
        with torch.inference_mode():
            chunk = self.policy.act(batch, noise, self.guidance)
        actions_HA = np.ascontiguousarray(chunk.actions_BHA[0].float().cpu().numpy())
        if not np.isfinite(actions_HA).all():
            raise PolicyError(
                f"'action' is {actions_HA[~np.isfinite(actions_HA)][0]} at {_first_bad(actions_HA)} of the policy's chunk",
                rule="actions are finite",
                remedy="look at the learner's losses: numbers that overflow there come out like this",
            )
        replay = {name: value[0].cpu().numpy().reshape(-1) for name, value in chunk.replay.items()} if self.sample else {}
        log_prob_T = np.zeros(0, np.float32)
        if self.sample and chunk.log_prob_BT is not None:
            log_prob_T = chunk.log_prob_BT[0].float().cpu().numpy().reshape(-1)
        return Answer(actions_HA, log_prob_T, replay)

    def self_test(self, embedding: np.ndarray | None = None) -> None:
        """Runs the policy as it will be run, on an observation that a robot could make.

        Args:
            embedding: Of a task; None: zeros of the size that the policy reads.

        Raises:
            PolicyError: It fails, or its chunk is not what its spec says.
        """
        from algorithms.policies.base import INSTRUCTION

        spec = self.policy.spec
        if embedding is None:
            embedding = np.zeros(spec.conditions.get(INSTRUCTION, (1,)), np.float32)
        prefix_DA = np.zeros((spec.max_delay, spec.action_dim), np.float32)
        answer = self(self._plausible(), embedding, prefix_DA, instruction="do it")
        sizes = {name: int(np.prod(shape)) for name, shape in spec.replay.items()} if self.sample else {}
        told = {name: value.size for name, value in answer.replay.items()}
        if answer.actions_HA.shape != (spec.horizon, spec.action_dim) or told != sizes:
            raise PolicyError(
                f"the policy gives actions {answer.actions_HA.shape} and replay columns of {told} elements",
                rule=f"its spec says actions {(spec.horizon, spec.action_dim)} and {sizes}",
            )

    def _finite(self, name: str, value: np.ndarray) -> np.ndarray:
        value = np.array(value)  # the record it lies in is used again
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise PolicyError(
                f"{name!r} is {value[~np.isfinite(value)][0]} at {_first_bad(value)}", rule="observations are finite"
            )
        return value

    def _prefix(self, prefix_DA: np.ndarray | None) -> dict[str, Any]:
        import torch

        from algorithms.policies.base import DELAY, PREFIX

        spec = self.policy.spec
        if not spec.max_delay:
            return {}
        known = 0 if prefix_DA is None else len(prefix_DA)
        self.num_short_prefixes += known > spec.max_delay
        delay = min(known, spec.max_delay)
        padded_DA = np.zeros((spec.max_delay, spec.action_dim), np.float32)
        if prefix_DA is not None and delay:
            padded_DA[:delay] = prefix_DA[:delay]
        return {PREFIX: torch.from_numpy(padded_DA)[None], DELAY: torch.tensor([delay])}

    def _plausible(self) -> dict[str, np.ndarray]:
        """Zero where the feature's bounds allow it; images are grey."""
        obs = {}
        for name in self.policy.spec.reads:
            feature = self.spec.features[name]
            middle = 128 if feature.is_image else np.clip(0, feature.low, feature.high)
            obs[name] = np.full(feature.shape, middle, feature.np_dtype)
        return obs


def _first_bad(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
