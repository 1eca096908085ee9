"""Intervals of measured rates."""

from __future__ import annotations

import math

Z_95 = 1.959964  # normal quantile of 97.5 %


def wilson(num_successes: int, num: int) -> tuple[float, float]:
    """Wilson score interval of a rate at 95 %; (0, 1) when nothing was tried."""
    if num == 0:
        return 0.0, 1.0
    rate, z2 = num_successes / num, Z_95**2
    centre = (rate + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 / (1 + z2 / num) * math.sqrt(rate * (1 - rate) / num + z2 / (4 * num * num))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))
