"""The policy families: what they learn by behaviour cloning, and how fast they act.

    python -m benchmarks.policies                        # all, an hour or more on 2 quiet cores
    python -m benchmarks.policies --only state --families mlp flow
    python -m benchmarks.policies --quick                # all at small counts, in minutes; nothing is saved

state: ten Meta-World tasks, 10 scripted demonstrations a task, the 39 numbers of the simulator's state.
control: the same with the network of mlp and other losses, to tell what the loss costs.
images: one task, 20 demonstrations, one camera of 84 x 84 pixels and 4 of the 39 numbers: of the gripper, not of objects.
speed: milliseconds of ``act`` at chunks of 16, compiled and not, and bytes of a release.
latency: success and jumps between chunks of the flow policy when chunks come late.

Demonstrations, log, sampler, learner, releases and tests are those of a run; two families train at a time, each in a process
with one thread. A release (the moving average) acts deterministically on starts that nobody trained on, 4 of 8 actions of
a chunk; intervals of success are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.buffer_report import say
from benchmarks.policies_cases import CONTROL_CASES, IMAGE_CASES, IMAGE_TASK, STATE_CASES
from benchmarks.policies_data import MT10, make_demonstrations
from benchmarks.policies_latency import measure_latency
from benchmarks.policies_learn import learn, rows_of
from benchmarks.policies_speed import measure_speed
from benchmarks.results import Row, save
from fleet.errors import ConfigError
from fleet.lookup import nearest
from fleet.seeds import CLAIMS

PARTS = ("state", "control", "images", "speed", "latency")
CASES = {"state": STATE_CASES, "control": CONTROL_CASES, "images": IMAGE_CASES}
IMAGE_SIZE = 84


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much is done. Pairs are of the ten tasks, and of the one with images; ``steps``: share of each case's updates."""

    demonstrations: tuple[int, int] = (10, 20)
    episodes: tuple[int, int] = (20, 50)
    steps: float = 1.0
    repeats: int = 100
    first_start: int = CLAIMS


FULL = Counts()
QUICK = Counts((2, 2), (1, 2), 0.01, 5, first_start=0)


def measure_learning(part: str, folder: Path, counts: Counts, args: argparse.Namespace) -> list[Row]:
    """Rows of the ten tasks, or of the one with images."""
    images = part == "images"
    tasks = {IMAGE_TASK: MT10[IMAGE_TASK]} if images else MT10
    chosen = [case.shortened(counts.steps) for case in CASES[part] if not args.families or case.name in args.families]
    if not chosen:
        return []
    size = IMAGE_SIZE if images else 0
    demonstrations = make_demonstrations(
        folder / f"demonstrations-{'images' if images else 'state'}", tasks, counts.demonstrations[images], size
    )
    outcomes = learn(
        demonstrations,
        chosen,
        folder / part,
        seeds=args.seeds,
        episodes=counts.episodes[images],
        first_start=counts.first_start,
        workers=args.workers,
    )
    return rows_of(outcomes)


def measure(part: str, folder: Path, counts: Counts, args: argparse.Namespace) -> list[Row]:
    """Rows of one part."""
    if part == "speed":
        return measure_speed(counts.repeats, args.families)
    return measure_latency(folder, counts, args.workers) if part == "latency" else measure_learning(part, folder, counts, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--families", nargs="+", default=[], help="names of the table; default: all, and only then rows are saved"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of weights and batches; demonstrations stay")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="families that train at a time")
    parser.add_argument("--folder", type=Path, help="where demonstrations and runs stay; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="small counts; nothing is saved")
    parser.add_argument("--json", action="store_true", help="print the rows")
    args = parser.parse_args()
    known = [case.name for cases in CASES.values() for case in cases]
    for name in args.families:
        if name not in known:
            raise ConfigError(f"--families {name!r}", rule="a name of the table", remedy=nearest(name, known))
    counts, command = QUICK if args.quick else FULL, "python -m benchmarks.policies --only"  # of each part, without folders
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fleet-policies-"))
    every: list[Row] = []
    try:
        for part in args.only:
            rows = measure(part, folder, counts, args)
            for row in rows:
                say(f"{row.what}: {row.value} {row.unit} {row.why}")
            if not args.quick and not args.families:
                say(f"saved: {save(f'policies_{part}', rows, f'{command} {part} --seeds {args.seeds}')}")
            every += rows
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in every], indent=1) + "\n")


if __name__ == "__main__":
    main()
