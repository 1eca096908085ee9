"""`fleet demo`: a whole fleet on one machine, through the real wire, from demonstrations to a report.

demonstrations -> start policy -> robots work, operators correct, the learner trains -> held-out tests -> report
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet.config import load_run
from fleet.errors import ConfigError, FleetError
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from infra.evaluation import evaluate_release
from infra.follow import RunFacts
from infra.report import write_report
from infra.run_config import load_tables
from infra.sim import fleet_children, lock_fleet, sim_child
from infra.snapshot import make_snapshot
from infra.up import LocalRun
from infra.view import FleetState, LiveView

BUILT_IN = Path(__file__).with_name("demo.yaml")
DEMONSTRATOR = "demonstrator"
PHASE_TIMEOUT_S = 900.0


@dataclasses.dataclass
class DemoConfig:
    num_robots: int = 4
    """Simulated robots that work while the policy learns."""
    demonstrations: int = 2
    """Demonstrations a task, before anything is trained."""
    episodes: int = 50
    """Held-out starts a task for the tests before and after."""
    curve_releases: int = 5
    """Releases in between that are tested too, for the curve over time."""
    curve_episodes: int = 15
    """Held-out starts a task for each of those."""

    def check(self) -> None:
        if self.num_robots < 0 or self.demonstrations < 1 or self.episodes < 1:
            raise ConfigError(
                f"demo has num_robots {self.num_robots}, demonstrations {self.demonstrations}, episodes {self.episodes}",
                rule="num_robots >= 0, demonstrations >= 1, episodes >= 1",
            )


class Stopped(Exception):
    """The user asked for the end."""


class Demo:
    """The phases of a demo; each is a method, ``run_demo`` calls them in order. ``show``: called a few times a second."""

    def __init__(self, run: RunFolder, tables: dict[str, Any], config: DemoConfig) -> None:
        self.run, self.tables, self.config = run, tables, config
        self.local = LocalRun(run, tables)
        self.facts = RunFacts(run)
        self.status: dict[str, Any] = {}
        self.phase, self.started = "starting", time.monotonic()
        self.stop_asked = threading.Event()

    def wait_until(self, done: Callable[[], bool], show: Callable[[], None], timeout_s: float = PHASE_TIMEOUT_S) -> None:
        """Keeps the run alive until ``done``.

        Raises:
            Stopped: Ctrl-C.
            FleetError: Something cannot be kept running, or the phase takes far too long.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            if self.stop_asked.is_set():
                raise Stopped
            if time.monotonic() > deadline:
                raise FleetError(f"phase {self.phase!r} took over {timeout_s:.0f} s", remedy=f"see the logs in {self.run.logs}")
            self.status = self.local.poll()
            if self.local.failure is not None:
                raise self.local.failure
            self.facts.update()
            show()
            time.sleep(0.2)

    def snapshot(self) -> FleetState:
        """What the live view shows."""
        elapsed_s = time.monotonic() - self.started
        return make_snapshot(self.phase, elapsed_s, self.facts, self.status, self.local.registry)

    def demonstrate(self, show: Callable[[], None]) -> None:
        """One robot shows each task; Ray starts meanwhile."""
        self.phase = "demonstrations; Ray starts meanwhile"
        num_episodes = self.config.demonstrations * len(self.tables["run"].tasks)
        settings = {
            **self.tables["operator"].settings,
            "mode": "demonstrate",
            "budget_steps": None,
            "task_budget_steps": None,
            "reaction_s": 0.0,
        }
        changes: dict[str, dict[str, Any]] = {
            "operator": {"settings": settings},
            "actor": {"demonstrate": True, "realtime": False, "num_episodes": num_episodes},
        }
        child = sim_child(self.run, DEMONSTRATOR, changes, [], once=True)
        self.local.supervisor.add(child)
        self.local.start_learner(hold=True)
        self.wait_until(lambda: child.done, show)

    def train_start(self, show: Callable[[], None]) -> None:
        """Until the start policy is published as the first release."""
        self.phase = "training the start policy on the demonstrations"
        self.local.let_learner_begin()
        store = ReleaseStore(self.run.releases)
        self.wait_until(lambda: store.newest() is not None, show)

    def work(self, show: Callable[[], None]) -> None:
        """The robots work until the learner has done its steps."""
        self.phase = "the fleet works"
        lock = lock_fleet(self.run)
        children = fleet_children(self.run, self.config.num_robots, [])
        for child in children:
            self.local.supervisor.add(child)
        self.wait_until(lambda: self.status.get("state") == "finished", show, math.inf)
        self.local.supervisor.stop([child.name for child in children])
        lock.release()

    def test(self, say: Callable[[str], None]) -> None:
        """Held-out tests of the start policy, of the newest release, and of some in between."""
        versions = ReleaseStore(self.run.releases).versions()
        first, last = versions[0], versions[-1]
        plan = [(first, self.config.episodes, "start"), (last, self.config.episodes, "final")]
        num = min(self.config.curve_releases, max(len(versions) - 2, 0))
        plan += [
            (versions[round((i + 1) * (len(versions) - 1) / (num + 1))], self.config.curve_episodes, "release")
            for i in range(num)
        ]
        for version, episodes, label in plan:
            if self.stop_asked.is_set():
                raise Stopped
            table = evaluate_release(self.run.path, version, episodes, label=label)
            total = table.total
            say(
                f"release {version} ({label}): {100 * total.rate:.1f} % of {total.num_episodes} held-out episodes succeed "
                f"(95 % interval {100 * total.low:.0f} - {100 * total.high:.0f} %)"
            )


