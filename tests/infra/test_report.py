from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fleet.runfolder import RunFolder
from infra.intervals import wilson
from infra.report import latency_table, write_report
from infra.report_data import autonomous_success, curve, read_facts
from infra.results import CONTINUAL, add_results

START_NS = 1_700_000_000_000_000_000


class Writer:
    """Journal lines at stated seconds of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, at_s: float, kind: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time_ns": START_NS + int(at_s * 1e9), "kind": kind, **fields}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def fill(run: RunFolder) -> None:
    gateway, learner = Writer(run.logs / "gateway.jsonl"), Writer(run.logs / "learner.jsonl")
    episode = {"boot": "b", "judge": "robot", "first_version": 1, "last_version": 1}
    gateway(0, "member", robot="demo", event="joined")
    gateway(1, "durable", robot="demo", boot="b", seq=1, latency_ms=[100.0, 50.0], steps={"demo": 2})
    gateway(
        2,
        "episode",
        robot="demo",
        episode_id=1,
        task="push",
        outcome="success",
        length=70,
        operator_steps=0,
        source="demo",
        **episode,
    )
    gateway(60, "member", robot="sim-0", event="joined")
    learner(
        30, "sampleable", robot="demo", boot="b", seq=1, latency_ms=[29_100.0, 29_050.0]
    )  # executed before the learner was there
    learner(50, "published", version=1, step=2000)
    gateway(61, "loaded", robot="sim-0", version=1, latency_ms=11_000.0)  # published before the robot joined
    for i in range(20):  # sim-0 works from 60 s on; an episode each 6 s; the first half needs its operator
        at, helped = 62 + 6 * i, i < 10
        gateway(
            at,
            "durable",
            robot="sim-0",
            boot="c",
            seq=i + 1,
            latency_ms=[float(10 * i + 10), 5.0],
            steps={"policy": 1, "operator": 1},
        )
        learner(at + 0.1, "sampleable", robot="sim-0", boot="b", seq=i + 1, latency_ms=[float(10 * i + 110), 105.0])
        gateway(
            at,
            "episode",
            robot="sim-0",
            episode_id=i,
            task="push",
            outcome="success",
            length=100,
            operator_steps=40 if helped else 0,
            source="policy",
            **episode,
        )
    learner(100, "published", version=2, step=2500)
    learner(110, "published", version=3, step=3000)
    gateway(111, "loaded", robot="sim-0", version=3, latency_ms=1000.0)
    learner(
        150, "sampleable", robot="sim-0", boot="b", seq=1, latency_ms=[88_010.0, 88_005.0]
    )  # read again by a resumed learner
    learner(151, "resumed", step=2900, version=3)
    learner(170, "update", step=8000, loss=0.1, updates_per_s=100.0)
    gateway(171, "refused", robot="sim-0", error={"code": "fragment_refused"})
    with (run.logs / "learner.jsonl").open("a") as file:
        file.write('{"kind": "torn')
    rows = [
        {"version": 1, "label": "start", "at_ns": START_NS + 50 * 10**9, "task": "push", "episodes": 50, "successes": 20},
        {"version": 1, "label": "start", "at_ns": START_NS + 50 * 10**9, "task": "open", "episodes": 50, "successes": 30},
        {"version": 2, "label": "release", "at_ns": START_NS, "wall_s": 120, "task": "push", "episodes": 10, "successes": 8},
        {"version": 3, "label": "final", "at_ns": START_NS + 110 * 10**9, "task": "push", "episodes": 50, "successes": 49},
        {"version": 3, "label": "final", "at_ns": START_NS + 110 * 10**9, "task": "open", "episodes": 50, "successes": 50},
    ]
    (run.report / "evaluations.json").write_text(json.dumps(rows))


def report(run: RunFolder) -> dict[str, Any]:
    write_report(run)
    numbers: dict[str, Any] = json.loads((run.report / "report.json").read_text())
    return numbers


def test_numbers_of_a_known_run(run: RunFolder) -> None:
    fill(run)
    numbers = report(run)
    assert numbers["counts"] == {
        "steps_durable": 42,
        "steps_by_source": {"demo": 2, "operator": 20, "policy": 20},
        "episodes": 20,
        "episodes_with_operator": 10,
        "demonstrations": 1,
        "releases": 3,
        "updates": 8000,
        "robots": 2,
        "learner_resumed": 1,
        "process_restarts": 0,
        "robots_lost": 0,
        "refused": 1,
    }
    total = numbers["before_after"][-1]
    assert [entry["task"] for entry in numbers["before_after"]] == ["open", "push", "all tasks"]
    assert (total["start"]["rate"], total["final"]["rate"]) == (0.5, 0.99)
    assert total["final"]["low"] == pytest.approx(0.9455, abs=1e-3) and total["final"]["high"] == pytest.approx(
        0.9982, abs=1e-3
    )
    assert [row["minutes"] for row in numbers["evaluations"] if row["task"] == "push"] == pytest.approx([5 / 6, 11 / 6, 2])
    assert numbers["duration_s"] == 176.1


def test_latencies_leave_out_what_is_no_delay_of_the_system(run: RunFolder) -> None:
    fill(run)
    table = latency_table(run)
    assert table["durable"] == {"num": 42, "p50": 15.0, "p95": 179.5, "p99": 195.9}
    assert table["sampleable"]["num"] == 40 and table["sampleable"]["p99"] < 400  # neither the backlog nor the second reading
    assert table["loaded"] == {"num": 1, "p50": 1000.0, "p95": 1000.0, "p99": 1000.0}
    assert report(run)["latencies_left_out"] == {"durable": 0, "sampleable": 2, "loaded": 1}


def test_series_over_time(run: RunFolder) -> None:
    fill(run)
    numbers = report(run)
    shares = [share for _, share in autonomous_success(read_facts(run))["push"]]
    assert shares[9] == 0 and shares[14] == 0.5 and shares[-1] == 1.0
    bins = numbers["interventions_per_minute"]  # of 10 s: the run has three minutes
    assert [sum(b[i] for b in bins) / 6 for i in (1, 2)] == pytest.approx([10, 20])
    assert bins[0][0] == pytest.approx(65 / 60) and all(b[1] == 0 for b in bins if b[0] > 2.1)
    assert read_facts(run).lags["sim-0"] == [(61 / 60, 0), (100 / 60, 1), (110 / 60, 2), (111 / 60, 0)]
    assert numbers["version_lag"] == {"sim-0": {"mean": 0.24, "max": 2}}  # 10 s of one and 1 s of two, in 50 s


class Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name.endswith(("href", "src")) and value:
                self.links.append(value)


def test_the_page_needs_nothing_else(run: RunFolder) -> None:
    fill(run)
    path = write_report(run)
    assert path == run.report / "index.html"
    page = path.read_text()
    assert page.count("<svg") == 5 and "no data" not in page
    assert "http://" not in page and "https://" not in page and not re.search(r"<(script|link|img|iframe)|@import", page)
    parser = Ids()
    parser.feed(page)
    assert len(parser.ids) == len(set(parser.ids)) and parser.links
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    assert "99.0 % (99/100)" in page and "95 – 100 %" in page


def test_continual_evaluation_is_a_curve_with_intervals(run: RunFolder) -> None:
    for version, successes in ((1, 4), (5, 11), (9, 18)):
        add_results(run, version, START_NS + version * 60 * 10**9, CONTINUAL, {"push": (20, successes), "open": (20, 10)})
    Writer(run.logs / "gateway.jsonl")(0, "member", robot="sim-0", event="joined")
    numbers = report(run)
    points = curve(read_facts(run))["push"]
    assert [(p["version"], p["minutes"], p["rate"]) for p in points] == [(1, 1, 0.2), (5, 5, 0.55), (9, 9, 0.9)]
    assert all((p["low"], p["high"]) == wilson(p["successes"], 20) for p in points)
    ends = {entry["task"]: (entry["start"]["rate"], entry["final"]["rate"]) for entry in numbers["before_after"]}
    assert ends == {"push": (0.2, 0.9), "open": (0.5, 0.5), "all tasks": (0.35, 0.7)}
    assert "70.0 % (28/40)" in (run.report / "index.html").read_text()


def test_says_what_it_does_not_have(run: RunFolder) -> None:
    numbers = report(run)
    page = (run.report / "index.html").read_text()
    assert page.count("class=none>no data") == 6 and page.count("<svg") == 0
    assert numbers["before_after"] == [] and numbers["latencies_ms"] == {"durable": {}, "sampleable": {}, "loaded": {}}

    Writer(run.logs / "gateway.jsonl")(0, "durable", robot="<b>", boot="b", seq=1, latency_ms=[1.0], steps={"policy": 1})
    (run.report / "evaluations.json").write_text(
        json.dumps([{"version": 1, "label": "start", "at_ns": START_NS, "task": "<i>", "episodes": 4, "successes": 1}])
    )
    report(run)
    page = (run.report / "index.html").read_text()
    assert "not tested" in page and page.count("<svg") == 2 and "<i>" not in page


@pytest.mark.parametrize(("k", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (50, 50, 0.9287, 1.0)])
def test_wilson(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
