"""Makes the report of a run: one HTML file that needs nothing else, and the same numbers as JSON.

Plots are inline SVG. What a run does not have is said in its place; nothing is left out silently.
"""

from __future__ import annotations

import html
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.runfolder import RunFolder
from infra.report_data import (
    LATENCIES,
    Facts,
    autonomous_success,
    before_after,
    bin_minutes,
    curve,
    interventions_per_minute,
    lag_series,
    latency_table,
    mean_lag,
    percentiles,
    read_facts,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["latency_table", "write_report"]

COLOURS = ("#3366aa", "#d1742f", "#3a8f5c", "#a6476b", "#7b6bb5", "#8a7a3b", "#4aa3b5", "#666666")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0; }
.muted { color: #666; } .none { color: #888; background: #f6f6f4; padding: 1.5rem; text-align: center; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { padding: .25rem .9rem .25rem 0; text-align: right; }
th { font-weight: 600; border-bottom: 1px solid #ccc; } td:first-child, th:first-child { text-align: left; }
tr.total td { border-top: 1px solid #ccc; font-weight: 600; } svg { width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: 0 2rem; }
"""


def write_report(run: RunFolder) -> Path:
    """Writes report/index.html and report/report.json of a run; returns the path of the former."""
    facts = read_facts(run)
    numbers = {
        "run_id": facts.run_id,
        "made_ns": time.time_ns(),
        "duration_s": (facts.end_ns - facts.start_ns) / 1e9,
        "counts": facts.counts,
        "before_after": before_after(facts),
        "evaluations": facts.evaluations,
        "latencies_ms": {name: percentiles(values) for name, values in facts.latencies_ms.items()},
        "latencies_left_out": facts.left_out,
        "autonomous_success": autonomous_success(facts),
        "interventions_per_minute": interventions_per_minute(facts),
        "version_lag": {robot: _lag_summary(points) for robot, points in facts.lags.items()},
    }
    run.report.mkdir(exist_ok=True)
    (run.report / "report.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    path = run.report / "index.html"
    path.write_text(_page(facts, numbers), encoding="utf-8")
    return path


def _lag_summary(points: list[tuple[float, int]]) -> dict[str, float]:
    mean = mean_lag(points, points[0][0], points[-1][0])
    return {"mean": round(mean or 0.0, 3), "max": max(lag for _, lag in points)}


def _page(facts: Facts, numbers: dict[str, Any]) -> str:
    name = html.escape(facts.run_id)
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.start_ns / 1e9)) if facts.start_ns else "never"
    plots = [
        ("Success on held-out starts", "Each tested release, with Wilson 95 % intervals.", plot_curve),
        ("Success of the fleet at work", "Last 10 episodes a task that succeeded without an operator.", _plot_autonomous),
        ("Interventions per minute", "Episodes in which an operator took over, by when they ended.", plot_interventions),
        ("Version lag", "Releases that are published and not yet loaded, by robot: mean over time.", _plot_lags),
        ("Latencies", "Share of steps, or of releases on a robot, that took at most so long.", _plot_latencies),
    ]
    figures = "".join(
        f"<section><h2>{title}</h2><p class=muted>{text}</p>{_svg(draw, facts) or _none()}</section>"
        for title, text, draw in plots
    )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>"
        f"<p class=muted>started {started}, {numbers['duration_s'] / 60:.1f} minutes</p>"
        f"<h2>Before and after, on held-out starts</h2>{_before_after_table(numbers['before_after'])}"
        f"<div class=plots>{figures}</div>"
        f"<h2>Latencies</h2>{_latency_rows(facts, numbers)}<h2>Counts</h2>{_count_rows(facts.counts)}</body></html>\n"
    )


def _none() -> str:
    return "<p class=none>no data</p>"


def _table(head: list[str], rows: list[list[str]], last_is_total: bool = False) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for index, row in enumerate(rows):
        mark = " class=total" if last_is_total and index == len(rows) - 1 else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _before_after_table(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return _none()

    def cells(result: dict[str, Any] | None) -> list[str]:
        if result is None:
            return ["not tested", ""]
        low, high = 100 * result["low"], 100 * result["high"]
        return [f"{100 * result['rate']:.1f} % ({result['successes']}/{result['episodes']})", f"{low:.0f} – {high:.0f} %"]

    rows = [[entry["task"], *cells(entry["start"]), *cells(entry["final"])] for entry in entries]
    return _table(["task", "before", "95 % interval", "after", "95 % interval"], rows, entries[-1]["task"] == "all tasks")


def _latency_rows(facts: Facts, numbers: dict[str, Any]) -> str:
    rows = []
    for name, label in LATENCIES.items():
        found = numbers["latencies_ms"][name]
        cells = [f"{found[q]:,.0f} ms" for q in ("p50", "p95", "p99")] if found else ["no data", "", ""]
        rows.append([label, *cells, f"{int(found.get('num', 0)):,}", f"{facts.left_out[name]:,}"])
    note = (
        "<p class=muted>Left out: steps executed before the learner was started, and releases published before the robot "
        "that loaded them had joined.</p>"
    )
    return _table(["", "P50", "P95", "P99", "values", "left out"], rows) + note


def _count_rows(counts: dict[str, Any]) -> str:
    rows = []
    for name, value in counts.items():
        if isinstance(value, dict):
            rows += [[f"{name.replace('_', ' ')}: {key}", f"{number:,}"] for key, number in value.items()]
        else:
            rows.append([name.replace("_", " "), f"{value:,}"])
    return _table(["", ""], rows)


def _svg(draw: Callable[[Axes, Facts], bool], facts: Facts) -> str:
    """One plot as an SVG element, "" when there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": draw.__name__}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes, facts):
            return ""
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.set_xlabel(axes.get_xlabel() or "minutes since the run started")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = out.getvalue()
    # Inside HTML the prologue, the names of namespaces and the metadata block mean nothing, and point elsewhere.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    return _own_ids(text, draw.__name__).replace("xlink:href", "href")


def _own_ids(svg: str, prefix: str) -> str:
    """Plots of one page must not share ids, or one would use another's marks."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")


def _colours(names: list[str]) -> dict[str, str]:
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(sorted(names))}


def plot_curve(axes: Axes, facts: Facts) -> bool:
    """Success of the tested releases over time, by task. False when there is nothing to draw."""
    points_by_task = curve(facts)
    for (task, points), colour in zip(points_by_task.items(), _colours(list(points_by_task)).values(), strict=True):
        points = sorted((p for p in points if "rate" in p), key=lambda p: p["minutes"])
        minutes, rates = [p["minutes"] for p in points], [100 * p["rate"] for p in points]
        bars = [[100 * (p["rate"] - p["low"]) for p in points], [100 * (p["high"] - p["rate"]) for p in points]]
        axes.errorbar(minutes, rates, yerr=bars, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.4, label=task)
    return _finish_rates(axes, bool(points_by_task))


def _plot_autonomous(axes: Axes, facts: Facts) -> bool:
    series = autonomous_success(facts)
    for (task, points), colour in zip(series.items(), _colours(list(series)).values(), strict=True):
        axes.plot([m for m, _ in points], [100 * rate for _, rate in points], color=colour, linewidth=1.4, label=task)
    return _finish_rates(axes, bool(series))


def _finish_rates(axes: Axes, has_data: bool) -> bool:
    if has_data:
        axes.set_ylim(0, 103)
        axes.set_ylabel("success, %")
        axes.legend(frameon=False, fontsize=9)
    return has_data


def plot_interventions(axes: Axes, facts: Facts) -> bool:
    """Episodes a minute, and those with an intervention. False when there is nothing to draw."""
    bins, width = interventions_per_minute(facts), 0.9 * bin_minutes(facts)
    if not bins:
        return False
    middles = [middle for middle, _, _ in bins]
    axes.bar(middles, [episodes for _, _, episodes in bins], width=width, color="#e3e3df", label="episodes")
    axes.bar(middles, [number for _, number, _ in bins], width=width, color=COLOURS[1], label="with intervention")
    axes.set_ylabel("per minute")
    axes.legend(frameon=False, fontsize=9)
    return True


def _plot_lags(axes: Axes, facts: Facts) -> bool:
    lags = {robot: points for robot, points in lag_series(facts).items() if points}
    for (robot, points), colour in zip(lags.items(), _colours(list(lags)).values(), strict=True):
        axes.plot([m for m, _ in points], [lag for _, lag in points], color=colour, linewidth=1.2, alpha=0.85, label=robot)
    if lags:
        axes.set_ylabel("releases")
        axes.set_ylim(bottom=0)
        if len(lags) <= len(COLOURS):
            axes.legend(frameon=False, fontsize=9, ncols=2)
    return bool(lags)


def _plot_latencies(axes: Axes, facts: Facts) -> bool:
    series = {name: sorted(values) for name, values in facts.latencies_ms.items() if values}
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        shares = [100 * (index + 1) / len(values) for index in range(len(values))]
        axes.plot(values, shares, color=colour, linewidth=1.4, label=LATENCIES[name])
    if series:
        axes.set_xscale("log")
        axes.set_xlabel("ms")
        axes.set_ylabel("share, %")
        axes.set_ylim(0, 103)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    return bool(series)
