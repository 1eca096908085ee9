"""What causes the rise in the demo? HG-DAgger against the same updates without new data, and against as many extra
plain demonstration steps as the operator gave.

    python -m benchmarks.attribution --seeds 3            # about 25 minutes on 2 cores

A run that was finished is not made again: delete runs/attribution to start anew.

Every arm is a whole run of the demo's system: own processes, wire, log, learner. Arms of one seed share the seed of
demonstrations, weights and batches. Success is measured on the same held-out starts. Intervals: over seeds, Student's t.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

from benchmarks.results import Row, save
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from infra.demo import DEMONSTRATOR, Demo, prepare_demo
from infra.evaluation import evaluate_release
from infra.report import latency_table
from infra.results import success_rate
from infra.sim import sim_child

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t by number of seeds
LATE_S = 0.5
HG_DAGGER, LATE = "hg_dagger", "hg_dagger, operator 0.5 s late"
NO_NEW_DATA, MORE_DEMONSTRATIONS = "same updates, no new data", "more demonstrations"
ARMS = (HG_DAGGER, LATE, NO_NEW_DATA, MORE_DEMONSTRATIONS)


@dataclasses.dataclass
class Outcome:
    """One run: success rates in [0, 1], and what it cost."""

    arm: str
    seed: int
    start: float
    final: float
    operator_steps: int
    demonstration_steps: int
    robot_steps: int
    updates: int
    wall_s: float
    latencies: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def run_arm(arm: str, seed: int, folder: Path, operator_steps: int, episodes: int, overrides: list[str]) -> Outcome:
    """One run of the system. ``operator_steps``: what HG-DAgger's operator gave with this seed (for "more demonstrations")."""
    kept = folder / "outcome.json"
    if kept.exists():
        return Outcome(**json.loads(kept.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"learner.seed={seed}", f"actor.seed={seed}", *overrides]
    if arm == LATE:
        settings.append(f"operator.settings.reaction_s={LATE_S}")
    if arm in (NO_NEW_DATA, MORE_DEMONSTRATIONS):
        settings += ["demo.num_robots=0", "learner.samples_per_insert=0"]
    demo = prepare_demo(folder, None, settings)
    started = time.monotonic()
    try:
        demo.local.start()
        demo.demonstrate(_quiet)
        demo.train_start(_quiet)
        if arm == MORE_DEMONSTRATIONS:
            _demonstrate_more(demo, operator_steps)
        demo.work(_quiet)
    finally:
        demo.local.stop()
    demo.facts.update()
    outcome = _measure(demo, arm, seed, episodes, time.monotonic() - started)
    kept.write_text(json.dumps(dataclasses.asdict(outcome)))
    return outcome


def _quiet() -> None:
    """No live view."""


def _demonstrate_more(demo: Demo, num_steps: int) -> None:
    """Plain demonstrations in turn over the tasks until they have ``num_steps`` steps more than the start had."""
    before, round_number = demo.facts.demo_steps, 0
    while demo.facts.demo_steps - before < num_steps:
        mean_length = max(demo.facts.demo_steps / max(demo.facts.demo_episodes, 1), 1)
        missing = math.ceil((num_steps - (demo.facts.demo_steps - before)) / mean_length)
        settings = {
            **demo.tables["operator"].settings,
            "mode": "demonstrate",
            "budget_steps": None,
            "task_budget_steps": None,
            "reaction_s": 0.0,
        }
        actor = {"demonstrate": True, "realtime": False, "num_episodes": missing, "first_task": round_number}
        name = f"{DEMONSTRATOR}-{round_number}"
        child = sim_child(demo.run, name, {"operator": {"settings": settings}, "actor": actor}, [], once=True)
        demo.local.supervisor.add(child)
        demo.wait_until(lambda child=child: child.done, _quiet)
        demo.facts.update()
        round_number += 1


def _measure(demo: Demo, arm: str, seed: int, episodes: int, wall_s: float) -> Outcome:
    run: RunFolder = demo.run
    versions = ReleaseStore(run.releases).versions()
    for version, label in ((versions[0], "start"), (versions[-1], "final")):
        evaluate_release(run.path, version, episodes, label=label)
    start, final = success_rate(run, "start"), success_rate(run, "final")
    facts = demo.facts
    return Outcome(
        arm,
        seed,
        start[0] if start else math.nan,
        final[0] if final else math.nan,
        facts.operator_steps,
        facts.demo_steps,
        facts.steps - facts.demo_steps,
        ReleaseStore(run.releases).manifest(versions[-1]).step,
        wall_s,
        latency_table(run),
    )


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """Student's t 95 % interval of the mean over seeds."""
    if len(values) < 2:
        return None, None
    half = T_975.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return round(mean - half, 2), round(mean + half, 2)


def rows_of(outcomes: list[Outcome]) -> list[Row]:
    """The table: start and end of each arm, what it cost, paired differences, and the latency chain."""
    by_arm: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_arm.setdefault(outcome.arm, []).append(outcome)
    rows = [row for arm, runs in by_arm.items() for row in [*_success_rows(arm, runs), *_cost_rows(arm, runs)]]
    base = {run.seed: run for run in by_arm.get(HG_DAGGER, [])}
    for arm in (NO_NEW_DATA, MORE_DEMONSTRATIONS):
        differences = [100 * (base[run.seed].final - run.final) for run in by_arm.get(arm, []) if run.seed in base]
        if differences:
            rows.append(_mean_row(f"{HG_DAGGER} minus '{arm}', paired", differences, "points"))
    return rows + _latency_rows(list(base.values()))


def _mean_row(what: str, values: list[float], unit: str) -> Row:
    low, high = interval(values)
    if unit == "%" and low is not None and high is not None:
        low, high = max(low, 0.0), min(high, 100.0)
    return Row(what, round(statistics.mean(values), 2), unit, low, high, len(values))


def _success_rows(arm: str, runs: list[Outcome]) -> list[Row]:
    rows = []
    for key in ("start", "final"):
        values = [100 * getattr(run, key) for run in runs]
        row = _mean_row(f"{arm}: success {key} (seeds {', '.join(f'{value:.1f}' for value in values)})", values, "%")
        if arm == HG_DAGGER and key == "start":
            row.target, row.met = "<= 55", statistics.mean(values) <= 55
        elif arm == HG_DAGGER:
            row.target, row.met = ">= 95, no seed under 92", statistics.mean(values) >= 95 and min(values) >= 92
        rows.append(row)
    return rows


def _cost_rows(arm: str, runs: list[Outcome]) -> list[Row]:
    steps = [run.operator_steps for run in runs]
    operator = _mean_row(f"{arm}: operator steps (most {max(steps)})", [float(n) for n in steps], "steps")
    if arm.startswith(HG_DAGGER):
        operator.target, operator.met = "<= 3000", max(steps) <= 3000
    keys = {"demonstration_steps": "steps", "robot_steps": "steps", "updates": "updates", "wall_s": "s"}
    return [
        operator,
        *(_mean_row(f"{arm}: {key}", [float(getattr(run, key)) for run in runs], unit) for key, unit in keys.items()),
    ]


def _latency_rows(runs: list[Outcome]) -> list[Row]:
    """Percentiles within each run; the worst run is reported."""
    rows = []
    for chain in ("durable", "sampleable", "loaded"):
        for q in ("p50", "p95", "p99"):
            values = [run.latencies[chain][q] for run in runs if run.latencies.get(chain, {}).get(q) is not None]
            if not values:
                continue
            row = Row(f"{HG_DAGGER}: {chain} latency {q}, worst seed", round(max(values), 1), "ms", repeats=len(values))
            if q == "p99" and chain != "durable":
                row.target, row.met = "< 2000 ms", max(values) < 2000
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=50, help="held-out starts a task")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--folder", type=Path, default=Path("runs/attribution"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides, table.key=value")
    parser.add_argument("--json", action="store_true", help="print the rows")
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    for seed in range(1, args.seeds + 1):
        given = 0
        for arm in args.arms:
            outcome = run_arm(arm, seed, args.folder / f"seed{seed}-arm{ARMS.index(arm)}", given, args.episodes, args.set)
            given = outcome.operator_steps if arm == HG_DAGGER else given
            outcomes.append(outcome)
            sys.stderr.write(f"seed {seed}, {arm}: {100 * outcome.start:.1f} -> {100 * outcome.final:.1f} %, "
                             f"{outcome.operator_steps} operator steps, {outcome.wall_s:.0f} s\n")  # fmt: skip
            sys.stderr.flush()
    rows = rows_of(outcomes)
    path = save("attribution", rows, "python -m benchmarks.attribution " + " ".join(sys.argv[1:]))
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    main()
