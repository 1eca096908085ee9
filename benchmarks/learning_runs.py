"""Methods and seeds run, several at a time, each in a process of its own; what was finished in a folder is not done again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.buffer_process import ENV, ROOT
from benchmarks.buffer_report import say
from benchmarks.learning_methods import EVERY, Method
from benchmarks.learning_scenarios import Counts, Scenario
from fleet.runfolder import RunFolder

LAST_WORDS = 300
COPIED = ("buffer", "releases", "checkpoints", "keys")


@dataclasses.dataclass
class Outcome:
    """What a process said of one method and seed, see ``learning_process``; or why it said nothing.

    rows: (task, episodes, successes, steps of the successful episodes in all). curve: (update, episodes, successes), from the
    first release to the last.
    """

    method: str
    seed: int
    rows: Sequence[tuple[str, int, int, int]] = ()
    curve: Sequence[tuple[int, int, int]] = ()
    learner_steps: int = 0
    gradient_steps: int = 0
    env_steps: int = 0
    policy_steps: int = 0
    operator_steps: int = 0
    demonstration_steps: int = 0
    train_s: float = 0.0
    robot_s: float = 0.0
    test_s: float = 0.0
    advice: str = ""
    why: str = ""

    @property
    def human_steps(self) -> int:
        return self.demonstration_steps + self.operator_steps

    def counts(self, tasks: Sequence[str] = ()) -> tuple[int, int, int]:
        """(episodes, successes, steps of the successful ones in all), of some tasks or of all."""
        chosen = [row for row in self.rows if not tasks or row[0] in tasks]
        episodes, successes, steps = (sum(row[i] for row in chosen) for i in (1, 2, 3))
        return episodes, successes, steps

    def rate(self, tasks: Sequence[str] = ()) -> float:
        """Percent of the episodes that succeeded."""
        episodes, successes, _ = self.counts(tasks)
        return 100 * successes / episodes


def run_all(
    scenario: Scenario, names: Sequence[str], counts: Counts, folder: Path, *, seeds: int, workers: int
) -> list[Outcome]:
    """Each method with each of the seeds 1 to ``seeds``; first the starts that they share."""
    methods, numbers = [EVERY[name] for name in names], range(1, seeds + 1)
    first = {(method.start_key, seed): method for method in methods for seed in numbers}
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda job: _start(scenario, job[1], counts, folder, job[0][1]), first.items()))
        starts = dict(zip(first, done, strict=True))

        def one(job: tuple[Method, int]) -> Outcome:
            method, seed = job
            return _continue(scenario, method, counts, folder, seed, starts[method.start_key, seed])

        return list(pool.map(one, [(method, seed) for seed in numbers for method in methods]))


def _start(scenario: Scenario, method: Method, counts: Counts, folder: Path, seed: int) -> Outcome:
    """The start policy that this method shares with others."""
    path = _start_folder(folder, scenario, method, seed)
    told = {"counts": dataclasses.asdict(counts), "demonstrations": scenario.demonstrations}
    first = next(other for other in (*EVERY.values(), method) if other.start_key == method.start_key)  # whoever is compared
    tables = scenario.start_tables(first, counts, seed)

    def prepare() -> None:
        RunFolder.create(path)

    return _run("start", path, f"start of {method.start_key}", seed, tables, told, prepare)


def _continue(scenario: Scenario, method: Method, counts: Counts, folder: Path, seed: int, start: Outcome) -> Outcome:
    """What comes after the start, in a copy of its run."""
    if start.why:
        return Outcome(method.name, seed, why=f"its start: {start.why}")
    if method.name == "bc":
        return _joined(start, dataclasses.replace(start, method="bc", curve=()), counts)
    path = folder / scenario.name / f"{_slug(method.name)}-{seed}"
    begun = _start_folder(folder, scenario, method, seed)
    told = {"counts": dataclasses.asdict(counts), "collect": method.collect}

    def prepare() -> None:
        RunFolder.create(path)
        shutil.copy(begun / "tasks.json", path / "tasks.json")
        for name in COPIED if method.demonstrations else COPIED[1:]:
            shutil.rmtree(path / name)
            shutil.copytree(begun / name, path / name)

    after = _run("method", path, method.name, seed, scenario.tables(method, counts, seed), told, prepare)
    return after if after.why else _joined(start, after, counts)


def _joined(start: Outcome, after: Outcome, counts: Counts) -> Outcome:
    """The start was a part of it: its test begins the curve, its demonstrations were given."""
    episodes, successes, _ = start.counts()
    last = [] if after.method == "bc" else [(after.learner_steps, *after.counts()[:2])]
    curve = [(counts.start_steps, episodes, successes), *after.curve, *last]
    return dataclasses.replace(after, curve=curve, demonstration_steps=start.demonstration_steps)


def _run(mode: str, path: Path, name: str, seed: int, tables: dict[str, Any], told: dict[str, Any], prepare: Any) -> Outcome:
    kept, config = path / "outcome.json", yaml.safe_dump(tables) + json.dumps(told)
    if kept.exists():
        found = json.loads(kept.read_text())
        if found.pop("config") == config:
            return Outcome(**found)
    shutil.rmtree(path, ignore_errors=True)
    prepare()
    (path / "run.yaml").write_text(yaml.safe_dump(tables))
    (path / "benchmark.json").write_text(json.dumps(told))
    try:
        outcome = Outcome(name, seed, **execute(mode, path))
    except RuntimeError as error:
        say(f"{name}, seed {seed}: {error}")
        return Outcome(name, seed, why=str(error))
    kept.write_text(json.dumps({**dataclasses.asdict(outcome), "config": config}))
    seconds = f"{outcome.train_s:.0f} s learner, {outcome.robot_s:.0f} s robot, {outcome.test_s:.0f} s tests"
    say(f"{name}, seed {seed}: {outcome.rate():.1f} %, {outcome.operator_steps} operator steps; {seconds}")
    return outcome


def execute(mode: str, path: Path) -> dict[str, Any]:
    """A process for one run folder.

    Returns:
        What it said.

    Raises:
        RuntimeError: It failed; with its last words.
    """
    command = [sys.executable, "-m", "benchmarks.learning_process", mode, str(path)]
    env = {**ENV, "OMP_NUM_THREADS": "1", "MUJOCO_GL": os.environ.get("MUJOCO_GL", "osmesa")}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-LAST_WORDS:])
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _start_folder(folder: Path, scenario: Scenario, method: Method, seed: int) -> Path:
    return folder / scenario.name / f"start-{method.start_key}-{seed}"


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")
