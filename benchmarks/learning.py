"""Algorithms that learn from corrections and values, compared: what each makes of the same robot's steps.

    python -m benchmarks.learning                                    # everything, about three hours on two cores
    python -m benchmarks.learning --only weak --methods bc hg_dagger
    python -m benchmarks.learning --quick                            # all at tiny counts, in minutes; nothing is saved

weak: three Meta-World tasks, two demonstrations each. A scripted operator takes over from every method's robot.
imperfect: slow and unsteady demonstrations, reward at success only. HG-DAgger's operator is as imperfect; the others have none.
retention: six tasks are known, the robot works on three of them; once with the demonstrations in the log, once without.

One process a method and seed, in lockstep: the learner's own loop on a run folder's log; before each batch one simulated
robot makes the steps that are due by then, with the control loop, policy runner, operator, fragments and ingest of a robot,
by the newest release. No sockets, no sleeping: the same seed gives the same steps, batches and releases. All methods of a
seed share demonstrations, and those of one policy family the start policy. They get equal environment steps and equal
updates; human steps (demonstrations and operator) are counted. ``learning_methods`` says what each method is,
``learning_scenarios`` how much of everything is done.

The policy of all methods but RLPD is one small flow policy (width 64, 2 layers, 5 steps): RECAP and Q-chunking need a flow,
and what is compared is algorithms. RLPD needs a density: a squashed Gaussian. RECAP's flow takes the condition "advantage" and
begins with RECAP's own fine-tuning on the demonstrations instead of cloning.

Releases act deterministically on held-out starts that nobody trained on, 4 of 8 actions of a chunk.

Plan of time: an update of 64 windows took 37 ms of one core by HG-DAgger, 50 by RECAP, 67 by IQL, 144 by Q-chunking, 185 by
RLPD with ten critics (here it has five) and 216 by CO-RFT, measured beside other work and so at most; a step of the robot
with policy and physics 6 ms. With 1,500 updates of a start (one for each policy family), 2,000 after it, 3,000 steps of the
robot and 50 starts a task that is 3 to 9 minutes a method and seed, about three hours in all for 3 seeds on two cores.
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
from benchmarks.learning_methods import EVERY
from benchmarks.learning_rows import plot, rows_of
from benchmarks.learning_runs import run_all
from benchmarks.learning_scenarios import SCENARIOS, Counts
from benchmarks.results import FOLDER, Row, save
from fleet.errors import ConfigError
from fleet.lookup import nearest

FULL = Counts()
QUICK = Counts(start_steps=10, steps=20, env_steps=60, episodes=1, curve=1, curve_episodes=1, publish_every=5, first_start=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SCENARIOS), default=tuple(SCENARIOS))
    parser.add_argument(
        "--methods", nargs="+", default=[], help="default: those of each scenario, and only then rows are saved"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of demonstrations, weights, batches and starts")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--folder", type=Path, help="where runs stay, and finished ones are taken from; default: temporary")
    parser.add_argument("--quick", action="store_true", help="tiny counts; nothing is saved")
    parser.add_argument("--json", action="store_true", help="print the rows")
    args = parser.parse_args()
    for name in args.methods:
        if name not in EVERY:
            raise ConfigError(f"--methods {name!r}", rule="a method of the benchmark", remedy=nearest(name, EVERY))
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fleet-learning-"))
    every: list[Row] = []
    try:
        for key in args.only:
            every += measure(key, folder, args)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in every], indent=1) + "\n")


def measure(key: str, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Rows of one scenario; saved, with the picture, where all of it was measured."""
    scenario, counts = SCENARIOS[key], QUICK if args.quick else FULL
    names = [name for name in scenario.methods if not args.methods or name in args.methods]
    outcomes = run_all(scenario, names, counts, folder, seeds=args.seeds, workers=args.workers)
    rows = rows_of(scenario, outcomes)
    for row in rows:
        say(f"{key}, {row.what}: {row.value} {row.unit} {row.why}")
    if not args.quick and not args.methods:
        picture = FOLDER / f"learning_{key}.svg"
        plot(scenario, outcomes, picture)
        command = f"python -m benchmarks.learning --only {key} --seeds {args.seeds}"
        say(f"saved: {save(f'learning_{key}', rows, command)}, {picture}")
    return rows


if __name__ == "__main__":
    main()
