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


@pytest.mark.timeout(180)
def test_smolvla_leaves_its_backbone_out_of_releases(tmp_path):
    pytest.importorskip("lerobot")
    family, config = cases(False, tmp_path)["SmolVLA"]
    rows = {row.what: row for row in measure("SmolVLA", build(family, config).eval(), 1, False, CPU)}
    assert rows["SmolVLA: bytes of a release"].value < 0.6 * rows["SmolVLA: bytes with what is frozen"].value
    assert rows["SmolVLA: act, chunk 16, batch 8"].value > 0
