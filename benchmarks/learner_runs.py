"""Runs of the learner that the benchmark measures: a folder with a log, and processes that train on it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.buffer_data import ACTION, CAMERAS, STATE, TASK, fill_log
from benchmarks.buffer_process import ENV, ROOT
from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder

MLP, IMAGE = "the demo's policy", "25 M image policy"
BATCH = 256
Settings = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run of the learner said of its steps ``first`` to ``last``."""

    first: int
    last: int
    wall_s: float
    cpu_s: float
    seconds: Mapping[str, float]
    replaced: int
    losses: Mapping[str, float]

    @property
    def steps(self) -> int:
        return self.last - self.first

    @property
    def step_s(self) -> float:
        return self.wall_s / self.steps

    def due(self, every: int) -> int:
        """How often something was due that is so every ``every`` steps."""
        return self.last // every - self.first // every


def policy_settings(policy: str, size: int = 128) -> dict[str, dict[str, Any]]:
    """Tables that name one of the policies."""
    if policy == MLP:
        reads: dict[str, list[int]] = {"observation.state": [STATE]}
        return {"policy": {"family": "mlp", "config": {"horizon": 8, "reads": reads}}}
    reads = {**{name: [size, size, 3] for name in CAMERAS}, "observation.state": [STATE]}
    return {"policy": {"family": "benchmarks.learner_policy:ImagePolicy", "config": {"reads": reads, "action_dim": ACTION}}}


def make_run(folder: Path, num_steps: int, codec: str = "raw", size: int = 128) -> RunFolder:
    """A run folder with ``num_steps`` steps in its log."""
    run = RunFolder.create(folder)
    create_run_keys(run.keys)
    embedding = [1.0] + [0.0] * 31
    (run.path / "tasks.json").write_text(json.dumps({TASK: {"instruction": TASK, "embedding": embedding}}))
    fill_log(run.buffer, num_steps, codec, size=size)
    return run


def train(run: RunFolder, settings: Settings, *, warm: int, ranks: int = 1, curve: bool = False) -> Measured:
    """Trains from the beginning.

    Args:
        settings: Fields by table, see ``learner.main.LEARNER_TABLES``.
        warm: Steps before the clock starts.
        curve: Whether ``losses`` is to hold every step's, which takes time.

    Raises:
        RuntimeError: A rank failed; says what its last words were.
    """
    for path in (run.checkpoints, run.releases):
        shutil.rmtree(path)
        path.mkdir()
    (run.path / "benchmark.json").write_text(json.dumps({"warm": warm, "curve": curve, **settings}))
    command = [sys.executable, "-m", "benchmarks.learner_process", str(run.path)]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            rendezvous = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        commands = [[*command, str(rank), str(ranks), rendezvous] for rank in range(ranks)]
    else:
        commands = [command]
    env = {**ENV, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [run.logs / f"benchmark-{rank}.txt" for rank in range(ranks)]
    processes = []
    try:
        for words, log in zip(commands, logs, strict=True):
            with log.open("w") as errors:
                processes.append(subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True))
        said = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        if process.returncode:
            raise RuntimeError(" ".join(log.read_text(errors="replace").split())[-300:])
    return Measured(**json.loads(said[0].splitlines()[-1]))
