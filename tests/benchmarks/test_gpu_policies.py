"""The benchmark of policies for GPUs runs anywhere at its smallest size."""

import pytest
import torch

from algorithms.policies.registry import build
from benchmarks.gpu.policies import cases, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mlp", "small_vla", "token, parallel"])
def test_policies_are_timed_and_weighed(name, tmp_path):
    family, config = cases(False, tmp_path)[name]
    rows = {row.what: row for row in measure(name, build(family, config).eval(), 1, False, CPU)}
    assert len(rows) == 4 and all(row.value > 0 for row in rows.values())
    assert rows[f"{name}: bytes of a release"].value == rows[f"{name}: bytes with what is frozen"].value
