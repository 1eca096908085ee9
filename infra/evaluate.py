"""Success on held-out starts, with 95 % intervals: the number that every claim of learning rests on.

    table = evaluate(policy, "metaworld", {"max_steps": 200}, {task: embedding}, held_out_seeds(50), execute=4)

The starts come from ``fleet.seeds.HELD_OUT``, which no training episode draws from. The policy acts as on a robot, in
simulated time: it is as late as ``delay`` says, and an episode ends at its first success. The same arguments give the same
table.
Workers are spawned processes: a script that calls this needs ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from actors.plan import Chunking
from actors.robots import make_robot
from actors.safety import SafetyConfig
from algorithms.policies.registry import published
from fleet.errors import ConfigError, RobotError
from fleet.robot import Robot
from fleet.seeds import HELD_OUT
from fleet.spec import IMAGE_PREFIX
from infra.evaluate_episode import Conditions, EpisodeResult, Worker
from infra.intervals import wilson
from learner.tensor_file import dumps

_SEEDS_A_JOB = 5
MAX_STEPS = 2000  # a robot that never ends its episode is ended by us
Watch = Callable[[int], None]
"""Is told how many episodes are done; what it raises ends the evaluation."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Successes of one task, or of all: ``low`` and ``high`` are the Wilson 95 % interval of ``rate``, all in [0, 1]."""

    task: str
    num_episodes: int
    num_successes: int
    rate: float
    low: float
    high: float
    mean_steps: float


@dataclasses.dataclass(frozen=True)
class Table:
    """``rows``: one a task. ``total``: all episodes together. ``episodes``: in the order of tasks and seeds."""

    rows: tuple[Row, ...]
    total: Row
    episodes: tuple[EpisodeResult, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    policy: Any,
    robot_adapter: str,
    robot_settings: Mapping[str, Any],
    tasks: Mapping[str, np.ndarray],
    seeds: Sequence[int],
    *,
    execute: int,
    num_workers: int = 2,
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
    chunking: str = "execute",
    delay: int = 0,
    guidance: float = 1.0,
    sample: bool = False,
    instructions: Mapping[str, str] | None = None,
    ensemble_decay: float = Chunking.ensemble_decay,
    safety: SafetyConfig | None = None,
) -> Table:
    """Runs ``policy`` once from each seed of each task.

    Args:
        policy: Built by ``algorithms.policies.registry.build``.
        robot_adapter, robot_settings: What ``actors.robots.make_robot`` takes.
        tasks: Instruction embedding (E,) by task name.
        seeds: Reset seeds; ``fleet.seeds.held_out_seeds`` gives some.
        execute: Actions of each chunk that are executed before the next one is due, 1 to H.
        num_workers: Processes; 0 runs in this one.
        max_steps: Actions after which an episode that the robot has not ended is ended, and has failed.
        watch: Called after every few episodes.
        chunking: How chunks follow each other, one of ``actors.plan.MODES``.
        delay: Steps that pass from an observation to the chunk that was computed from it: a slow policy, in simulated time.
        guidance, sample: See ``actors.policy_inference.ActingPolicy``; what is drawn is a function of seed and step.
        instructions: Text by task, for policies that read it.
        ensemble_decay: See ``actors.plan.Chunking``.
        safety: What actions go through on their way to the robot; default: its bounds.

    Raises:
        ConfigError: A seed is not held out, ``execute`` or another setting is out of range, or there is nothing to do.
        PolicyError: The policy cannot drive this robot.
        RobotError: The robot cannot be built or driven, or cannot judge success itself.
    """
    _check(len(tasks), seeds, execute, policy.spec.horizon, delay)
    rule = Chunking(chunking, execute, ensemble_decay)
    how = Conditions(rule, delay, guidance, sample, max_steps, dict(instructions or {}), safety or SafetyConfig())
    setup = (policy.family, policy.config, bytes(dumps(published(policy))), robot_adapter, dict(robot_settings), how)
    jobs = [
        (task, np.asarray(embedding, np.float32), list(seeds[i : i + _SEEDS_A_JOB]))
        for task, embedding in tasks.items()
        for i in range(0, len(seeds), _SEEDS_A_JOB)
    ]
    episodes: list[EpisodeResult] = []
    with contextlib.closing(_run_here(setup, jobs) if num_workers == 0 else _run_in_workers(setup, jobs, num_workers)) as runs:
        for done in runs:
            episodes += done
            if watch is not None:
                watch(len(episodes))
    rows = tuple(_row(task, [e for e in episodes if e.task == task]) for task in tasks)
    return Table(rows, _row("all", episodes), tuple(episodes))


