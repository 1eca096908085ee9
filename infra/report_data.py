"""The numbers of a run's report, read off its journals and evaluations. No plots, no layout."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from fleet.journal import read_journal
from fleet.runfolder import RunFolder
from infra.intervals import wilson
from infra.results import CONTINUAL, read_results

ROLLING = 10  # episodes behind a point of the fleet's own success
LATENCIES = {
    "durable": "step executed → durable",
    "sampleable": "step executed → sampleable",
    "loaded": "release published → loaded by a robot",
}
PERCENTILES = (50, 95, 99)


@dataclasses.dataclass
class Facts:
    """A run's journals in time order; times are minutes since the first line of the gateway.

    latencies_ms: by name, one value a step (executed) or a robot and release (published). left_out: values that say
    nothing about the system's own delay: steps executed before the learner was there, and releases published before
    the robot that loads them had joined. lags: robot -> (minutes, releases published that it has not loaded).
    """

    run_id: str
    start_ns: int = 0
    end_ns: int = 0
    latencies_ms: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {name: [] for name in LATENCIES})
    left_out: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(LATENCIES, 0))
    episodes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    published: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lags: dict[str, list[tuple[float, int]]] = dataclasses.field(default_factory=dict)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def minutes(self, time_ns: int) -> float:
        return (time_ns - self.start_ns) / 60e9

    @property
    def fleet_episodes(self) -> list[dict[str, Any]]:
        """Episodes in which the policy drove, in the order of their ends; demonstrations are left out."""
        return [e for e in self.episodes if e.get("source") != "demo"]


def read_facts(run: RunFolder) -> Facts:
    """Everything that the report says. What is missing in the run is missing here, and is no error."""
    gateway = list(read_journal(run.logs / "gateway.jsonl"))
    learner = list(read_journal(run.logs / "learner.jsonl"))
    supervisor = list(read_journal(run.logs / "supervisor.jsonl"))
    facts = Facts(run.run_id)
    times = [line["time_ns"] for line in gateway + learner]
    if times:
        facts.start_ns, facts.end_ns = min(times), max(times)
    facts.episodes = [line for line in gateway if line["kind"] == "episode"]
    facts.published = [line for line in learner if line["kind"] == "published"]
    for line in gateway:
        if line["kind"] == "durable":
            facts.latencies_ms["durable"] += line["latency_ms"]
    _read_sampleable(facts, learner)
    _read_loaded(facts, gateway)
    _read_lags(facts, gateway)
    facts.evaluations = _read_evaluations(run, facts)
    facts.counts = _count(facts, gateway, learner, supervisor)
    return facts


def _read_sampleable(facts: Facts, learner: list[dict[str, Any]]) -> None:
    """A learner that starts again reads the log from its beginning: only the first time of each fragment counts."""
    name, begin_ns = "sampleable", learner[0]["time_ns"] if learner else 0
    seen: set[tuple[str, str, int]] = set()
    for line in learner:
        if line["kind"] != "sampleable" or (key := (line["robot"], line["boot"], line["seq"])) in seen:
            continue
        seen.add(key)
        counted = [ms for ms in line["latency_ms"] if line["time_ns"] - ms * 1e6 >= begin_ns]
        facts.latencies_ms[name] += counted
        facts.left_out[name] += len(line["latency_ms"]) - len(counted)


def _read_loaded(facts: Facts, gateway: list[dict[str, Any]]) -> None:
    name, joined_ns = "loaded", dict[str, int]()
    for line in gateway:
        if line["kind"] == "member" and line["event"] == "joined":
            joined_ns[line["robot"]] = line["time_ns"]
        elif line["kind"] == "loaded":
            if line["time_ns"] - line["latency_ms"] * 1e6 < joined_ns.get(line["robot"], 0):
                facts.left_out[name] += 1
            else:
                facts.latencies_ms[name].append(line["latency_ms"])


def _read_lags(facts: Facts, gateway: list[dict[str, Any]]) -> None:
    published = sorted((line["time_ns"], line["version"]) for line in facts.published)
    times_ns, versions = [t for t, _ in published], sorted(v for _, v in published)
    loads = collections.defaultdict(list)
    for line in gateway:
        if line["kind"] == "loaded":
            loads[line["robot"]].append((line["time_ns"], line["version"]))
    for robot, own in sorted(loads.items()):
        own_times_ns = [t for t, _ in own]
        facts.lags[robot] = []
        for now_ns in sorted({t for t in [*times_ns, *own_times_ns] if own_times_ns[0] <= t <= own_times_ns[-1]}):
            version = own[bisect.bisect_right(own_times_ns, now_ns) - 1][1]
            lag = bisect.bisect_right(times_ns, now_ns) - bisect.bisect_right(versions, version)
            facts.lags[robot].append((facts.minutes(now_ns), max(lag, 0)))


def _read_evaluations(run: RunFolder, facts: Facts) -> list[dict[str, Any]]:
    rows = read_results(run)
    for row in rows:
        row["rate"] = row["successes"] / row["episodes"] if row["episodes"] else None
        row["low"], row["high"] = wilson(row["successes"], row["episodes"])
        wall_s = row.get("wall_s")
        row["minutes"] = facts.minutes(row["at_ns"]) if wall_s is None else wall_s / 60
    return sorted(rows, key=lambda row: (row["minutes"], row["version"], row["task"]))


def _count(facts: Facts, gateway: list[Any], learner: list[Any], supervisor: list[Any]) -> dict[str, Any]:
    demos = [e for e in facts.episodes if e.get("source") == "demo"]
    steps: collections.Counter[str] = collections.Counter()
    for line in gateway:
        if line["kind"] == "durable":
            steps.update(line.get("steps", {}))
    kinds = collections.Counter(line["kind"] for line in [*gateway, *learner])
    updates = [line["step"] for line in learner if line["kind"] in ("update", "checkpoint", "published")]
    processes = {line["name"]: line["restarts"] for line in supervisor if line["kind"] == "process"}
    return {
        "steps_durable": sum(steps.values()),
        "steps_by_source": dict(sorted(steps.items())),
        "episodes": len(facts.fleet_episodes),
        "episodes_with_operator": sum(e["operator_steps"] > 0 for e in facts.fleet_episodes),
        "demonstrations": len(demos),
        "releases": kinds["published"],
        "updates": max(updates, default=0),
        "robots": len({line["robot"] for line in gateway if line["kind"] == "durable"}),
        "learner_resumed": kinds["resumed"],
        "process_restarts": sum(processes.values()),
        "robots_lost": sum(line["kind"] == "member" and line["event"] == "lost" for line in gateway),
        "refused": kinds["refused"],
    }


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """{"num", "p50", "p95", "p99"}; empty when there is no value."""
    array = np.asarray(list(values), np.float64)
    if not len(array):
        return {}
    numbers = np.percentile(array, PERCENTILES)
    return {"num": len(array), **{f"p{q}": round(float(n), 1) for q, n in zip(PERCENTILES, numbers, strict=True)}}


def latency_table(run: RunFolder) -> dict[str, dict[str, float]]:
    """P50, P95 and P99 in ms of each of ``LATENCIES`` by key, and how many values are behind them; {} for one without data."""
    return {name: percentiles(values) for name, values in read_facts(run).latencies_ms.items()}


def before_after(facts: Facts) -> list[dict[str, Any]]:
    """By task, and in all: the results labelled "start" and "final"; in a run without such, those of the first and the newest
    release that the evaluator tested. Each None where it was not tested."""
    tasks = sorted({row["task"] for row in facts.evaluations})
    continual = sorted({row["version"] for row in facts.evaluations if row["label"] == CONTINUAL})
    instead = {"start": continual[:1], "final": continual[1:][-1:]}
    table = []
    for task in [*tasks, *(["all tasks"] if len(tasks) > 1 else [])]:
        entry: dict[str, Any] = {"task": task}
        for label in ("start", "final"):
            rows = [r for r in facts.evaluations if r["label"] == label]
            rows = rows or [r for r in facts.evaluations if r["label"] == CONTINUAL and r["version"] in instead[label]]
            entry[label] = _pooled([r for r in rows if task in (r["task"], "all tasks")])
        table.append(entry)
    return [entry for entry in table if entry["start"] or entry["final"]]


def curve(facts: Facts) -> dict[str, list[dict[str, Any]]]:
    """Task -> results of every tested release over time; one point a release, pooled where it was tested twice."""
    points: dict[str, dict[int, list[dict[str, Any]]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in facts.evaluations:
        points[row["task"]][row["version"]].append(row)
    return {
        task: [
            {"minutes": rows[0]["minutes"], "version": version, **(_pooled(rows) or {})} for version, rows in versions.items()
        ]
        for task, versions in sorted(points.items())
    }


def _pooled(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    episodes, successes = sum(r["episodes"] for r in rows), sum(r["successes"] for r in rows)
    if not episodes:
        return None
    low, high = wilson(successes, episodes)
    return {"episodes": episodes, "successes": successes, "rate": successes / episodes, "low": low, "high": high}


def autonomous_success(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """Task -> (minutes, share of the last ``ROLLING`` episodes that succeeded without an operator)."""
    recent: dict[str, collections.deque[bool]] = collections.defaultdict(lambda: collections.deque(maxlen=ROLLING))
    series: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for episode in facts.fleet_episodes:
        if episode["outcome"] not in ("success", "failure"):
            continue
        window = recent[episode["task"]]
        window.append(episode["outcome"] == "success" and episode["operator_steps"] == 0)
        series[episode["task"]].append((facts.minutes(episode["time_ns"]), sum(window) / len(window)))
    return dict(sorted(series.items()))


def interventions_per_minute(facts: Facts) -> list[tuple[float, float, float]]:
    """(minute at the middle of a bin, interventions a minute, episodes a minute), by the episode's end.

    Bins are of ``bin_minutes``; an intervention is an episode in which an operator acted.
    """
    episodes, width = facts.fleet_episodes, bin_minutes(facts)
    bins = [int(facts.minutes(e["time_ns"]) / width) for e in episodes]
    if not bins:
        return []
    helped = collections.Counter(b for b, e in zip(bins, episodes, strict=True) if e["operator_steps"] > 0)
    every = collections.Counter(bins)
    return [((b + 0.5) * width, helped[b] / width, every[b] / width) for b in range(min(bins), max(bins) + 1)]


def bin_minutes(facts: Facts) -> float:
    """Width of a bin so that a run has at least a dozen: 5 s to an hour."""
    minutes = (facts.end_ns - facts.start_ns) / 60e9
    return max([w for w in (5 / 60, 10 / 60, 0.5, 1.0, 5.0, 15.0, 60.0) if w <= minutes / 12], default=5 / 60)


def mean_lag(points: list[tuple[float, int]], begin: float, end: float) -> float | None:
    """Mean lag between two minutes, weighted by time; None where the robot's lag is not known there."""
    total = known = 0.0
    for (start, lag), (stop, _) in itertools.pairwise(points):
        span = min(stop, end) - max(start, begin)
        if span > 0:
            total, known = total + lag * span, known + span
    return total / known if known else None


def lag_series(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """Robot -> (minute at the middle of a bin, mean lag in it)."""
    width, series = bin_minutes(facts), {}
    for robot, points in facts.lags.items():
        first, last = int(points[0][0] / width), int(points[-1][0] / width)
        means = [((b + 0.5) * width, mean_lag(points, b * width, (b + 1) * width)) for b in range(first, last + 1)]
        series[robot] = [(middle, lag) for middle, lag in means if lag is not None]
    return series
