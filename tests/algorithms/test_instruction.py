import numpy as np
import pytest

from algorithms.instruction import DIM, encode, hashed
from fleet.errors import PolicyError

FROZEN = [0.176585, -0.11195, 0.091952, -0.047316]


def test_unit_norm_deterministic_and_frozen():
    """The numbers are part of every run on disk: they must not change between versions."""
    vector = encode("open the door")
    assert vector.shape == (DIM,) and vector.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-6)
    np.testing.assert_array_equal(vector, encode("  Open the DOOR! "))
    np.testing.assert_allclose(vector[:4], FROZEN, atol=1e-6)
    assert hashed("open the door", dim=7).shape == (7,)


def test_shared_words_lie_nearer():
    push, place, door = (hashed(t, 256) for t in ("push the puck to the goal", "place the puck at the goal", "open a drawer"))
    assert push @ place > 0.5 > push @ door
    assert hashed("open", 256) @ hashed("opens", 256) > hashed("open", 256) @ hashed("shut", 256) + 0.1


def test_own_encoder_and_refusals():
    assert encode("x", "algorithms.instruction:hashed").shape == (DIM,)
    with pytest.raises(PolicyError, match="did you mean 'hashed'"):
        encode("x", "hashd")
    with pytest.raises(PolicyError, match="letter or digit"):
        encode(" ?! ")
