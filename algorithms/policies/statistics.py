"""What is known of a feature's values in a run's data: what policies normalise by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from fleet.errors import PolicyError


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of each element of one feature, arrays of the feature's shape.

    mean, std: over steps. low, high: the 1 % and 99 % quantiles. min, max: of all that was seen.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> Statistics:
        """Of ``values``, (number of steps, ...), each step weighing the same or as ``weights`` say."""
        values = np.asarray(values, np.float64)
        share = np.full(len(values), 1.0) if weights is None else np.asarray(weights, np.float64)
        share = share / share.sum()
        mean = np.tensordot(share, values, 1)
        std = np.sqrt(np.tensordot(share, (values - mean) ** 2, 1))
        low, high = (_quantile(values, share, q) for q in (0.01, 0.99))
        return cls(mean, std, low, high, values.min(0), values.max(0))


def joined(statistics: Mapping[str, Statistics], shapes: Mapping[str, tuple[int, ...]], what: str) -> np.ndarray:
    """One field of the statistics of several features, flattened and joined in the order of ``shapes``; float32.

    Args:
        what: Name of the field, "mean" for example.

    Raises:
        PolicyError: A feature is missing, has another shape, or a value is not finite.
    """
    parts = []
    for name, shape in shapes.items():
        known = statistics.get(name)
        part = np.asarray(() if known is None else getattr(known, what), np.float32)
        if known is None or part.shape != tuple(shape) or not np.isfinite(part).all():
            said = "are missing" if known is None else f"have {what} of shape {part.shape}: {part.ravel()[:8]}"
            raise PolicyError(f"statistics of {name!r} {said}", rule=f"finite, of shape {tuple(shape)}")
        parts.append(part.ravel())
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _quantile(values: np.ndarray, share: np.ndarray, q: float) -> np.ndarray:
    """The smallest value below or at which lies the share ``q`` of each element's values."""
    order = np.argsort(values, axis=0, kind="stable")
    reached = np.cumsum(share[order], axis=0) >= q - 1e-12
    return np.take_along_axis(values, np.take_along_axis(order, reached.argmax(0)[None], 0), 0)[0]
