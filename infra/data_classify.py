"""``fleet data classify``: whether episodes succeeded that nobody judged. Each command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.command import AsJson, RunPath, clear_errors

if TYPE_CHECKING:
    from buffer.browse import Episode
    from infra.classifier import Classifier, Verdict
    from infra.classify import Reader

app = typer.Typer(
    no_args_is_help=True, help="A success classifier, made of judged episodes: train it, test it, let it judge the others."
)

Folder = Annotated[Path | None, typer.Option(help="The classifier's folder; default: the run's newest.")]


@app.command("train")
def train_command(
    run: RunPath,
    read: Annotated[list[str] | None, typer.Option(help="Read only this observation. May be given again.")] = None,
    last: Annotated[int, typer.Option(min=1, help="Steps at an episode's end by which it is judged.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps.")] = 1000,
    held_out: Annotated[float, typer.Option(min=0.05, max=0.9, help="Share of episodes kept for thresholds and tests.")] = 0.3,
    false_positives: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="At most this share of failures may pass for successes.")
    ] = 0.01,
    false_negatives: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="At most this share of successes may pass for failures.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the weights and the batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A new folder; default: in the run's classifiers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a classifier on what people and robots judged, and say what it is worth on episodes held out from that.

    The rates hold with 95 % confidence for episodes like those held out, where there are enough of them; else the thresholds
    lie beyond all mistakes, and what is sure then is said. No label is written.
    """
    with clear_errors(), _opened(run) as (opened, reader):
        from infra.classifier import make, save
        from infra.classify import TrainSettings

        settings = TrainSettings(
            reads=tuple(read or ()),
            last=last,
            steps=steps,
            held_out=held_out,
            false_positives=false_positives,
            false_negatives=false_negatives,
            seed=seed,
        )
        folder, classifier = save(*make(reader, settings, opened.run_id), opened, out)
        if as_json:
            return print(json.dumps({"folder": str(folder), "judge": classifier.judge, **classifier.facts}, indent=1))
        typer.echo(f"{classifier.judge}: {folder}")
        typer.echo(f"trained on {len(classifier.facts['train'])} episodes, {len(classifier.facts['held_out'])} held out")
        _show(classifier, classifier.facts["held_out_measured"], "held-out")


@app.command("test")
def test_command(run: RunPath, classifier: Folder = None, as_json: AsJson = False) -> None:
    """Compare a classifier with what people and robots said of episodes that it was not made of."""
    with clear_errors(), _opened(run) as (opened, reader):
        from fleet.errors import NoData
        from infra.classifier import load, newest
        from infra.classify import truth

        known = load(classifier or newest(opened))
        seen = known.made_of if known.facts["run_id"] == opened.run_id else frozenset()
        fresh = [e for e in reader.episodes if truth(e) is not None and e.task in known.tasks and e.name not in seen]
        if not fresh:
            raise NoData(
                f"no episode of {', '.join(known.tasks)} was judged that {known.judge} was not made of",
                rule="a test is of other episodes than the training",
                remedy="judge some with `fleet data label RUN outcome success|failure EPISODE ...`",
            )
        found = known.measure(reader, fresh)
        if as_json:
            return print(json.dumps({"judge": known.judge, "episodes": len(fresh), **found}, indent=1))
        typer.echo(f"{known.judge}: {len(fresh)} episodes that it was not made of")
        _show(known, found, "other")


@app.command("apply")
def apply_command(
    run: RunPath,
    classifier: Folder = None,
    over: Annotated[bool, typer.Option("--over", help="Also over what people and robots said.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write the labels; else only say what they would be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a classifier judge finished episodes that nobody judged. A running learner heeds the labels within seconds.

    It says success or failure where its thresholds do, and else nothing. What another classifier said is replaced; what a
    person says later always counts more.
    """
    with clear_errors():
        import time

        now_ns = time.time_ns()
        with _opened(run) as (opened, reader):
            from buffer.labels import append_labels
            from infra.classifier import labels_of, load, may_judge, newest, verdicts

            known = load(classifier or newest(opened))
            open_ones = [e for e in reader.episodes if may_judge(e, known.judge, over)]
            asked = [e for e in open_ones if e.task in known.tasks]
            found = verdicts(reader, known, asked)
            labels = labels_of(found, known.judge, now_ns)
            if yes and labels:
                append_labels(opened.buffer, labels)
            if as_json:
                rows = [{"name": v.episode.name, "outcome": v.outcome, "confidence": v.confidence} for v in found]
                return print(json.dumps({"judge": known.judge, "written": yes, "episodes": rows}, indent=1))
            _show_verdicts(known, found, [e for e in open_ones if e.task not in known.tasks])
            typer.echo(f"{len(labels)} labels {'written' if yes else 'would be written; --yes does it'}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Reader]]:
    """A run's folder and a reader of its episodes."""
    from fleet.runfolder import RunFolder
    from infra.classify import Reader

    run = RunFolder.open(path)
    with contextlib.closing(Reader(run)) as reader:
        yield run, reader


def _show(classifier: Classifier, found: Mapping[str, Any], which: str) -> None:
    """What was measured, and what is sure of it."""
    from infra.tables import console, table

    rows = [(task, *_cells(of_task)) for task, of_task in found["by_task"].items()]
    console().print(table("task|>failures|>passed for success|>successes|>passed for failure|>not judged", rows))
    settings = classifier.facts["settings"]
    for name, passed in (
        ("false_positives", "failures pass for successes"),
        ("false_negatives", "successes pass for failures"),
    ):
        rate = found[name]
        sure = f"with {100 * rate['confidence']:.3g} % confidence at most {100 * rate['at_most']:.3g} % of all like them"
        typer.echo(f"{rate['mistakes']} of {rate['episodes']} {which} {passed}; {sure}")
        _say_too_few(rate, settings[name])
    before, after = found["calibration_error_before"], found["calibration_error_after"]
    temperature = classifier.facts["temperature"]
    typer.echo(f"calibration error {100 * after:.1f} % with temperature {temperature:.3g}, {100 * before:.1f} % without")


def _say_too_few(rate: Mapping[str, Any], asked: float) -> None:
    from algorithms.success import episodes_needed

    if rate["at_most"] > asked:
        needed = episodes_needed(asked, rate["confidence"])
        typer.echo(
            f"  the {100 * asked:.3g} % that were asked for are NOT shown: that takes {needed} episodes without a mistake"
        )


def _cells(found: Mapping[str, Any]) -> tuple[int, ...]:
    passed, failed = found["false_positives"], found["false_negatives"]
    return passed["episodes"], passed["mistakes"], failed["episodes"], failed["mistakes"], found["not_judged"]


def _show_verdicts(classifier: Classifier, found: Sequence[Verdict], others: Sequence[Episode]) -> None:
    """By task what was said, and which episodes were not asked about."""
    from infra.tables import console, table

    rows = []
    for task in sorted({v.episode.task for v in found}):
        of_task = [v for v in found if v.episode.task == task]
        said = [v for v in of_task if v.outcome]
        counts = [sum(v.outcome == outcome for v in of_task) for outcome in ("success", "failure", "")]
        confidence = f"{100 * sum(v.confidence for v in said) / len(said):.0f} %" if said else "-"
        rows.append((task, len(of_task), *counts, confidence))
    console().print(table("task|>episodes|>success|>failure|>not judged|>mean confidence", rows))
    if others:
        tasks = ", ".join(sorted({e.task for e in others}))
        typer.echo(f"{len(others)} episodes of tasks that {classifier.judge} was not made for are left: {tasks}")
