"""A process that samples a log: ``python -m benchmarks.buffer_sampling FOLDER WARM BATCHES [cache MB]``.

Prints JSON lines: first what opening took, then what ``BATCHES`` batches took, after ``WARM`` that are not counted.
Batches go into arrays that are allocated once, as a training loop's are.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.buffer_data import CAMERAS, TASK
from buffer.image_cache import ImageCache
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Within
from fleet.robot import Source

HORIZON = 16
NEEDS = BatchNeeds(
    batch_size=256,
    horizon=HORIZON,
    observations=(*CAMERAS, "observation.state"),
    shares={(Source.OPERATOR,): 1.0},
    offsets=(0, HORIZON),
    within=Within.EPISODE,
)


class Arrays:
    """Gives the same array for the same name again."""

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if name not in self._kept:
            self._kept[name] = np.empty(shape, dtype)
        return self._kept[name]


def memory_mb() -> dict[str, float]:
    """Resident memory of this process: all, anonymous, of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1000 for name in ("VmRSS", "RssAnon", "RssFile")}


def main() -> None:
    folder, warm, batches = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cache_mb = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    start, empty = time.perf_counter(), memory_mb()
    sampler = Sampler(folder, (TASK,), seed=0, cache=ImageCache(cache_mb * 1_000_000) if cache_mb else None)
    sampler.poll()
    _say(open_s=time.perf_counter() - start, num_steps=sampler.num_steps(), empty_mb=empty["VmRSS"])
    arrays = Arrays()
    for step in range(warm):
        sampler.gather(sampler.draw(NEEDS, step), arrays)
    faults, start, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, time.perf_counter(), time.process_time()
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    for step in range(warm, warm + batches):
        sampler.gather(sampler.draw(NEEDS, step), arrays)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    used = resource.getrusage(resource.RUSAGE_SELF)
    _say(
        batches_per_s=batches / wall_s,
        cpu_ms=1000 * cpu_s / batches,
        read_mb=(used.ru_inblock - blocks) * 512 / 1e6,
        major_faults=used.ru_majflt - faults,
        **memory_mb(),
    )
    sampler.close()


def _say(**facts: float) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
