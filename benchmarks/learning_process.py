"""One method with one seed: robot and learner in lockstep, then its releases tested on held-out starts.

    python -m benchmarks.learning_process start|method RUN

``start``: demonstrations, the first updates, a test of the first release. ``method``: what comes after them, in a copy of
that run. RUN holds run.yaml, and in benchmark.json the counts and the method. Prints one line of JSON. One thread.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.learning_robot import FRAGMENT_STEPS, LockstepRobot, await_release
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Windows
from fleet.errors import NoData
from fleet.identity import create_run_keys
from fleet.journal import Journal
from fleet.robot import Source
from fleet.runfolder import RunFolder
from fleet.seeds import CONTINUAL, held_out_seeds
from fleet.server.releases import ReleaseStore
from infra.evaluation import evaluate_version
from infra.run_config import load_tables, write_catalogue
from learner.progress import Progress

MOST_TRIES = 5  # episodes for each demonstration that is wanted
DEMONSTRATOR, ROBOT = "demonstrator", "robot"
COUNTED = {"demonstration": Source.DEMO, "operator": Source.OPERATOR, "policy": Source.POLICY}


class Plan:
    """Who does what when: a function of the learner's step.

    Args:
        counts: Fields of ``learning_scenarios.Counts``.
        collect: Of the method.
    """

    def __init__(self, counts: Mapping[str, int], collect: str) -> None:
        self.start, self._steps = counts["start_steps"], counts["steps"]
        self.env_steps = 0 if collect == "never" else counts["env_steps"]
        self._collect, self._publish_every = collect, counts["publish_every"]

    def due(self, step: int) -> int:
        """Steps that the robot has made in all when the batch of this update is drawn."""
        if step < self.start:
            return 0
        share = 1.0 if self._collect == "first" else (step + 1 - self.start) / self._steps
        return round(share * self.env_steps)

    def released(self, step: int) -> int:
        """The update whose release is the newest one when the batch of this update is drawn."""
        return max(self.start, step // self._publish_every * self._publish_every)


class LockstepSampler(Sampler):
    """A sampler before each of whose batches a robot makes the steps that are due by then.

    Args:
        robot: None: nobody works.

    Attributes:
        robot_s: Processor seconds of the robot's work.
    """

    def __init__(self, run: RunFolder, tasks: list[str], seed: int, plan: Plan, robot: LockstepRobot | None) -> None:
        super().__init__(run.buffer, tasks, seed)
        self._plan, self._robot, self._store, self.robot_s = plan, robot, ReleaseStore(run.releases), 0.0

    def begin(self) -> None:
        """Takes in what is there; where nothing is, the robot begins: the learner does not start without data."""
        self.poll()
        if not self.num_steps():
            self._work(FRAGMENT_STEPS, self._plan.start)

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        if step >= self._plan.start:  # also without a robot: of two releases that wait for the disk only one is written
            await_release(self._store, self._plan.released(step))
        self._work(self._plan.due(step), step)
        while True:
            try:
                return super().batch(needs, step, newest_version)
            except NoData:  # of that kind, yet: then the robot does sooner what it does anyway
                if self._robot is None or step < self._plan.start or self._robot.counters.steps >= self._plan.env_steps:
                    raise
                self._work(self._robot.counters.steps + FRAGMENT_STEPS, step)

    def _work(self, num_steps: int, step: int) -> None:
        if self._robot is None:
            return
        began, missing = time.process_time(), min(num_steps, self._plan.env_steps) - self._robot.counters.steps
        if missing > 0:
            self._robot.take_release(self._plan.released(step))
            self._robot.work(missing)
            self.poll()
        self.robot_s += time.process_time() - began


def demonstrate(run: RunFolder, tables: Mapping[str, Any], catalogue: Mapping[str, Any], num_each: int) -> None:
    """Fills the log with so many successful demonstrations a task.

    Raises:
        RuntimeError: The expert fails too often.
    """
    task_of = dict.fromkeys(catalogue, 0)

    def keep(task: str, outcome: str) -> bool:
        wanted = outcome == "success" and task_of[task] < num_each
        task_of[task] += wanted
        return wanted

    robot = LockstepRobot(run, DEMONSTRATOR, tables, catalogue, keep)
    try:
        while min(task_of.values()) < num_each:
            if robot.counters.episodes >= MOST_TRIES * num_each * len(task_of):
                raise RuntimeError(f"successful demonstrations after {robot.counters.episodes} episodes: {task_of}")
            robot.work(FRAGMENT_STEPS)
    finally:
        robot.close()


def learn(run: RunFolder, tables: Mapping[str, Any], catalogue: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The learner's loop from the newest checkpoint to the end, with a robot beside it where the plan has one."""
    from learner.train import make_loop

    facts: dict[str, Any] = {"gradient_steps": 0}

    def count(*_: Any) -> None:
        facts["gradient_steps"] += 1

    with contextlib.ExitStack() as stack:
        journal = Journal(run.logs / "learner.jsonl")
        stack.callback(journal.close)
        robot = None
        if plan.env_steps:
            robot = LockstepRobot(run, ROBOT, tables, catalogue)
            stack.callback(robot.close)
        sampler = LockstepSampler(run, list(catalogue), tables["learner"].seed, plan, robot)
        stack.callback(sampler.close)
        sampler.begin()
        instructions_KE = torch.tensor([entry["embedding"] for entry in catalogue.values()], dtype=torch.float32)
        named = {task: str(entry["instruction"]) for task, entry in catalogue.items()}
        loop = make_loop(run, tables, sampler, sampler.specs, instructions_KE, journal, _ignore, named)
        stack.callback(register_optimizer_step_post_hook(count).remove)
        began = time.process_time() - sampler.robot_s
        progress = loop.run(lambda: False)
        facts |= {"train_s": time.process_time() - began - sampler.robot_s, "robot_s": sampler.robot_s}
        facts |= {"learner_steps": progress.step, "advice": progress.advice}
        facts |= {f"{name}_steps": sampler.num_steps(source) for name, source in COUNTED.items()}
        facts["env_steps"] = robot.counters.steps if robot is not None else 0
    return facts


