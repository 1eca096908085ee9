"""The learner: how long it waits for data, what releases and checkpoints cost it, and engines and ranks compared.

    python -m benchmarks.learner                    # all, about 15 minutes on 2 quiet cores
    python -m benchmarks.learner --quick            # all in 5 minutes, with rough numbers that are not saved
    python -m benchmarks.learner --only wait stall

Each row is a learner process (or several ranks) on a log that nobody writes to: the sampler, prefetching, decoding and the
loop are those of a run. The 25 M parameter policy sees two 128 x 128 cameras; ranks meet over gloo on the CPU, each with
one torch thread. "data wait" is the time in which the loop has no batch yet; a share is of the wall time of the steps.
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
from typing import Any

from benchmarks.buffer_limits import memcpy_bytes_per_s
from benchmarks.buffer_report import measured, missing, say
from benchmarks.learner_runs import BATCH, IMAGE, MLP, Measured, make_run, policy_settings, train
from benchmarks.results import Row, save
from fleet.runfolder import RunFolder
from learner.main import LearnerConfig

PARTS = ("wait", "stall", "engines", "curves")
CURVE_STEPS = 300
SHARE_TARGET = 5.0  # percent
ENGINES = {
    "torch": ({"name": "torch"}, (1,)),
    "ddp": ({"name": "ddp"}, (1, 2)),
    "deepspeed ZeRO-1": ({"name": "deepspeed", "zero_stage": 1}, (1, 2)),
    "deepspeed ZeRO-2": ({"name": "deepspeed", "zero_stage": 2}, (1, 2)),
    "deepspeed ZeRO-3": ({"name": "deepspeed", "zero_stage": 3}, (1, 2)),
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much is measured. ``batch``: of the image policy, whose steps are long."""

    repeats: int
    log_steps: int
    steps: dict[str, int]
    batch: int
    engine_policies: tuple[str, ...]


FULL = Counts(3, 4000, {MLP: 1200, IMAGE: 18}, 32, (MLP,))
QUICK = Counts(1, 800, {MLP: 300, IMAGE: 12}, 32, (MLP,))


def settings_for(policy: str, counts: Counts, engine: dict[str, Any] | None = None, **learner: Any) -> dict[str, Any]:
    """Tables of a run on a frozen log; nothing is published or checkpointed unless ``learner`` says when."""
    steps = counts.steps[policy]
    often = {"publish_every": 10**9, "checkpoint_every": 10**9, **learner}
    plain = {"start_steps": 0, "metrics_port": -1, "device": "cpu", "steps": steps, "min_size_to_sample": 1}
    batch = BATCH if policy == MLP else counts.batch
    return {
        **policy_settings(policy),
        "learner": {**plain, **often},
        "engine": engine or {},
        "algorithm": {"name": "hg_dagger", "config": {"batch_size": batch}},
    }


def share(what: str, values: list[float]) -> Row:
    """Percent of the steps' time, against the target."""
    row = measured(what, values, "%", 2)
    row.target, row.met = f"< {SHARE_TARGET:g} %", row.value is not None and row.value < SHARE_TARGET
    return row


def measure_wait(folder: Path, counts: Counts) -> list[Row]:
    """How long the loop has no batch."""
    rows = []
    for policy, codec in ((MLP, "raw"), (IMAGE, "raw"), (IMAGE, "jpeg")):
        name = policy if policy == MLP else f"{policy}, {codec} images, batch {counts.batch}"
        run = make_run(folder / f"{codec}-{policy.replace(' ', '-')}", counts.log_steps, codec)
        settings = settings_for(policy, counts)
        warm = counts.steps[policy] // 6
        seen = [train(run, settings, warm=warm) for _ in range(counts.repeats)]
        waited = [m.seconds["sample"] + m.seconds["wait"] for m in seen]
        rows.append(share(f"data wait, {name}", [100 * s / m.wall_s for s, m in zip(waited, seen, strict=True)]))
        rows.append(measured(f"step, {name}", [1000 * m.step_s for m in seen], "ms", 2))
        for part in ("forward", "backward", "optimizer", "after_step"):
            rows.append(measured(f"of it {part}", [1000 * m.seconds[part] / m.steps for m in seen], "ms", 2))
        shutil.rmtree(run.path)
    return rows