def _check(num_tasks: int, seeds: Sequence[int], execute: int, horizon: int, delay: int) -> None:
    if not num_tasks or not seeds or not 1 <= execute <= horizon or delay < 0:
        raise ConfigError(
            f"evaluation of {num_tasks} tasks, {len(seeds)} seeds, execute {execute}, delay {delay}",
            rule=f"at least one task and seed, execute 1 to the horizon {horizon}, delay not negative",
        )
    trained_on = [seed for seed in seeds if seed not in HELD_OUT]
    if trained_on:
        raise ConfigError(f"seed {trained_on[0]} may have been trained on", rule=f"held-out seeds lie in {HELD_OUT}")


def _row(task: str, episodes: Sequence[EpisodeResult]) -> Row:
    n, num_successes = len(episodes), sum(e.success for e in episodes)
    low, high = wilson(num_successes, n)
    return Row(task, n, num_successes, num_successes / n, low, high, sum(e.num_steps for e in episodes) / n)


_process: dict[str, Any] = {}  # of a worker process: its "setup", and its "worker" once the first job has come


def _start_process(setup: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # a batch of one is faster on one core, and the workers share the cores
    _process["setup"] = setup


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run_job(job: tuple[str, np.ndarray, list[int]]) -> list[EpisodeResult]:
    if "worker" not in _process:  # not in the initializer: there an error would lose its message
        _process["worker"] = Worker(*_process["setup"])
    episodes: list[EpisodeResult] = _process["worker"].run(job)
    return episodes


def _run_here(setup: tuple[Any, ...], jobs: Sequence[Any]) -> Generator[list[EpisodeResult]]:
    worker = Worker(*setup)
    try:
        for task, embedding, seeds in jobs:
            for seed in seeds:
                yield worker.run((task, embedding, [seed]))
    finally:
        worker.robot.close()


def _run_in_workers(setup: tuple[Any, ...], jobs: Sequence[Any], num_workers: int) -> Generator[list[EpisodeResult]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), context, _start_process, (setup,)) as pool:
        try:
            yield from pool.map(_run_job, jobs)
        except BrokenProcessPool as broken:
            raise RobotError("a process that ran evaluation episodes died", remedy="look at its last output above") from broken
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C, nobody wants the rest


def check_starts(adapter: str, settings: Mapping[str, Any], task: str) -> None:
    """Makes sure that a robot's starts can be told by a seed: without that, no start is held out.

    Raises:
        RobotError: It starts differently from one seed, or cannot be built or reset.
    """
    robot = make_robot(adapter, **settings)
    try:
        first, _, again = (_start(robot, task, seed) for seed in (HELD_OUT[0], HELD_OUT[1], HELD_OUT[0]))
    finally:
        robot.close()
    different = [name for name in first if not np.array_equal(first[name], again[name])]
    if different:
        raise RobotError(
            f"robot adapter {adapter!r} starts task {task!r} differently from one seed: {different}",
            rule="evaluation needs starts that a seed decides, or training may have seen them",
            remedy="set evaluator.adapter to a simulator that can do that, or evaluator.every=0",
        )


def _start(robot: Robot, task: str, seed: int) -> dict[str, np.ndarray]:
    obs = robot.reset(task, seed)
    return {name: np.array(value) for name, value in obs.items() if not name.startswith(IMAGE_PREFIX)}
