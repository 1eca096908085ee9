"""Instruction -> embedding, computed once per task on the server and sent with the task.

The default needs no download: hashed words and character n-grams. Instructions that share words lie near each other;
it knows nothing of meaning ("shut" and "close" are strangers). "universal" does, see instruction_use.py. An encoder of your
own is any callable str -> (E,) float32, named as "module:function" in the run file (run.instruction_encoder).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import numpy as np

from fleet.errors import PolicyError
from fleet.lookup import resolve

DIM = 32  # E of the default encoder
ENCODERS = {"hashed": "algorithms.instruction:hashed", "universal": "algorithms.instruction_use:universal"}
EXTRAS = {"universal": "language"}
MAX_DIM = 8192  # a robot gets the embeddings of all tasks when it connects
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
    """``instruction`` as (E,) float32 by the encoder's name: a key of ``ENCODERS`` or "module:function".

    Raises:
        PolicyError: Unknown encoder, one that is not installed, or one that gives something else.
    """
    function: Encoder = resolve(ENCODERS, encoder, kind="instruction encoder", error=PolicyError, extras=EXTRAS)
    found = np.asarray(function(instruction))
    if found.ndim != 1 or not 1 <= len(found) <= MAX_DIM or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise PolicyError(
            f"instruction encoder {encoder!r} makes {found.dtype}{found.shape} of {instruction!r}",
            rule=f"finite floats, one dimension of 1 to {MAX_DIM} elements",
        )
    return found.astype(np.float32)


def _direction(text: str, dim: int) -> np.ndarray:
    """A vector of +-1 taken from the bits of a hash."""
    bits = np.frombuffer(hashlib.shake_256(text.encode()).digest((dim + 7) // 8), np.uint8)
    return np.unpackbits(bits)[:dim] * 2.0 - 1.0
