"""Runs the shared policy on one robot: builds it from a release, tests it, and answers with chunks.

torch is loaded here, when the first release comes: a robot that only demonstrates never pays for it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.fragments import ChunkRow
from fleet.errors import PolicyError
from fleet.releases import Manifest
from fleet.spec import RobotSpec

if TYPE_CHECKING:
    from actors.policy_inference import ActingPolicy

log = logging.getLogger("fleet.actor")


class PolicyRunner:
    """One loaded release at a time; ``load`` builds the next beside it and swaps when it passed its self-test.

    Args:
        embeddings: Instruction embedding (E,) by task.
        stream: Who draws: the robot's id and boot. What is drawn is a function of it and of the chunk's id.
        execute, guidance, sample, device: See ``actors.policy_inference.ActingPolicy``.
        num_threads: torch's threads; 1 keeps a small policy from waking every core each tick.
    """

    def __init__(
        self,
        spec: RobotSpec,
        embeddings: Mapping[str, list[float]],
        *,
        stream: str = "",
        execute: int = 1,
        guidance: float = 1.0,
        sample: bool = False,
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        self.spec, self.stream, self.num_threads = spec, stream, num_threads
        self._settings: dict[str, Any] = {"execute": execute, "guidance": guidance, "sample": sample, "device": device}
        self.set_embeddings(embeddings)
        self._loaded: tuple[int, ActingPolicy] | None = None
        self._next_chunk = 0
        self._said_short = False

    def set_embeddings(self, embeddings: Mapping[str, list[float]], instructions: Mapping[str, str] | None = None) -> None:
        """By task; ``instructions`` for policies that read the text."""
        self._instructions = dict(instructions or {})
        self._embeddings = {task: np.asarray(e, np.float32) for task, e in embeddings.items()}

    def load(self, manifest: Manifest, safetensors: bytes) -> None:
        """Builds the release's policy, runs it once, and puts it in place of the present one.

        May be called from another thread than ``act``: what is acting stays whole, the swap is one assignment.

        Raises:
            PolicyError: The policy cannot drive this robot, its weights do not fit, or its self-test failed.
        """
        try:
            import torch
            from safetensors.torch import load

            from actors.policy_inference import ActingPolicy
            from algorithms.policies.registry import load_published, rebuild
        except ImportError as error:
            raise PolicyError(
                f"a release came and this robot cannot run it: {error.name} is not installed",
                rule="a robot that acts by the policy has the extra 'actor'; one that demonstrates needs the base only",
                remedy="pip install 'fleet-rl[actor]'",
            ) from None
        torch.set_num_threads(self.num_threads)
        policy = rebuild(manifest.policy)
        load_published(policy, load(safetensors))
        acting = ActingPolicy(policy, self.spec, **self._settings)
        acting.self_test(next(iter(self._embeddings.values()), None))
        self._loaded = (manifest.version, acting)

    @property
    def ready(self) -> bool:
        return self._loaded is not None

    @property
    def version(self) -> int:
        """Version of what acts, 0 for none."""
        return self._loaded[0] if self._loaded else 0

    def act(
        self,
        episode_id: int,
        frame_index: int,
        task: str,
        obs: Mapping[str, np.ndarray],
        prefix_DA: np.ndarray | None = None,
    ) -> ChunkRow:
        """The chunk for one observation, with what is recorded about it.

        Args:
            prefix_DA: What will be executed until it is there.

        Raises:
            PolicyError: Nothing is loaded, the task is not in the run's catalogue, or the observation or chunk is not finite.
        """
        start = time.perf_counter()
        if self._loaded is None:
            raise PolicyError("no release is loaded", rule="a release is loaded before the robot acts")
        version, acting = self._loaded
        embedding = self._embeddings.get(task)
        if embedding is None:
            raise PolicyError(f"task {task!r} is not in the run's catalogue", rule=f"known are {sorted(self._embeddings)}")
        chunk_id, self._next_chunk = self._next_chunk, self._next_chunk + 1
        answer = acting(obs, embedding, prefix_DA, _seed(f"{self.stream}/{chunk_id}"), self._instructions.get(task, ""))
        if acting.num_short_prefixes and not self._said_short:
            self._said_short = True
            log.warning(
                "inference takes longer than the %d ticks that release %d was trained to bridge: its chunks continue "
                "that many actions, and may jump after them",
                acting.policy.spec.max_delay,
                version,
            )
        latency_ms = 1000 * (time.perf_counter() - start)
        return ChunkRow(
            episode_id, chunk_id, frame_index, version, latency_ms, answer.actions_HA, answer.log_prob_T, answer.replay
        )


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
