"""The benchmark for GPUs runs anywhere at its smallest size, and says what it could not measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
def test_the_smallest_size_runs_without_a_gpu(tmp_path):
    pytest.importorskip("deepspeed")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu.learner", "--size", "tiny", "--steps", "2", "--batch", "4", "--json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["what"].split(",")[0]: row for row in json.loads(done.stdout)}
    assert rows["step"]["value"] > 0 and rows["step"]["repeats"] == 2
    assert rows["of it forward"]["value"] > 0 and rows["copy for a checkpoint"]["value"] > 0
    assert rows["MFU"]["value"] is None and rows["MFU"]["why"] == "no GPU here"