def _ignore(progress: Progress) -> None:
    """Nobody watches."""


def try_releases(run: RunFolder, counts: Mapping[str, int], *, curve: bool) -> dict[str, Any]:
    """Success of the newest release by task, and of some between the first and it.

    Returns:
        ``rows``: (task, episodes, successes, steps of the successful ones in all). ``curve``: (update, episodes, successes).
    """
    store, began = ReleaseStore(run.releases), time.process_time()
    versions = store.versions()
    seeds = held_out_seeds(counts["episodes"], first=counts["first_start"])
    table = evaluate_version(run, versions[-1], "final", seeds, workers=0)
    steps = collections.Counter({row.task: 0 for row in table.rows})
    for episode in table.episodes:
        steps[episode.task] += episode.num_steps if episode.success else 0
    points = []
    for number in range(1, counts["curve"] + 1) if curve and len(versions) > 2 else ():
        version = versions[round(number * (len(versions) - 1) / (counts["curve"] + 1))]
        seeds = held_out_seeds(counts["curve_episodes"], first=CONTINUAL)
        total = evaluate_version(run, version, "release", seeds, workers=0).total
        points.append((store.manifest(version).step, total.num_episodes, total.num_successes))
    rows = [(row.task, row.num_episodes, row.num_successes, steps[row.task]) for row in table.rows]
    return {"rows": rows, "curve": points, "test_s": time.process_time() - began}


def perform(mode: str, run: RunFolder) -> dict[str, Any]:
    """All of it: the facts that ``main`` prints. ``mode`` as in the header."""
    told = json.loads((run.path / "benchmark.json").read_text())
    tables, counts = load_tables(run.config, []), told["counts"]
    if mode == "start":
        create_run_keys(run.keys)
        catalogue = write_catalogue(run, tables["run"])
        demonstrate(run, tables, catalogue, told["demonstrations"])
        plan = Plan(counts, "never")
    else:
        catalogue = json.loads((run.path / "tasks.json").read_text())
        plan = Plan(counts, told["collect"])
    return {**learn(run, tables, catalogue, plan), **try_releases(run, counts, curve=mode == "method")}


def main() -> None:
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(perform(sys.argv[1], RunFolder.open(Path(sys.argv[2])))) + "\n")


if __name__ == "__main__":
    main()
