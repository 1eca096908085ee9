"""Families trained and tested, two at a time, and the rows of the table."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.buffer_process import ENV, ROOT
from benchmarks.buffer_report import measured, missing, say
from benchmarks.policies_cases import Case
from benchmarks.policies_data import run_beside
from benchmarks.results import Row
from fleet.runfolder import RunFolder
from infra.intervals import wilson

NEAR_BEST = 10.0  # points of success within which every family should be of the best one
LAST_WORDS = 300


@dataclasses.dataclass
class Outcome:
    """What a process said of one case and seed, see ``benchmarks.policies_process``; or why it said nothing.

    rows: (task, episodes, successes, mean steps) by task, all tasks together last.
    """

    case: str
    seed: int
    train_s: float = 0.0
    test_s: float = 0.0
    parameters: int = 0
    inference_ms: Sequence[float] = ()
    rows: Sequence[tuple[str, int, int, float]] = ()
    why: str = ""

    @property
    def rate(self) -> float:
        """Percent of all episodes that succeeded."""
        return 100 * self.rows[-1][2] / self.rows[-1][1]


def learn(
    demonstrations: RunFolder, cases: Sequence[Case], folder: Path, *, seeds: int, episodes: int, first_start: int, workers: int
) -> list[Outcome]:
    """Each case with each seed in a process of its own, ``workers`` at a time.

    Args:
        episodes, first_start: Held-out starts a task, and the number of the first.
    """

    def one(job: tuple[Case, int]) -> Outcome:
        case, seed = job
        run = run_beside(demonstrations, run_folder(folder, case.name, seed))
        return _outcome(run, case, seed, {"episodes": episodes, "first": first_start})

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, [(case, seed) for seed in range(1, seeds + 1) for case in cases]))


def run_folder(folder: Path, case: str, seed: int) -> Path:
    """Where the run of a case lies."""
    return folder / f"{case.replace(', ', '-').replace(' ', '-')}-{seed}"


def _outcome(run: RunFolder, case: Case, seed: int, counts: dict[str, int]) -> Outcome:
    (run.path / "benchmark.json").write_text(json.dumps({**case.settings(seed), **counts}))
    command = [sys.executable, "-m", "benchmarks.policies_process", str(run.path)]
    env = {**ENV, "OMP_NUM_THREADS": "1", "MUJOCO_GL": os.environ.get("MUJOCO_GL", "osmesa")}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.split())[-LAST_WORDS:]
        say(f"{case.name}, seed {seed}: {why}")
        return Outcome(case.name, seed, why=why)
    outcome = Outcome(case.name, seed, **json.loads(done.stdout.splitlines()[-1]))
    tasks = ", ".join(f"{task.removesuffix('-v3')} {won}/{num}" for task, num, won, _ in outcome.rows[:-1])
    seconds = f"{outcome.train_s:.0f} processor s of training, {outcome.test_s:.0f} of tests"
    say(f"{case.name}, seed {seed}: {outcome.rate:.1f} %, {seconds}; {tasks}")
    return outcome


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Success with its interval, by family and the best first; then parameters, training seconds and inference."""
    by_case: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_case.setdefault(outcome.case, []).append(outcome)
    known = {name: [o for o in each if o.rows] for name, each in by_case.items()}
    rates = {name: statistics.mean(o.rate for o in each) for name, each in known.items() if each}
    rows = [_success(name, known[name], max(rates.values())) for name in sorted(rates, key=lambda name: -rates[name])]
    for name, each in by_case.items():
        if name not in rates:
            rows.append(missing(f"{name}: success", "%", each[0].why))
    for name in rates:
        each = known[name]
        rows.append(Row(f"{name}: parameters", round(each[0].parameters / 1e6, 2), "million", repeats=len(each)))
        rows.append(measured(f"{name}: training, one thread", [o.train_s for o in each], "processor s"))
        rows.append(measured(f"{name}: inference, batch 1, one thread", [ms for o in each for ms in o.inference_ms], "ms", 2))
    return rows + [_by_task(name, known[name]) for name in rates if len(known[name][0].rows) > 2]


def _success(name: str, outcomes: Sequence[Outcome], best: float) -> Row:
    num, won = (sum(o.rows[-1][i] for o in outcomes) for i in (1, 2))
    low, high = wilson(won, num)
    seeds = f" (seeds {', '.join(f'{o.rate:.1f}' for o in outcomes)})" if len(outcomes) > 1 else ""
    row = Row(f"{name}: success of {num} starts{seeds}", round(100 * won / num, 1), "%", repeats=len(outcomes))
    row.low, row.high = round(100 * low, 1), round(100 * high, 1)
    row.target, row.met = f"within {NEAR_BEST:g} points of the best", 100 * won / num >= best - NEAR_BEST
    return row


def _by_task(name: str, outcomes: Sequence[Outcome]) -> Row:
    """The weakest task, and all of them in words."""
    seeds = zip(*(o.rows[:-1] for o in outcomes), strict=True)
    won = {rows[0][0]: (sum(r[2] for r in rows), sum(r[1] for r in rows)) for rows in seeds}
    told = ", ".join(f"{task.removesuffix('-v3')} {100 * n / of:.0f}" for task, (n, of) in won.items())
    worst = min(won, key=lambda task: won[task][0] / won[task][1])
    n, of = won[worst]
    low, high = wilson(n, of)
    row = Row(f"{name}: weakest task ({told})", round(100 * n / of, 1), "%", repeats=len(outcomes))
    row.low, row.high = round(100 * low, 1), round(100 * high, 1)
    return row
