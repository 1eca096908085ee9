"""The benchmark of policies for GPUs has SmolVLA where lerobot is installed."""

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

import torch

from algorithms.policies.registry import build
from benchmarks.gpu.policies import cases, measure


def test_smolvla_leaves_its_backbone_out_of_releases(tmp_path):
    family, config = cases(False, tmp_path)["SmolVLA"]
    rows = {row.what: row for row in measure("SmolVLA", build(family, config).eval(), 1, False, torch.device("cpu"))}
    assert rows["SmolVLA: bytes of a release"].value < 0.6 * rows["SmolVLA: bytes with what is frozen"].value
    assert rows["SmolVLA: act, chunk 16, batch 8"].value > 0