def measure_stall(folder: Path, counts: Counts) -> list[Row]:
    """What releases and checkpoints cost, on the loop's thread and in longer steps beside them. They are made more often than
    in a run, and counted at the run's cadence."""
    rows, cadence = [], LearnerConfig()
    run = make_run(folder / "stall", counts.log_steps)
    for policy in (MLP, IMAGE):
        every = (
            {"publish_every": 100, "checkpoint_every": 500} if policy == MLP else {"publish_every": 4, "checkpoint_every": 12}
        )
        every = {key: min(value, counts.steps[policy] // 3) for key, value in every.items()}
        pairs = []
        for _ in range(counts.repeats):
            plain = train(run, settings_for(policy, counts), warm=2)
            pairs.append((plain, train(run, settings_for(policy, counts, **every), warm=2)))
        for part, key in (("publish", "publish_every"), ("checkpoint", "checkpoint_every")):
            each = [m.seconds[part] / max(m.due(every[key]), 1) for _, m in pairs]
            at = getattr(cadence, key)
            rows.append(measured(f"{part}, stall each, {policy}", [1000 * s for s in each], "ms", 2))
            what = f"{part}, stall as a share of a step's time at one in {at}, {policy}"
            rows.append(share(what, [100 * s / at / plain.step_s for s, (plain, _) in zip(each, pairs, strict=True)]))
        slower = [100 * (both.step_s / plain.step_s - 1) for plain, both in pairs]
        row = measured(f"steps are longer with one release in {every['publish_every']}", slower, "%", 1)
        row.what += f" and one checkpoint in {every['checkpoint_every']}, {policy}"
        rows.append(row)
    return rows


def measure_engines(folder: Path, counts: Counts) -> list[Row]:
    """Steps a second of the same global batch."""
    rows = []
    run = make_run(folder / "engines", counts.log_steps)
    for policy in counts.engine_policies:
        for name, (engine, sizes) in ENGINES.items():
            for ranks in sizes:
                what = f"{name}, {ranks} rank{'s' * (ranks > 1)}, {policy}"
                rows.append(_engine_row(run, what, settings_for(policy, counts, engine), ranks, counts.repeats))
    return rows


def measure_curves(folder: Path, counts: Counts) -> list[Row]:
    """How far the loss of any of the first updates of the demo's policy is from that of plain torch with one rank and passes
    of as many samples. Passes of another size round otherwise, and where a ReLU or an L1 loss turns that grows: a row says
    how far plain torch is from itself then."""
    rows, curves = [], {}
    run = make_run(folder / "curves", counts.log_steps)
    halves = {"name": "torch", "micro_batch": BATCH // 2}
    for name, (engine, sizes) in {**ENGINES, "torch in halves": (halves, (1,))}.items():
        for ranks in sizes:
            settings = settings_for(MLP, counts, engine, steps=CURVE_STEPS)
            curves[name, ranks] = train(run, settings, warm=2, ranks=ranks, curve=True).losses
    for (name, ranks), mine in curves.items():
        if name == "torch":
            continue
        against = "torch in halves" if ranks == 2 else "torch"
        plain = curves[against, 1]
        assert set(mine) == set(plain) and len(mine) == CURVE_STEPS
        apart = max(abs(mine[step] / plain[step] - 1) for step in plain)
        what = f"loss curve, {name}, {ranks} rank{'s' * (ranks > 1)}: furthest from {against} in {CURVE_STEPS} updates"
        rows.append(measured(what, [100 * apart], "%", 6))
    ends = [curves["torch", 1][str(step)] for step in (1, CURVE_STEPS)]
    rows.append(measured(f"loss of torch, update {CURVE_STEPS} over update 1", [ends[1] / ends[0]], "", 3))
    return rows


def _engine_row(run: RunFolder, what: str, settings: dict[str, Any], ranks: int, repeats: int) -> Row:
    seen: list[Measured] = []
    try:
        for _ in range(repeats):
            seen.append(train(run, settings, warm=settings["learner"]["steps"] // 6, ranks=ranks))
    except RuntimeError as error:
        return missing(what, "steps/s", str(error))
    return measured(what, [1 / m.step_s for m in seen], "steps/s", 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small counts, once; nothing is saved")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="where data lies during the run; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="print the rows")
    args = parser.parse_args()
    counts, command = QUICK if args.quick else FULL, "python -m benchmarks.learner " + " ".join(sys.argv[1:])
    parts = {"wait": measure_wait, "stall": measure_stall, "engines": measure_engines, "curves": measure_curves}
    limit = f"memcpy {memcpy_bytes_per_s() / 1e9:.1f} GB/s, {os.cpu_count()} cores"
    every: list[Row] = []
    for part in args.only:
        folder = Path(tempfile.mkdtemp(prefix=f"fleet-learner-{part}-", dir=args.folder))
        try:
            rows = parts[part](folder, counts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for row in rows:
            row.limit = limit
            say(f"{row.what}: {row.value} {row.unit} {row.target and f'(target {row.target}: {row.met})'}{row.why}")
        if not args.quick:
            say(f"saved: {save(f'learner_{part}', rows, command.strip())}")
        every += rows
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in every], indent=1) + "\n")


if __name__ == "__main__":
    main()
