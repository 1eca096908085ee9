"""A whole run of the toy robot - gateway, registry, driver with its learner in Ray, robots - whose processes are killed."""

import collections
import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

from buffer.reader import LogReader
from fleet.journal import read_journal
from fleet.server.releases import ReleaseStore
from infra.follow import RunFacts
from infra.sim import fleet_children, sim_child
from infra.up import DRIVER, LocalRun, open_run

TOY = Path(__file__).parents[2] / "examples" / "toy.yaml"
QUICK = [
    "learner.min_size_to_sample=50",
    "learner.start_steps=100",
    "learner.checkpoint_every=50",
    "learner.publish_every=25",
    "learner.samples_per_insert=256",
]
ENDS_THE_LEARNER = ("rank", DRIVER, "ray", "raylet")


@dataclasses.dataclass
class Recovery:
    """After a kill: seconds to the next update beyond the one before it, updates done again, and the fragments that were
    acknowledged meanwhile."""

    victim: str
    seconds: float
    steps_lost: int
    acknowledged: int


class ToyRun:
    """A toy run with some demonstrations and robots; ``until`` keeps it alive while waiting."""

    def __init__(self, folder, overrides=(), num_robots=2, other_folders=()):
        run, tables = open_run(TOY, [*QUICK, *overrides], resume=False, runs=folder)
        self.run, self.local, self.facts = run, LocalRun(run, tables), RunFacts(run)
        self.folders = [run.path, *other_folders]  # of all nodes
        self.num_robots, self.robots, self.status = num_robots, [], {}

    def start(self, address=""):
        self.local.start()
        changes = {
            "operator": {"settings": {**self.local.tables["operator"].settings, "mode": "demonstrate"}},
            "actor": {"demonstrate": True, "realtime": False, "num_episodes": 8},
        }
        teacher = sim_child(self.run, "teacher", changes, [], once=True)
        self.local.supervisor.add(teacher)
        self.local.start_learner(address, hold=True)
        self.until(lambda: teacher.done, 60)
        self.local.let_learner_begin()
        self.until(lambda: ReleaseStore(self.run.releases).newest(), 90)
        self.robots = fleet_children(self.run, self.num_robots, [])
        for child in self.robots:
            self.local.supervisor.add(child)
        self.until(lambda: len(self.working()) == self.num_robots, 60)

    def working(self):
        """Robots whose steps arrive, at whichever node."""
        counts = collections.Counter(robot for folder in self.folders for robot, _, _ in acknowledged(folder))
        return [robot for robot, count in counts.items() if robot.startswith("sim-") and count > 5]

    def until(self, condition, timeout_s):
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, self.status
            self.status = self.local.poll()
            self.facts.update()
            time.sleep(0.1)
        return value

    def lines(self, name, *kinds):
        return [line for line in read_journal(self.run.logs / f"{name}.jsonl") if line["kind"] in kinds]

    def trained(self):
        """(time_ns, step) of each time that the learner said how far it is, restarts among them."""
        return [(line["time_ns"], line["step"]) for line in self.lines("learner", "update", "checkpoint", "resumed")]

    def child(self, name):
        return self.local.supervisor.children[name]

    def pids(self, victim):
        """rank, driver, ray (its two servers), raylet, or the name of a supervised process."""
        if victim == "rank":
            self.until(lambda: self.status.get("pid"), 60)
            return [self.status["pid"]]
        if victim in ("ray", "raylet"):
            names = {"ray": ("raylet", "gcs_server"), "raylet": ("raylet",)}[victim]
            return self.until(lambda: servers_of_ray(self.child(DRIVER).last_pid, names), 60)
        return [self.child(victim).last_pid]

    def kill(self, victim, timeout_s=60):
        """Kills with -9 and waits until the learner has gone further than it had."""
        self.until(lambda: self.status.get("state") in ("training", "waiting") and self.status["pid"], timeout_s)
        pids, restarts = self.pids(victim), self.child(victim).num_restarts if victim in self.local.supervisor.children else 0
        reached = max(step for _, step in self.trained())
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed_ns = time.time_ns()
        if victim in self.local.supervisor.children:
            self.until(lambda: self.child(victim).num_restarts > restarts and self.child(victim).running, 30)
        again_ns, lost = killed_ns, 0
        if victim in ENDS_THE_LEARNER:  # it may do a last update before it notices
            (resumed,) = self.until(
                lambda: [x for x in self.lines("learner", "resumed") if x["time_ns"] > killed_ns], timeout_s
            )
            again_ns = resumed["time_ns"]
            reached = max(step for ns, step in self.trained() if ns < again_ns)
            lost = reached - resumed["step"]
        further = self.until(
            lambda: next((ns for ns, step in self.trained() if ns > again_ns and step > reached), None), timeout_s
        )
        durable = sum(killed_ns < line["time_ns"] < further for line in self.lines("gateway", "durable"))
        return Recovery(victim, (further - killed_ns) / 1e9, lost, durable)

    def num_lost_robots(self):
        return sum(line["event"] == "lost" for line in self.lines("gateway", "member"))

    def check_that_nothing_was_lost(self):
        """Ends the robots; every acknowledged fragment is there exactly once, and each boot's are without a gap."""
        self.local.supervisor.stop([child.name for child in self.robots])
        for folder in self.folders:
            sent, there = acknowledged(folder), stored(folder)
            assert len(sent) > 5
            assert set(sent) <= set(there)
            assert max(collections.Counter(there).values()) == 1
            by_boot = collections.defaultdict(list)
            for robot, boot, seq in there:
                by_boot[robot, boot].append(seq)
            assert all(seqs == list(range(1, len(seqs) + 1)) for seqs in by_boot.values())
        steps = [ReleaseStore(self.run.releases).manifest(v).step for v in ReleaseStore(self.run.releases).versions()]
        assert steps == sorted(steps)  # nobody was told that older weights are newer


def acknowledged(folder):
    """Every (robot, boot, seq) that the gateway of a run folder acknowledged."""
    lines = read_journal(folder / "logs" / "gateway.jsonl")
    return [(line["robot"], line["boot"], line["seq"]) for line in lines if line["kind"] == "durable"]


def stored(folder):
    """The same of those in its buffer."""
    reader = LogReader(folder / "buffer")
    keys = [(record.robot_id, record.boot_id, record.seq) for record in reader.poll()]
    reader.close()
    return keys


def servers_of_ray(driver, names):
    """The pids of Ray's servers that a driver started, none while one of them is missing."""
    shown = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(driver)], capture_output=True, text=True, check=False)
    found = {name: int(pid) for pid, name in (line.split(None, 1) for line in shown.stdout.splitlines())}
    return [found[name] for name in names] if set(names) <= set(found) else []


def table(recoveries):
    """The times, for people."""
    rows = [f"{r.victim:9s} {r.seconds:18.1f}  {r.steps_lost:10d}  {r.acknowledged:10d}" for r in recoveries]
    return "\n".join(["killed    s to the next step  steps lost  fragments acknowledged meanwhile", *rows])
