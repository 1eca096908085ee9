"""What leaves the learner: releases and checkpoints. Every rank calls this alike; rank 0 has the files.

Files are written by a thread of their own from a copy taken between two updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from algorithms.base import Algorithm
from algorithms.policies.registry import describe, published
from learner.agree import require_equal
from learner.background import Background, Fact
from learner.budget import Budget
from learner.checkpoint import Checkpoint, Checkpoints
from learner.copies import Copies
from learner.engine import Engine
from learner.publisher import Publisher
from learner.ranks import Ranks


class Keep:
    """Publishes and checkpoints.

    Args:
        publisher, checkpoints: None on all ranks but the first.
    """

    def __init__(
        self,
        ranks: Ranks,
        publisher: Publisher | None,
        checkpoints: Checkpoints | None,
        device: torch.device,
        budget: Budget,
    ) -> None:
        self._ranks, self._publisher, self._checkpoints, self._budget = ranks, publisher, checkpoints, budget
        self._background: Background | None = None
        self._weights, self._states = Copies(device), Copies(device)
        self._saved = 0

    @property
    def release(self) -> int:
        """The newest one; 0 where there is none, or on another rank."""
        return self._publisher.version if self._publisher is not None else 0

    @property
    def num_replaced(self) -> int:
        """Releases and checkpoints that were not written since a newer one was there before the disk."""
        return self._background.num_replaced if self._background is not None else 0

    def open(self) -> None:
        """Starts the thread."""
        self._background = Background() if self._ranks.first else None

    def close(self) -> None:
        """Ends the thread; what is not written yet is not."""
        if self._background is not None:
            self._background.close()

    def facts(self, *, flush: bool = False) -> list[Fact]:
        """What was written since the last call; ``flush`` waits until all is.

        Raises:
            FleetError: It could not be written.
        """
        if self._background is None:
            return []
        return self._background.flush() if flush else self._background.facts()

    def require_written(self) -> None:
        """For the end, when there is no next time. Raises DiskFull when the newest release or checkpoint found no room."""
        if self._background is not None:
            self._background.require_done()

    def resumed(self, step: int) -> None:
        """The checkpoint of this step is on disk."""
        self._saved = step

    def publish(self, algorithm: Algorithm, engine: Engine, step: int, stats: dict[str, float]) -> None:
        """Publishes what acts now, where it is newer than the newest release."""
        with self._budget.timed("publish"), engine.gathered():
            publisher = self._publisher
            if publisher is None or not publisher.wants(step):
                return
            acting = algorithm.acting()
            copy, policy, name = self._weights.take(published(acting)), describe(acting), algorithm.name

        def job() -> Fact:
            manifest = publisher.publish(copy.state, policy, name, step, stats)
            return "published", {"version": manifest.version, "step": step}

        self._submit("publish", job)

    def checkpoint(
        self, algorithm: Algorithm, engine: Engine, step: int, meta: dict[str, Any], samplers: dict[str, Any]
    ) -> None:
        """Keeps everything that a resumed run needs.

        Args:
            samplers: Their states by number of the shard.

        Raises:
            LearnerError: Ranks do not have the same weights any more.
        """
        with engine.gathered():
            weights, optimizers = engine.weights(), engine.state()
            require_equal(self._ranks, algorithm, weights, step)
            self._saved = step
            checkpoints, publisher = self._checkpoints, self._publisher
            if checkpoints is None or publisher is None:
                return
            copy = self._states.take(
                {"parts": weights, "algorithm": algorithm.state_dict(), "optimizers": optimizers, "samplers": samplers}
            )

        def job() -> Fact:
            # The release that was submitted before is out now: its number must be in here.
            checkpoints.save(Checkpoint(step, {**meta, "release": publisher.version}, copy.state))
            return "checkpoint", {"step": step}

        self._submit("checkpoint", job)

    def is_saved(self, step: int) -> bool:
        """Whether the checkpoint of this step was taken."""
        return step == self._saved

    def _submit(self, kind: str, job: Callable[[], Fact]) -> None:
        def work() -> Fact:
            with self._budget.beside(kind):
                return job()

        if self._background is not None:
            self._background.submit(kind, work)