def prepare_demo(folder: Path, config_file: Path | None, overrides: list[str]) -> Demo:
    """A new run folder with the demo's configuration; nothing is started yet.

    Raises:
        ConfigError, RunFolderError: As ``fleet up``.
    """
    source = config_file or BUILT_IN
    own = [o for o in overrides if o.startswith("demo.")]
    rest = [o for o in overrides if not o.startswith("demo.")]
    config: DemoConfig = load_run(source, {"demo": DemoConfig}, own)["demo"]
    tables = load_tables(source, rest)
    return Demo(RunFolder.create(folder), tables, config)


def free_folder(runs: Path = Path("runs")) -> Path:
    """runs/demo, or the first of runs/demo-2, runs/demo-3, ... that is not there."""
    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    return next(runs / name for name in names if not (runs / name).exists())


def run_demo(folder: Path | None, config_file: Path | None, overrides: list[str]) -> None:
    """The whole demo with its live view; ends with the report's path."""
    demo = prepare_demo(folder or free_folder(), config_file, overrides)
    signal.signal(signal.SIGINT, lambda number, frame: demo.stop_asked.set())
    signal.signal(signal.SIGTERM, lambda number, frame: demo.stop_asked.set())
    signal.signal(signal.SIGHUP, lambda number, frame: demo.stop_asked.set())
    try:
        with LiveView(demo.snapshot) as view:
            demo.local.start()
            demo.demonstrate(view.refresh)
            demo.train_start(view.refresh)
            demo.work(view.refresh)
        demo.local.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing is left that a sudden end could harm
        print("testing releases on held-out starts", flush=True)
        demo.test(lambda text: print(f"  {text}", flush=True))
        print(f"report: {write_report(demo.run)}", flush=True)
        print(f"took {time.monotonic() - demo.started:.0f} s", flush=True)
    except (Stopped, KeyboardInterrupt):
        print("stopping: checkpoint, then gateway and registry", flush=True)
        demo.local.stop()
        print(f"go on with: fleet up {demo.run.path} --resume")
        print(f"and robots: fleet sim {demo.run.path} --num {demo.config.num_robots}")
    except BaseException:
        demo.local.stop()
        raise
