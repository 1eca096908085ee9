"""From the acting policy to a release."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fleet.releases import Manifest
from fleet.server.releases import ReleaseStore
from learner.tensor_file import dumps


class Publisher:
    """Publishes what an algorithm acts with.

    A learner that went back to an older checkpoint publishes nothing until its step passes that of the newest
    release: robots must never be told that older weights are newer.

    Args:
        keep: Newest releases that stay on disk; 0 for all.
        keep_first: Whether the run's first one stays too.
    """

    def __init__(self, store: ReleaseStore, *, keep: int = 0, keep_first: bool = False) -> None:
        self._store, self._keep, self._keep_first = store, keep, keep_first
        newest = store.newest()
        self.version = newest or 0
        self.step = store.manifest(newest).step if newest else -1

    def wants(self, step: int) -> bool:
        """Whether a release at this step would be newer than the newest."""
        return step > self.step

    def publish(
        self, weights: Mapping[str, Tensor], policy: Mapping[str, Any], algorithm: str, step: int, stats: Mapping[str, float]
    ) -> Manifest:
        """Publishes a snapshot. File work: called beside the updates.

        Raises:
            ReleaseError, StorageError: See ReleaseStore.publish.
        """
        metrics = {name: value for name, value in stats.items() if math.isfinite(value)}
        manifest = self._store.publish(dumps(weights), algorithm=algorithm, step=step, metrics=metrics, policy=policy)
        self.version, self.step = manifest.version, step
        if self._keep:
            self._store.prune(self._keep, keep_first=self._keep_first)
        return manifest
