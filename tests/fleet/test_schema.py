"""A fragment's bytes: what went in comes out, each table begins at a multiple of 64, and what pads it is zero."""

import numpy as np
import pyarrow as pa
import pytest

from fleet.errors import FragmentRefused
from fleet.schema import ALIGNMENT, build_table, check_fragment, decode_fragment, encode_fragment, steps_schema
from fleet.spec import Feature, RobotSpec

SPEC = RobotSpec(
    "toy",
    20.0,
    {
        "action": Feature("float32", (2,)),
        "observation.images.top": Feature("uint8", (4, 5, 3)),
        "observation.state": Feature("float64", (3,)),
        "observation.touch": Feature("bool", (3,)),
    },
)
HEAD = {
    "robot_id": "arm-1",
    "boot_id": "0" * 16,
    "episode_id": 0,
    "time_ns": 1,
    "mono_ns": 1,
    "task": "reach",
    "source": 0,
    "operator_id": "",
    "intervention": False,
    "chunk_id": -1,
    "chunk_index": -1,
    "next.reward": 0.0,
    "next.terminated": False,
    "next.truncated": False,
}


def make_rows(count, **changes):
    rng = np.random.default_rng(count)
    return [
        {
            **HEAD,
            "frame_index": i,
            "action": rng.normal(size=2).astype(np.float32),
            "observation.images.top": rng.integers(0, 256, (4, 5, 3), dtype=np.uint8),
            "observation.state": rng.normal(size=3),
            "observation.touch": rng.integers(0, 2, 3).astype(bool),
            **changes,
        }
        for i in range(count)
    ]


def encode(rows, spec=SPEC):
    return encode_fragment({"steps": build_table("steps", spec, rows)})


@pytest.mark.parametrize("count", [1, 7, 20])
def test_values_come_back_as_they_went_in(count):
    rows = make_rows(count)
    directory, payload = encode(rows)
    steps = decode_fragment(directory, payload).tables["steps"]
    assert steps.schema.equals(steps_schema(SPEC))
    for name in SPEC.features:
        values = steps.column(name).flatten().to_numpy().reshape(count, -1)
        assert np.array_equal(values, np.stack([row[name].reshape(-1) for row in rows]))
    assert steps.column("frame_index").to_pylist() == list(range(count))


def test_tables_begin_at_multiples_of_64_and_padding_is_zero():
    label = {"robot_id": "arm-1", "boot_id": "0" * 16, "episode_id": 0, "field": "f", "value": "v", "judge": "j", "time_ns": 1}
    tables = {"steps": build_table("steps", SPEC, make_rows(3)), "labels": build_table("labels", SPEC, [label])}
    directory, payload = encode_fragment(tables)
    assert list(directory) == ["steps", "labels"] and sum(directory.values()) == len(payload)
    end = 0
    for name, length in directory.items():
        assert length % ALIGNMENT == 0
        alone, bytes_alone = encode_fragment({name: tables[name]})
        assert alone[name] == length and bytes(payload[end : end + length]) == bytes(bytes_alone)
        end += length
    for _ in range(20):  # memory is used again: what lay there before must not show
        assert bytes(encode_fragment(tables)[1]) == bytes(payload)


def test_a_spec_with_the_same_columns_and_other_sizes_is_told_apart():
    other = RobotSpec("toy", 20.0, {**SPEC.features, "observation.state": Feature("float64", (4,))})
    assert not steps_schema(other).equals(steps_schema(SPEC)) and steps_schema(other) is steps_schema(other)
    with pytest.raises(FragmentRefused, match=r"observation\.state"):
        check_fragment(decode_fragment(*encode(make_rows(2))), other, "arm-1", "0" * 16)


@pytest.mark.parametrize("changes", [{"robot_id": "arm-2"}, {"boot_id": "1" * 16}])
def test_one_row_of_somebody_else_is_refused(changes):
    rows = make_rows(3)
    rows[1].update(changes)
    with pytest.raises(FragmentRefused, match="belongs to"):
        check_fragment(decode_fragment(*encode(rows)), SPEC, "arm-1", "0" * 16)


def test_frames_of_different_shapes_make_no_table():
    rows = make_rows(2)
    rows[1]["observation.images.top"] = np.zeros((2, 5, 3), np.uint8)
    with pytest.raises(ValueError):
        build_table("steps", SPEC, rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda b: b.set_column(b.schema.get_field_index("frame_index"), "frame_index", pa.array([0, 1], pa.int64())),
            "spec says",
        ),
        (lambda b: b.drop_columns(["mono_ns"]), "missing"),
        (lambda b: b.append_column("surplus", pa.array([0, 1])), "not in the spec"),
        (lambda b: b.append_column("task", b.column("task")), "twice"),
    ],
    ids=["type", "missing", "extra", "twice"],
)
def test_columns_that_are_not_the_specs_are_refused(change, said):
    fragment = decode_fragment(*encode_fragment({"steps": change(build_table("steps", SPEC, make_rows(2)))}))
    with pytest.raises(FragmentRefused, match=said):
        check_fragment(fragment, SPEC, "arm-1", "0" * 16)
