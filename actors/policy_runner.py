"""Runs the shared policy on one robot: builds it from a release, tests it, and answers with chunks.

torch is loaded here, when the first release comes: a robot that only demonstrates never pays for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.fragments import ChunkRow
from actors.records import MAX_HORIZON
from fleet.errors import PolicyError
from fleet.releases import Manifest
from fleet.spec import RobotSpec


class PolicyRunner:
    """One loaded release at a time; ``load`` builds the next beside it and swaps when it passed its self-test.

    Args:
        embeddings: Instruction embedding (E,) by task.
        num_threads: torch's threads; 1 keeps a small policy from waking every core each tick.
    """

    def __init__(self, spec: RobotSpec, embeddings: Mapping[str, list[float]], num_threads: int = 1) -> None:
        self.spec, self.num_threads = spec, num_threads
        self.set_embeddings(embeddings)
        self._loaded: tuple[int, Any] | None = None
        self._next_chunk = 0

    def set_embeddings(self, embeddings: Mapping[str, list[float]]) -> None:
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

            from algorithms.policies.base import INSTRUCTION
            from algorithms.policies.registry import build
        except ImportError as error:
            raise PolicyError(
                f"a release came and this robot cannot run it: {error.name} is not installed",
                rule="a robot that acts by the policy has the extra 'actor'; one that demonstrates needs the base only",
                remedy="pip install 'fleet-rl[actor]'",
            ) from None
        torch.set_num_threads(self.num_threads)
        policy = build(str(manifest.policy["family"]), dict(manifest.policy["config"]))
        policy.spec.check_robot(self.spec)
        if policy.spec.horizon > MAX_HORIZON:
            raise PolicyError(
                f"release {manifest.version} has a horizon of {policy.spec.horizon}", rule=f"at most {MAX_HORIZON}"
            )
        try:
            policy.load_state_dict(load(safetensors), strict=True)
        except RuntimeError as error:
            raise PolicyError(
                f"weights of release {manifest.version} do not fit: {error}"[:500], rule="names and shapes agree"
            ) from None
        policy.eval()
        zeros = {name: np.zeros(f.shape, f.np_dtype) for name, f in self.spec.observations.items()}
        embedding = np.zeros(policy.spec.conditions.get(INSTRUCTION, (0,)), np.float32)
        actions_HA, _ = _infer(policy, zeros, embedding)
        if not np.isfinite(actions_HA).all():
            raise PolicyError(f"release {manifest.version} proposes NaN", rule="finite actions for a zero observation")
        self._loaded = (manifest.version, policy)

    @property
    def ready(self) -> bool:
        return self._loaded is not None

    @property
    def version(self) -> int:
        """Version of what acts, 0 for none."""
        return self._loaded[0] if self._loaded else 0

    def act(self, episode_id: int, frame_index: int, task: str, obs: Mapping[str, np.ndarray]) -> ChunkRow:
        """The chunk for one observation, with what is recorded about it.

        Raises:
            PolicyError: Nothing is loaded, or the task has no embedding: it is not in the run's catalogue.
        """
        start = time.perf_counter()
        if self._loaded is None:
            raise PolicyError("no release is loaded", rule="a release is loaded before the robot acts")
        version, policy = self._loaded
        embedding = self._embeddings.get(task)
        if embedding is None:
            raise PolicyError(f"task {task!r} is not in the run's catalogue", rule=f"known are {sorted(self._embeddings)}")
        actions_HA, log_prob_T = _infer(policy, obs, embedding)
        self._next_chunk += 1
        latency_ms = 1000 * (time.perf_counter() - start)
        return ChunkRow(episode_id, self._next_chunk - 1, frame_index, version, latency_ms, actions_HA, log_prob_T)


def _infer(policy: Any, obs: Mapping[str, np.ndarray], embedding: np.ndarray) -> tuple[np.ndarray, list[float]]:
    import torch

    batch = {name: torch.from_numpy(np.array(obs[name]))[None] for name in policy.spec.reads}
    batch["instruction"] = torch.from_numpy(embedding)[None]
    with torch.inference_mode():
        chunk = policy.act(batch)
    actions = chunk.actions_BHA[0].float().cpu().numpy()
    log_prob = [] if chunk.log_prob_BT is None else [float(x) for x in chunk.log_prob_BT[0]]
    return np.ascontiguousarray(actions, np.float32), log_prob
