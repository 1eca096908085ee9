"""One policy in one simulator, episode by episode, in simulated time. ``infra.evaluate`` counts what comes of it.

Shape suffixes: E embedding dims, D actions of a prefix.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.torch import load

from actors.fragments import RecordedObservation
from actors.plan import Chunking, Plan, PlannedChunk, Proposal
from actors.policy_inference import ActingPolicy
from actors.robots import make_robot
from actors.safety import SafetyConfig, SafetyFilter
from algorithms.policies.registry import build, load_published
from fleet.errors import RobotError
from fleet.images import encode
from fleet.robot import Feedback, Observation, Robot


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """num_held: steps at which the policy had nothing to propose. border_change, other_change: largest change of an action's
    element from one step to the next, in the action's unit, averaged over the steps that begin another chunk and over all
    others."""

    task: str
    seed: int
    success: bool
    num_steps: int
    num_held: int = 0
    border_change: float = 0.0
    other_change: float = 0.0


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Under which a policy is tested; see ``infra.evaluate.evaluate``."""

    chunking: Chunking
    delay: int
    guidance: float
    sample: bool
    max_steps: int
    instructions: Mapping[str, str]
    safety: SafetyConfig


class Worker:
    """One policy and one robot, used for many episodes."""

    def __init__(
        self,
        family: str,
        config: Any,
        weights: bytes,
        adapter: str,
        settings: Mapping[str, Any],
        how: Conditions,
    ) -> None:
        policy = build(family, config)
        load_published(policy, load(weights))
        self.robot: Robot = make_robot(adapter, **settings)
        self._acting = ActingPolicy(
            policy, self.robot.spec, execute=how.chunking.execute, guidance=how.guidance, sample=how.sample
        )
        self._safety = SafetyFilter(self.robot.spec, how.safety)
        self._how = how

    def run(self, job: tuple[str, np.ndarray, list[int]]) -> list[EpisodeResult]:
        task, embedding, seeds = job
        return [self._episode(task, embedding, seed) for seed in seeds]

    def _episode(self, task: str, embedding: np.ndarray, seed: int) -> EpisodeResult:
        obs: Observation | None = self.robot.reset(task, seed)
        self._safety.reset()
        plan, changes = Plan(self._how.chunking), _Changes()
        coming: collections.deque[PlannedChunk] = collections.deque()

        def take(frame: int) -> None:
            while coming and coming[0].frame_index + self._how.delay <= frame:
                plan.add(coming.popleft(), frame)

        frame = -1
        while True:
            frame += 1
            take(frame)
            if plan.due(frame):
                prefix_DA = self._safety.ahead(plan.prefix(frame))
                chunk = self._chunk(frame, obs or self.robot.observe(), task, embedding, prefix_DA, seed)
                coming.append(chunk)
                take(frame)
            proposal = plan.propose(frame)
            hold = self.robot.hold()
            feedback = self.robot.send(self._safety(hold if proposal is None else proposal.action, hold)[0])
            obs = None
            changes.add(feedback, proposal)
            if feedback.success is None:
                raise RobotError(f"the robot cannot judge task {task!r}", rule="evaluation needs success from the robot")
            if feedback.success or feedback.terminated or feedback.truncated or frame + 1 >= self._how.max_steps:
                return EpisodeResult(task, seed, feedback.success, frame + 1, changes.num_held, *changes.means())

    def _chunk(
        self, frame: int, obs: Observation, task: str, embedding: np.ndarray, prefix_DA: np.ndarray, seed: int
    ) -> PlannedChunk:
        features = self.robot.spec.features
        seen = {name: encode(features[name], np.asarray(obs[name])) for name in self._acting.policy.spec.reads}
        recorded, text = RecordedObservation(self.robot.spec, seen), self._how.instructions.get(task, "")
        answer = self._acting(recorded, embedding, prefix_DA, seed * self._how.max_steps + frame, text)
        return PlannedChunk(frame, frame, 0, answer.actions_HA)


class _Changes:
    """How much actions change from step to step."""

    def __init__(self) -> None:
        self._last: tuple[int, np.ndarray] | None = None  # chunk and action
        self._border: list[float] = []
        self._other: list[float] = []
        self.num_held = 0

    def add(self, feedback: Feedback, proposal: Proposal | None) -> None:
        self.num_held += proposal is None
        chunk_id = -1 if proposal is None else proposal.chunk_id
        if self._last is not None:
            change = float(np.abs(feedback.action - self._last[1]).max())
            (self._other if chunk_id == self._last[0] else self._border).append(change)
        self._last = chunk_id, np.array(feedback.action)

    def means(self) -> tuple[float, float]:
        """(at borders of chunks, elsewhere), 0 where there was none."""
        border, other = (sum(values) / max(len(values), 1) for values in (self._border, self._other))
        return border, other
