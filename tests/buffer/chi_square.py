"""Pearson's test, written out: what was drawn against the distribution that a rule states."""

import numpy as np

Z = 3.719  # standard normal deviate that is exceeded once in 10,000


def statistic(counts, chances):
    """Pearson's statistic and the value that it exceeds once in 10,000 (Wilson and Hilferty's cube of a normal)."""
    counts, chances = np.asarray(counts, float), np.asarray(chances, float) / np.sum(chances)
    assert counts[chances == 0].sum() == 0, "drawn, and it must not be"
    expected = counts.sum() * chances
    rare = expected < 5  # taken together
    counts = np.append(counts[~rare], counts[rare].sum())[: None if expected[rare].sum() >= 5 else -1]
    expected = np.append(expected[~rare], expected[rare].sum())[: len(counts)]
    free = len(counts) - 1
    assert free > 0, "too few draws for this test"
    critical = free * (1 - 2 / (9 * free) + Z * np.sqrt(2 / (9 * free))) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), float(critical)


def assert_drawn_as(counts, chances):
    """The counts (N,) are those of independent draws by the chances (N,), or of draws that vary less."""
    seen, critical = statistic(counts, chances)
    assert seen < critical, f"chi-square {seen:.1f}, critical {critical:.1f}"
