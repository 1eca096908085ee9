import json
import random

import numpy as np
import pytest
import safetensors.torch
import torch

from fleet.errors import LearnerError
from learner.tensor_file import dumps, pack, to_arrays, unpack

STATE = {
    "rows": np.arange(12, dtype=np.uint64).reshape(3, 4)[:, ::2],
    "mean": torch.arange(3, dtype=torch.bfloat16),
    "nothing": torch.zeros(0, 5),
    "scalar": torch.tensor(7),
    "flags": [np.array([True, False]), {"deep": torch.ones(2, 2).T}],
    "plain": {"a": 1, "b": [0.5, None, "x", True], "empty": {}, "none": []},
    "a/b": torch.zeros(1),
    "a": {"b": torch.ones(1)},
}


def test_a_state_comes_back():
    back = unpack(pack(STATE))
    assert np.array_equal(to_arrays(back["rows"]), STATE["rows"]) and back["rows"].dtype == torch.uint64
    assert torch.equal(back["mean"], STATE["mean"]) and back["nothing"].shape == (0, 5) and int(back["scalar"]) == 7
    assert back["flags"][0].tolist() == [True, False] and torch.equal(back["flags"][1]["deep"], torch.ones(2, 2))
    assert back["plain"] == STATE["plain"] and list(back) == list(STATE)
    assert back["a/b"].item() == 0 and back["a"]["b"].item() == 1
    assert unpack(pack([])) == [] and unpack(pack(3)) == 3 and unpack(pack(torch.ones(1))).item() == 1


def test_what_came_back_may_be_written_to():
    packed = pack({"w": torch.zeros(3)})
    unpack(packed)["w"] += 1
    assert unpack(packed)["w"].sum() == 0


def test_the_layout_is_that_of_safetensors():
    tensors = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.randn(2, 3), "c": torch.tensor(1.5, dtype=torch.float64)}
    loaded = safetensors.torch.load(bytes(dumps(tensors, {"who": "us"})))
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("state", [{"a": object()}, {1: 2}, {"$tensor": "x"}, {"a": [{2.0: 1}]}, np.array(["x"]), 1j, b"x"])
def test_what_a_state_may_not_hold(state):
    with pytest.raises(LearnerError, match="state '"):
        pack(state)


def made(header, body=b"", length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(shape, begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


META = {"state": json.dumps({"$tensor": "x"})}
MALFORMED = {
    "nothing": b"",
    "too short": b"\x01\x00",
    "a header of 2**63 bytes": made(b"{}", length=2**63),
    "a header beyond the end": made(b"{}", length=3),
    "an empty header": made(b""),
    "no JSON": made(b"\x80\x04abc"),
    "deep JSON": made(b"[" * 200_000),
    "a list": made([]),
    "no state": made({}),
    "metadata of numbers": made({"__metadata__": {"state": 1}}),
    "state that is no JSON": made({"__metadata__": {"state": "{"}}),
    "an unknown type": made({"__metadata__": META, "x": entry([1], 0, 1, "OBJECT")}, b"x"),
    "a negative shape": made({"__metadata__": META, "x": entry([-1, -1], 0, 1)}, b"x"),
    "a shape of text": made({"__metadata__": META, "x": entry(["1"], 0, 1)}, b"x"),
    "a huge shape": made({"__metadata__": META, "x": entry([2**40, 2**40], 0, 2**80)}, b"x"),
    "a shape beyond 64 bits": made({"__metadata__": META, "x": entry([0, 2**70], 0, 0)}),
    "an empty shape of 2**124": made({"__metadata__": META, "x": entry([0, 2**62, 2**62], 0, 0)}),
    "shape and bytes differ": made({"__metadata__": META, "x": entry([2], 0, 1)}, b"x"),
    "a hole": made({"__metadata__": META, "x": entry([1], 1, 2)}, b"xx"),
    "an overlap": made({"__metadata__": META, "x": entry([2], 0, 2), "y": entry([1], 1, 2)}, b"xx"),
    "bytes too many": made({"__metadata__": META, "x": entry([1], 0, 1)}, b"xx"),
    "a tensor that is missing": made({"__metadata__": META}),
    "a name that leads elsewhere": made({"__metadata__": META, "../x": entry([1], 0, 1)}, b"x"),
    "a tensor that belongs nowhere": made({"__metadata__": META, "x": entry([1], 0, 1), "y": entry([0], 1, 1)}, b"x"),
    "a tensor named by a list": made({"__metadata__": {"state": '{"$tensor": []}'}, "x": entry([1], 0, 1)}, b"x"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_bytes_are_refused(what):
    with pytest.raises(LearnerError, match="no packed state"):
        unpack(MALFORMED[what])


def test_bytes_that_were_cut_or_changed_are_refused_or_still_a_state(scale):
    packed, rng = pack(STATE), random.Random(0)
    for _ in range(100 * scale):
        with pytest.raises(LearnerError):
            unpack(packed[: rng.randrange(len(packed))])
        changed = bytearray(packed)
        changed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
        try:
            unpack(changed)
        except LearnerError:
            pass
        with pytest.raises(LearnerError):
            unpack(rng.randbytes(rng.randrange(1, 300)))
