"""Which reset seeds are for what: training and evaluation can never meet the same start.

Training and demonstrations draw from ``TRAINING`` = [0, 2^30), evaluation from ``HELD_OUT`` = [2^30, 2^31). Of these the
first 1,000 are for choosing settings, the next 1,000 for watching a run (``CONTINUAL``), and those after for claims
(``CLAIMS``): who picks a release by its watched curve still reports a number that did not pick it.
"""

from __future__ import annotations

import hashlib

from fleet.errors import ConfigError

TRAINING = range(0, 2**30)
HELD_OUT = range(2**30, 2**31)
CONTINUAL, CLAIMS = 1000, 2000  # numbers of their first starts within HELD_OUT


def training_seed(run_seed: int, stream: str, episode: int) -> int:
    """The reset seed of an episode. ``stream`` names who draws: a robot's id and boot, or "demonstrations"."""
    digest = hashlib.sha256(f"{run_seed}/{stream}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % len(TRAINING)


def held_out_seeds(num: int, first: int = 0) -> list[int]:
    """``num`` reset seeds that no training episode uses, always the same ones.

    Raises:
        ConfigError: The range is out of ``HELD_OUT``.
    """
    if num < 1 or first < 0 or first + num > len(HELD_OUT):
        raise ConfigError(f"{num} held-out seeds from number {first}", rule=f"within {len(HELD_OUT)} seeds, at least one")
    return [HELD_OUT[first + i] for i in range(num)]
