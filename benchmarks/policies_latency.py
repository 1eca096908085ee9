"""What it costs when chunks come late, by how they follow each other: success, and how much actions jump between chunks.

A flow policy with chunks of 16 actions, 4 of each executed, in simulated time: a chunk is there ``delay`` steps of the robot
after the observation that it was computed from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.buffer_report import missing, say
from benchmarks.policies_cases import CHUNK_CASES, CHUNK_TASKS
from benchmarks.policies_data import MAX_STEPS, MT10, make_demonstrations, tasks_of
from benchmarks.policies_learn import learn, run_folder
from benchmarks.policies_process import released_policy
from benchmarks.results import Row
from fleet.runfolder import RunFolder
from fleet.seeds import held_out_seeds

DELAYS, EXECUTE = (0, 2, 4), 4
PLAIN, TRAINED = (case.name for case in CHUNK_CASES)
WAYS = ((PLAIN, "execute"), (PLAIN, "ensemble"), (PLAIN, "async"), (TRAINED, "async"))


def measure_latency(folder: Path, counts: Any, workers: int) -> list[Row]:
    """Rows of each way and delay."""
    tasks = {task: MT10[task] for task in CHUNK_TASKS}
    demonstrations = make_demonstrations(folder / "demonstrations-latency", tasks, counts.demonstrations[0])
    runs = folder / "latency"
    episodes, first = counts.episodes[0], counts.first_start
    cases = [case.shortened(counts.steps) for case in CHUNK_CASES]
    trained = learn(demonstrations, cases, runs, seeds=1, episodes=1, first_start=0, workers=workers)
    rows = []
    for outcome in trained:
        if outcome.why:
            rows.append(missing(f"{outcome.case}: late chunks", "%", outcome.why))
            continue
        policy = released_policy(RunFolder.open(run_folder(runs, outcome.case, 1)))
        for name, chunking in WAYS:
            if name == outcome.case:
                for delay in DELAYS:
                    say(f"{name}, {chunking}, late by {delay}")
                    rows += _of_way(policy, demonstrations, name, chunking, delay, held_out_seeds(episodes, first), workers)
    return rows


def _of_way(policy: Any, run: RunFolder, name: str, chunking: str, delay: int, seeds: list[int], workers: int) -> list[Row]:
    from infra.evaluate import evaluate

    settings, tasks = {"max_steps": MAX_STEPS}, tasks_of(run)
    table = evaluate(
        policy,
        "metaworld",
        settings,
        tasks,
        seeds,
        execute=EXECUTE,
        num_workers=workers,
        chunking=chunking,
        delay=delay,
    )
    what, total = f"{name}, {chunking}, late by {delay} steps", table.total
    success = Row(f"{what}: success of {total.num_episodes} starts", round(100 * total.rate, 1), "%")
    success.low, success.high = round(100 * total.low, 1), round(100 * total.high, 1)
    means = {
        key: sum(getattr(episode, key) for episode in table.episodes) / len(table.episodes)
        for key in ("border_change", "other_change", "num_held")
    }
    return [
        success,
        Row(f"{what}: largest change of an action where a chunk begins", round(means["border_change"], 3), "of [-1, 1]"),
        Row(f"{what}: elsewhere", round(means["other_change"], 3), "of [-1, 1]"),
        Row(f"{what}: steps without an action, an episode", round(means["num_held"], 2), "steps"),
    ]
