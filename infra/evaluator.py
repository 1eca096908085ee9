"""Continual evaluation: a process beside the learner that runs its releases on held-out starts in a simulator.

It follows the run's release store, tests the newest release that is due, and adds the result to report/evaluations.json.
Nothing waits for it: it runs at the lowest usual priority, and what it cannot keep up with it skips and counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet.config import load_run
from fleet.errors import ConfigError, FleetError, ReleaseError
from fleet.files import Files
from fleet.journal import Journal
from fleet.runfolder import RunFolder
from fleet.seeds import CLAIMS, CONTINUAL, held_out_seeds
from fleet.server.releases import ReleaseStore
from infra.driver_status import read_status
from infra.results import CONTINUAL as LABEL
from infra.results import newest_tested

POLL_S = 0.5
NICE = 10
Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class EvaluatorConfig:
    every: int = 0
    """A release is tested when it is so many after the last one tested; 0: no evaluator."""
    episodes: int = 20
    """Held-out starts a task, always the same ones."""
    workers: int = 1
    """Processes that run episodes."""
    num_cpus: float = 0.0
    """CPUs that Ray reserves for it; 0: it takes what the others leave."""
    adapter: str = ""
    """Robot adapter of the simulator; empty: the run's own robot, which must be simulated."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of that adapter."""
    max_steps: int = 2000
    """Actions after which an episode that the simulator has not ended is ended, and has failed."""
    metrics_port: int = 0
    """Prometheus endpoint on loopback; 0: any free one, see evaluator.json; -1: none."""

    def check(self) -> None:
        """Raises ConfigError when a value is out of its range."""
        rules = {
            "every": (self.every >= 0, "every >= 0"),
            "episodes": (1 <= self.episodes <= CLAIMS - CONTINUAL, f"1 <= episodes <= {CLAIMS - CONTINUAL}"),
            "workers": (1 <= self.workers <= 256, "1 <= workers <= 256"),
            "num_cpus": (self.num_cpus >= 0, "num_cpus >= 0"),
            "settings": (not self.settings or bool(self.adapter), "settings are those of evaluator.adapter"),
            "max_steps": (self.max_steps >= 1, "max_steps >= 1"),
            "metrics_port": (-1 <= self.metrics_port <= 65535, "-1, 0, or a port"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"evaluator.{key} = {getattr(self, key)!r}", rule=rule)


def endpoint_file(run: RunFolder) -> Path:
    """Where the running evaluator writes down its process and metrics port."""
    return run.path / "evaluator.json"


def due(newest: int | None, tested: int | None, every: int, finished: bool) -> tuple[int, int] | None:
    """Which release is to be tested now, and how many that were due before it got old meanwhile.

    Args:
        newest: The newest release, None before the first.
        tested: The newest one that was tested.
        finished: Nothing newer will come, so the last one is due whatever ``every`` says.
    """
    if newest is None or newest == tested:
        return None
    if tested is None:
        return newest, 0
    if newest - tested < every and not finished:
        return None
    return newest, max((newest - tested - 1) // every, 0)


def serve(*, run_path: str, stop: Callable[[], bool], report: Report) -> None:
    """Tests releases until ``stop`` says so. Killed at any time, it does again what it had not finished.

    Args:
        run_path: The run's folder on this node.
        report: Is told ``state`` (starting | waiting | testing), ``pid``, while testing ``testing`` (the version) and
            ``episodes_done``, and of the newest result ``tested`` (its version), ``rate`` over all tasks, the ends ``low`` and
            ``high`` of its 95 % interval, and ``seconds``.

    Raises:
        ConfigError: The run's robot is no simulator, and the run file names none.
        RobotError: The simulator cannot be built, cannot judge success, or its starts do not follow their seed.
        PolicyError: The policy cannot drive the simulator.
    """
    run = RunFolder.open(Path(run_path))
    config: EvaluatorConfig = load_run(run.config, {"evaluator": EvaluatorConfig})["evaluator"]
    with contextlib.suppress(OSError):  # it is lower already
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    with contextlib.closing(_open_journal(run, config)) as journal:
        try:
            _Evaluator(run, config, journal, stop, report).work()
        except FleetError as error:
            journal.write("evaluator_failed", **error.to_fields())
            raise


class _Stopped(Exception):
    """Somebody asked for the end in the middle of a test."""


class _Evaluator:
    def __init__(
        self, run: RunFolder, config: EvaluatorConfig, journal: Journal, stop: Callable[[], bool], report: Report
    ) -> None:
        self._run, self._config, self._journal, self._stop, self._tell = run, config, journal, stop, report
        self._seeds = held_out_seeds(config.episodes, first=CONTINUAL)
        self._newest: dict[str, Any] = {}
        self._given_up = 0  # the newest release that could not be read

    def work(self) -> None:
        from infra.evaluation import check_simulator

        self._report("starting")
        check_simulator(self._run)
        store = ReleaseStore(self._run.releases)
        tested = newest_tested(self._run, LABEL)
        while not self._stop():
            newest = store.newest()
            plan = None if newest == self._given_up else due(newest, tested, self._config.every, self._finished())
            if plan is None:
                self._report("waiting")
                time.sleep(POLL_S)
                continue
            try:
                self._test(*plan)
                tested = plan[0]
            except _Stopped:
                return
            except ReleaseError as error:  # pruned meanwhile, or damaged: the next one is as good
                self._given_up = plan[0]
                self._journal.write("evaluation_skipped", version=plan[0], error=str(error))

    def _test(self, version: int, skipped: int) -> None:
        from infra.evaluation import evaluate_version

        def watch(done: int) -> None:
            self._report("testing", testing=version, episodes_done=done)
            if self._stop():
                raise _Stopped

        began = time.monotonic()
        self._report("testing", testing=version, episodes_done=0)
        workers = self._config.workers if self._config.workers > 1 else 0
        table = evaluate_version(self._run, version, LABEL, self._seeds, workers=workers, watch=watch)
        seconds = round(time.monotonic() - began, 2)
        tasks = {row.task: [row.rate, row.low, row.high] for row in table.rows}
        self._journal.write("evaluated", version=version, tasks=tasks, seconds=seconds, skipped=skipped)
        total = table.total
        rates = {name: round(getattr(total, name), 3) for name in ("rate", "low", "high")}
        self._newest = {"tested": version, **rates, "seconds": seconds}

    def _finished(self) -> bool:
        return bool(read_status(self._run).get("state") == "finished")

    def _report(self, state: str, **facts: Any) -> None:
        self._tell({"state": state, "pid": os.getpid(), **facts, **self._newest})


def _open_journal(run: RunFolder, config: EvaluatorConfig) -> Journal:
    """The journal, its facts counted for Prometheus; writes down who this is."""
    from fleet.metrics import EVALUATOR, MeteredJournal, Metrics

    path, facts = run.logs / "evaluator.jsonl", {"pid": os.getpid()}
    metrics = Metrics(EVALUATOR)
    if config.metrics_port >= 0:
        facts["metrics_port"] = metrics.serve(config.metrics_port)
    Files().write_atomic(endpoint_file(run), json.dumps(facts).encode())
    return MeteredJournal(path, metrics)
