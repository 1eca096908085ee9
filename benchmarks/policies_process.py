"""One family: trained by the learner on a run folder's log, tested on held-out starts, timed.

    python -m benchmarks.policies_process RUN

RUN/benchmark.json holds the learner's tables by name, ``episodes``: held-out starts a task, and ``first``: the first of them.
Prints one line of JSON. One thread, one process: training, physics and the policy take turns.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.policies_data import tasks_of
from fleet.runfolder import RunFolder
from fleet.seeds import held_out_seeds
from fleet.server.releases import ReleaseStore
from infra.evaluation import evaluate_version
from learner.main import LEARNER_TABLES, check_learner_tables
from learner.progress import Progress

INFERENCES = 50


def train(run: RunFolder, settings: dict[str, Any]) -> float:
    """Trains to the end and publishes the average; returns the processor seconds between the first and the last update: other
    work on the machine does not count."""
    tables = {name: cls(**settings.get(name, {})) for name, cls in LEARNER_TABLES.items()}
    check_learner_tables(tables)
    from learner.train import train as train_run

    began: list[float] = []

    def report(progress: Progress) -> None:
        if progress.step and not began:
            began.append(time.process_time())

    train_run(run, tables, stop=lambda: False, report=report)
    return time.process_time() - began[0]


def released_policy(run: RunFolder) -> Any:
    """The newest release as a robot builds it."""
    from safetensors.torch import load

    from algorithms.policies.registry import build, load_published

    store = ReleaseStore(run.releases)
    version = store.newest()
    assert version is not None
    manifest = store.manifest(version)
    policy = build(manifest.policy["family"], manifest.policy["config"])
    load_published(policy, load(store.load(version)))
    return policy.eval()


def plausible_observation(policy: Any, embedding: np.ndarray, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Noise of the features that a policy reads."""
    from algorithms.policies.base import acting_conditions

    spec, generator = policy.spec, torch.Generator().manual_seed(0)
    obs = {name: torch.randn(batch_size, *shape, generator=generator) for name, shape in spec.vectors.items()}
    for name, shape in spec.images.items():
        obs[name] = torch.randint(256, (batch_size, *shape), generator=generator, dtype=torch.uint8)
    rows = torch.from_numpy(embedding).expand(batch_size, -1)
    return obs | acting_conditions(spec, rows)


def inference_ms(policy: Any, obs: dict[str, torch.Tensor], repeats: int = INFERENCES) -> list[float]:
    """Milliseconds of each deterministic call."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 5):
            start = time.perf_counter()
            policy.act(obs)
            times.append(1000 * (time.perf_counter() - start))
    return times[5:]


def main() -> None:
    torch.set_num_threads(1)
    run = RunFolder.open(Path(sys.argv[1]))
    settings = json.loads((run.path / "benchmark.json").read_text())
    episodes, first = settings.pop("episodes"), settings.pop("first")
    train_s = train(run, settings)
    policy = released_policy(run)
    embedding = next(iter(tasks_of(run).values()))
    ms = inference_ms(policy, plausible_observation(policy, embedding))
    start = time.process_time()
    version = ReleaseStore(run.releases).newest() or 0
    table = evaluate_version(run, version, "final", held_out_seeds(episodes, first=first), workers=0)
    facts = {
        "train_s": train_s,
        "test_s": time.process_time() - start,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "inference_ms": ms,
        "rows": [(row.task, row.num_episodes, row.num_successes, row.mean_steps) for row in (*table.rows, table.total)],
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
