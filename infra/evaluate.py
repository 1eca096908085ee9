"""Success on held-out starts, with 95 % intervals: the number that every claim of learning rests on.

    table = evaluate(policy, "metaworld", {"max_steps": 200}, {task: embedding}, held_out_seeds(50), execute=4)

The starts come from ``fleet.seeds.HELD_OUT``, which no training episode draws from. The policy acts deterministically, in
simulated time (it is never late), and an episode ends at its first success. The same arguments give the same table.
Workers are spawned processes: a script that calls this needs ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from actors.robots import make_robot
from algorithms.policies.base import INSTRUCTION
from algorithms.policies.registry import build
from fleet.errors import ConfigError, RobotError
from fleet.robot import Robot
from fleet.seeds import HELD_OUT
from infra.intervals import wilson

_SEEDS_A_JOB = 5


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    task: str
    seed: int
    success: bool
    num_steps: int


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
) -> Table:
    """Runs ``policy`` once from each seed of each task.

    Args:
        policy: Built by ``algorithms.policies.registry.build``.
        robot_adapter, robot_settings: What ``actors.robots.make_robot`` takes.
        tasks: Instruction embedding (E,) by task name.
        seeds: Reset seeds; ``fleet.seeds.held_out_seeds`` gives some.
        execute: Actions of each chunk that are executed, 1 to H.
        num_workers: Processes; 0 runs in this one.

    Raises:
        ConfigError: A seed is not held out, ``execute`` is out of range, or there is nothing to do.
        PolicyError: The policy cannot drive this robot.
        RobotError: The robot cannot be built or driven, or cannot judge success itself.
    """
    if not tasks or not seeds or not 1 <= execute <= policy.spec.horizon:
        raise ConfigError(
            f"evaluation of {len(tasks)} tasks, {len(seeds)} seeds, execute {execute}",
            rule=f"at least one task and seed, execute 1 to the horizon {policy.spec.horizon}",
        )
    trained_on = [seed for seed in seeds if seed not in HELD_OUT]
    if trained_on:
        raise ConfigError(f"seed {trained_on[0]} may have been trained on", rule=f"held-out seeds lie in {HELD_OUT}")
    state = {name: tensor.detach().cpu().numpy() for name, tensor in policy.state_dict().items()}
    setup = (policy.family, policy.config, state, robot_adapter, dict(robot_settings), execute)
    jobs = [
        (task, np.asarray(embedding, np.float32), list(seeds[i : i + _SEEDS_A_JOB]))
        for task, embedding in tasks.items()
        for i in range(0, len(seeds), _SEEDS_A_JOB)
    ]
    episodes = _run_here(setup, jobs) if num_workers == 0 else _run_in_workers(setup, jobs, num_workers)
    rows = tuple(_row(task, [e for e in episodes if e.task == task]) for task in tasks)
    return Table(rows, _row("all", episodes), tuple(episodes))


def _row(task: str, episodes: Sequence[EpisodeResult]) -> Row:
    n, num_successes = len(episodes), sum(e.success for e in episodes)
    low, high = wilson(num_successes, n)
    return Row(task, n, num_successes, num_successes / n, low, high, sum(e.num_steps for e in episodes) / n)


class _Worker:
    """One policy and one robot, used for many episodes."""

    def __init__(
        self, family: str, config: Any, state: Mapping[str, np.ndarray], adapter: str, settings: Mapping[str, Any], execute: int
    ) -> None:
        self._policy = build(family, config).eval()
        self._policy.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
        self.robot: Robot = make_robot(adapter, **settings)
        self._policy.spec.check_robot(self.robot.spec)
        self._execute = execute

    def run(self, job: tuple[str, np.ndarray, list[int]]) -> list[EpisodeResult]:
        task, embedding, seeds = job
        return [self._episode(task, embedding, seed) for seed in seeds]

    @torch.inference_mode()
    def _episode(self, task: str, embedding: np.ndarray, seed: int) -> EpisodeResult:
        obs = self.robot.reset(task, seed)
        condition = torch.from_numpy(embedding[None])
        num_steps = 0
        while True:
            batch = {name: torch.from_numpy(np.array(obs[name])[None]) for name in self._policy.spec.reads}
            chunk = self._policy.act({**batch, INSTRUCTION: condition}).actions_BHA[0].numpy()
            for action in chunk[: self._execute]:
                feedback = self.robot.send(action)
                num_steps += 1
                if feedback.success is None:
                    raise RobotError(f"the robot cannot judge task {task!r}", rule="evaluation needs success from the robot")
                if feedback.success or feedback.terminated or feedback.truncated:
                    return EpisodeResult(task, seed, feedback.success, num_steps)
            obs = self.robot.observe()


_process: dict[str, Any] = {}  # of a worker process: its "setup", and its "worker" once the first job has come


def _start_process(setup: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent decides
    torch.set_num_threads(1)  # a batch of one is faster on one core, and the workers share the cores
    _process["setup"] = setup


def _run_job(job: tuple[str, np.ndarray, list[int]]) -> list[EpisodeResult]:
    if "worker" not in _process:  # not in the initializer: there an error would lose its message
        _process["worker"] = _Worker(*_process["setup"])
    episodes: list[EpisodeResult] = _process["worker"].run(job)
    return episodes


def _run_here(setup: tuple[Any, ...], jobs: Sequence[Any]) -> list[EpisodeResult]:
    worker = _Worker(*setup)
    try:
        return [episode for job in jobs for episode in worker.run(job)]
    finally:
        worker.robot.close()


def _run_in_workers(setup: tuple[Any, ...], jobs: Sequence[Any], num_workers: int) -> list[EpisodeResult]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), context, _start_process, (setup,)) as pool:
        try:
            return [episode for episodes in pool.map(_run_job, jobs) for episode in episodes]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BrokenProcessPool as broken:
            raise RobotError("a process that ran evaluation episodes died", remedy="look at its last output above") from broken
