"""From outcomes to rows of the table, and to the picture of how success rose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.attribution import interval
from benchmarks.buffer_report import missing
from benchmarks.learning_methods import EVERY
from benchmarks.learning_runs import Outcome
from benchmarks.learning_scenarios import Scenario
from benchmarks.results import Row
from infra.intervals import wilson

Measure = Callable[[Outcome], float]


def rows_of(scenario: Scenario, outcomes: Sequence[Outcome]) -> list[Row]:
    """By method: success, steps to success, what it cost; then differences from the control, seed by seed. Intervals are
    Student's over seeds, Wilson's over starts stand in words."""
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.method, []).append(outcome)
    known = {name: [o for o in each if not o.why] for name, each in by_method.items()}
    rows: list[Row] = []
    for name, each in known.items():
        if not each:
            rows.append(missing(f"{name}: success", "%", by_method[name][0].why))
            continue
        for what, tasks in _groups(scenario).items():
            rows.append(_success(f"{name}: success{what}", each, tasks))
        rows += [_steps(name, each), _human(name, each), _seconds(name, each)]
    return rows + _differences(scenario, {name: each for name, each in known.items() if each})


def _groups(scenario: Scenario) -> dict[str, tuple[str, ...]]:
    """Tasks that are told together."""
    if not scenario.robot_tasks:
        return {"": ()}
    others = tuple(task for task in scenario.tasks if task not in scenario.robot_tasks)
    return {" on tasks that the robot worked on": scenario.robot_tasks, " on the others": others}


def _success(what: str, outcomes: Sequence[Outcome], tasks: tuple[str, ...]) -> Row:
    rates = [o.rate(tasks) for o in outcomes]
    episodes, won = (sum(o.counts(tasks)[i] for o in outcomes) for i in (0, 1))
    low, high = (100 * end for end in wilson(won, episodes))
    seeds = f"seeds {', '.join(f'{rate:.1f}' for rate in rates)}; Wilson over {episodes} starts {low:.1f} - {high:.1f}"
    row = _mean(f"{what} ({seeds})", rates, "%", 1)
    if row.low is not None and row.high is not None:
        row.low, row.high = max(row.low, 0.0), min(row.high, 100.0)
    return row


def _steps(name: str, outcomes: Sequence[Outcome]) -> Row:
    values = [value for o in outcomes if not math.isnan(value := steps_to_success(o))]
    if not values:
        return missing(f"{name}: steps to success", "steps", "no episode succeeded")
    return _mean(f"{name}: steps to success", values, "steps", 1)


def steps_to_success(outcome: Outcome) -> float:
    """Mean over the episodes that succeeded; NaN where none did."""
    _, won, steps = outcome.counts()
    return steps / won if won else math.nan


def _human(name: str, outcomes: Sequence[Outcome]) -> Row:
    mean = {key: round(statistics.mean(getattr(o, key) for o in outcomes)) for key in _COSTS}
    told = (
        f"{mean['demonstration_steps']} of demonstrations, {mean['operator_steps']} of the operator; {mean['env_steps']} of "
        f"the robot in all; {mean['learner_steps']} updates with the start's, {mean['gradient_steps']} gradient steps after it"
    )
    row = _mean(f"{name}: human steps ({told})", [float(o.human_steps) for o in outcomes], "steps", 0)
    advice = {o.advice for o in outcomes if o.advice}
    row.why = f"advice at the end: {'; '.join(sorted(advice))}" if advice else ""
    return row


_COSTS = ("demonstration_steps", "operator_steps", "env_steps", "learner_steps", "gradient_steps")


def _seconds(name: str, outcomes: Sequence[Outcome]) -> Row:
    robot, test = (statistics.mean(getattr(o, key) for o in outcomes) for key in ("robot_s", "test_s"))
    what = f"{name}: learner (the robot {robot:.0f}, tests {test:.0f})"
    return _mean(what, [o.train_s for o in outcomes], "processor s", 0)


def _differences(scenario: Scenario, known: Mapping[str, list[Outcome]]) -> list[Row]:
    """Of each method and the control, by seed. Those that learn from values are to beat a control that imitates."""
    base = {o.seed: o for o in known.get(scenario.control, [])}
    measures: list[tuple[str, str, Measure, int]] = [
        (f"success{what}", "points", lambda o, tasks=tasks: o.rate(tasks), 1) for what, tasks in _groups(scenario).items()
    ]
    measures.append(("steps to success", "steps", steps_to_success, -1))
    rows = []
    for name, outcomes in known.items():
        for what, unit, measure, sign in measures:
            pairs = [(measure(o), measure(base[o.seed])) for o in outcomes if o.seed in base and name != scenario.control]
            values = [mine - theirs for mine, theirs in pairs if not math.isnan(mine - theirs)]
            if not values:
                continue
            row = _mean(f"{name} minus {scenario.control}, paired: {what}", values, unit, 1)
            if scenario.claim and EVERY[name].values:
                row.target = f"{'above' if sign > 0 else 'below'} 0 in success or in steps, with its interval"
                row.met = row.low is not None and row.high is not None and (row.low > 0 if sign > 0 else row.high < 0)
            rows.append(row)
    return rows


def _mean(what: str, values: Sequence[float], unit: str, digits: int) -> Row:
    low, high = interval(list(values))
    ends = [None if end is None else round(end, digits) for end in (low, high)]
    return Row(what, round(statistics.mean(values), digits), unit, ends[0], ends[1], len(values))


def plot(scenario: Scenario, outcomes: Sequence[Outcome], path: Path) -> None:
    """Success over updates by method, mean of the seeds, as SVG. The ends are held-out starts of claims, between them those
    for watching."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    names = [name for name in dict.fromkeys(o.method for o in outcomes) if name != "bc"]
    for number, name in enumerate(names):
        curves = [o.curve for o in outcomes if o.method == name and not o.why]
        if not curves:
            continue
        points = list(zip(*curves, strict=True))
        updates = [point[0][0] for point in points]
        rates = [statistics.mean(100 * won / episodes for _, episodes, won in point) for point in points]
        axes.plot(updates, rates, "-o" if number < 10 else "--s", markersize=3, linewidth=1.5, label=name)
    axes.set_xlabel("updates (those of the start included)")
    axes.set_ylabel("success on held-out starts, %")
    axes.set_ylim(0, 102)
    axes.set_title(f"{scenario.name}: {scenario.question}", fontsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "learning"}):
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
