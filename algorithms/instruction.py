"""Instruction -> embedding, computed once per task on the server and sent with the task.

The default needs no download: hashed words and character n-grams. Instructions that share words lie near each other;
it knows nothing of meaning ("shut" and "close" are strangers). An encoder of your own is any callable str -> (E,) float32,
named as "module:function" in ``ENCODERS`` or in the run file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import numpy as np

from fleet.errors import PolicyError
from fleet.lookup import resolve

DIM = 32  # E of the default encoder
ENCODERS = {"hashed": "algorithms.instruction:hashed"}
Encoder = Callable[[str], np.ndarray]


def hashed(instruction: str, dim: int = DIM) -> np.ndarray:
    """Unit-norm float32 (dim,): each word and each of its 3-grams adds a pseudo-random direction fixed by its hash.

    The same on every machine and Python. Words weigh as much as all of their n-grams together.

    Raises:
        PolicyError: The instruction holds no letter or digit.
    """
    words = re.findall(r"\w+", instruction.lower())
    if not words:
        raise PolicyError(f"instruction {instruction!r} is empty", rule="at least one letter or digit")
    total = np.zeros(dim)
    for word in words:
        padded = f"<{word}>"
        grams = [padded[i : i + 3] for i in range(len(padded) - 2)]
        total += _direction("word " + word, dim)
        total += sum(_direction("gram " + gram, dim) for gram in grams) / np.sqrt(len(grams))
    return (total / np.linalg.norm(total)).astype(np.float32)


def encode(instruction: str, encoder: str = "hashed") -> np.ndarray:
    """``instruction`` by the encoder's name: a key of ``ENCODERS`` or "module:function"."""
    function: Encoder = resolve(ENCODERS, encoder, kind="instruction encoder", error=PolicyError)
    return function(instruction)


def _direction(text: str, dim: int) -> np.ndarray:
    """A vector of +-1 taken from the bits of a hash."""
    bits = np.frombuffer(hashlib.shake_256(text.encode()).digest((dim + 7) // 8), np.uint8)
    return np.unpackbits(bits)[:dim] * 2.0 - 1.0
