"""From what is known of a run to what its live view shows."""

from __future__ import annotations

from typing import Any

from fleet.errors import FleetError
from fleet.server.registry import Registry
from infra.follow import RunFacts
from infra.view import FleetState, LearnerState, RobotState, TaskState

LATENCY_NAMES = {
    "durable": "step executed -> durable",
    "sampleable": "step executed -> sampleable",
    "loaded": "release published -> loaded",
}


def make_snapshot(
    phase: str, elapsed_s: float, facts: RunFacts, learner: dict[str, Any], registry: Registry | None
) -> FleetState:
    """The state of a run.

    Args:
        facts: From the journals: what happened.
        learner: The learner's status, {} before its start.
        registry: Where robots' present state stands; without it, or while it does not answer, the journals' view is shown.
    """
    try:
        live = registry.robots() if registry is not None else {}
    except FleetError:
        live = {}
    return FleetState(
        phase=phase,
        elapsed_s=elapsed_s,
        robots=[_robot(name, facts, live.get(name, {})) for name in sorted({*facts.robots, *live})],
        learner=_learner(facts, learner),
        tasks=[_task(name, facts) for name in sorted(facts.tasks)],
        latencies_ms={
            title: (p50, p99)
            for name, title in LATENCY_NAMES.items()
            if (p50 := facts.percentile(name, 50)) is not None and (p99 := facts.percentile(name, 99)) is not None
        },
        messages=list(facts.messages),
    )


def _robot(name: str, facts: RunFacts, live: dict[str, Any]) -> RobotState:
    known = facts.robots.get(name)
    version = int(live.get("version", 0)) or (known.version if known else 0)
    return RobotState(
        robot=name,
        state=str(live.get("state") or (known.state if known else "")),
        task=known.task if known else "",
        version=version or None,
        lag=max(facts.version - version, 0) if version else None,
        operator_acts=bool(live.get("in_control", 0)),
        steps=known.steps if known else 0,
        spool=int(live["spool"]) if "spool" in live else None,
    )


def _learner(facts: RunFacts, status: dict[str, Any]) -> LearnerState:
    state = str(status.get("waiting") or status.get("state") or "not started")
    return LearnerState(
        state=state,
        step=int(status.get("step") or facts.updates),
        updates_per_s=float(status.get("updates_per_s") or 0.0),
        loss=facts.loss or None,
        version=facts.version or None,
    )


def _task(name: str, facts: RunFacts) -> TaskState:
    task = facts.tasks[name]
    success = sum(task.recent) / len(task.recent) if task.recent else None
    return TaskState(name, task.episodes, success, task.interventions)
