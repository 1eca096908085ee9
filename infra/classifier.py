"""A success classifier in a folder of its own, what it was measured to be, and what it says of a run's episodes.

    FOLDER/classifier.json          settings, temperature, thresholds, what was measured, which episodes it was made of
    FOLDER/classifier.safetensors   its weights and statistics

Its name is "classifier:" and the first digits of the SHA-256 of classifier.json, which holds that of the weights. Labels name
it as their judge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algorithms.success import (
    SuccessClassifier,
    SuccessConfig,
    Thresholds,
    calibration_error,
    choose_thresholds,
    fit_temperature,
)
from buffer.browse import Episode
from buffer.labels import OUTCOME, Judged, Label
from fleet.errors import FleetError, NoData, PolicyError
from fleet.files import Files, storage_errors
from fleet.runfolder import RunFolder
from infra.classify import JUDGE, Reader, TrainSettings, scores, split, train, truth
from learner.tensor_file import dumps, read_tensors

FORMAT = "fleet-rl success classifier"
FACTS, WEIGHTS = "classifier.json", "classifier.safetensors"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """``facts``: classifier.json. ``judge``: its name in labels."""

    net: SuccessClassifier
    facts: Mapping[str, Any]
    judge: str

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(**self.facts["thresholds"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of which it saw judged episodes; it is asked about no other."""
        return tuple(self.facts["tasks"])

    @property
    def made_of(self) -> frozenset[str]:
        """Names of the episodes that it was trained and calibrated on."""
        return frozenset((*self.facts["train"], *self.facts["held_out"]))

    def measure(self, reader: Reader, episodes: Sequence[Episode]) -> dict[str, Any]:
        """What it says of judged episodes against what people and robots said; by task and of all."""
        return measure(
            scores(reader, self.net, episodes),
            episodes,
            self.thresholds,
            self.facts["temperature"],
            self.facts["settings"]["confidence"],
        )


def make(reader: Reader, settings: TrainSettings, run_id: str) -> tuple[SuccessClassifier, dict[str, Any]]:
    """A network and what belongs into classifier.json, without the hash of its weights.

    Raises:
        NoData: Too few episodes were judged, or not both ways.
        SpecError: See ``infra.classify.train``.
    """
    used, held = split(reader.episodes, settings.held_out, settings.seed)
    net = train(reader, used, settings)
    score_E = scores(reader, net, held)
    known_E = score_E.isfinite()
    score_E, held = score_E[known_E], [e for e, known in zip(held, known_E.tolist(), strict=True) if known]
    success_E = torch.tensor([truth(e) is True for e in held])
    rates = (settings.false_positives, settings.false_negatives, settings.confidence)
    thresholds, temperature = choose_thresholds(score_E, success_E, *rates), fit_temperature(score_E, success_E)
    return net, {
        "format": FORMAT,
        "made_ns": time.time_ns(),
        "run_id": run_id,
        "config": dataclasses.asdict(net.config),
        "settings": dataclasses.asdict(settings),
        "tasks": sorted({e.task for e in used}),
        "temperature": temperature,
        "thresholds": dataclasses.asdict(thresholds),
        "held_out_measured": measure(score_E, held, thresholds, temperature, settings.confidence),
        "train": [e.name for e in used],
        "held_out": [e.name for e in held],
    }


def measure(
    score_E: Tensor, episodes: Sequence[Episode], thresholds: Thresholds, temperature: float, confidence: float
) -> dict[str, Any]:
    """Errors of judged episodes with their bounds, episodes that it leaves open, and calibration before and after the
    temperature; ``by_task`` the errors of each task."""
    success_E = torch.tensor([truth(e) is True for e in episodes], dtype=torch.bool)
    known_E = score_E.isfinite()
    found = _errors(score_E, success_E, thresholds, confidence)
    for name, divisor in (("before", 1.0), ("after", temperature)):
        found[f"calibration_error_{name}"] = calibration_error((score_E / divisor)[known_E].sigmoid(), success_E[known_E])
    found["by_task"] = {}
    for task in sorted({e.task for e in episodes}):
        rows = torch.tensor([e.task == task for e in episodes])
        found["by_task"][task] = _errors(score_E[rows], success_E[rows], thresholds, confidence)
    return found


def _errors(score_E: Tensor, success_E: Tensor, thresholds: Thresholds, confidence: float) -> dict[str, Any]:
    named = zip(("false_positives", "false_negatives"), thresholds.errors(score_E, success_E, confidence), strict=True)
    rates = {name: {**dataclasses.asdict(rate), "at_most": rate.at_most} for name, rate in named}
    return {**rates, "not_judged": int((thresholds.judge(score_E) < 0).sum())}


def save(net: SuccessClassifier, facts: Mapping[str, Any], run: RunFolder, out: Path | None) -> tuple[Path, Classifier]:
    """Writes a new folder, by default in the run's ``classifiers``; classifier.json last: with it the folder is whole.

    Raises:
        PolicyError: The folder holds something already.
        StorageError: It cannot be written.
    """
    weights = bytes(dumps(net.state_dict()))
    text = json.dumps({**facts, "weights_sha256": hashlib.sha256(weights).hexdigest()}, indent=1).encode()
    judge = JUDGE + hashlib.sha256(text).hexdigest()[:12]
    folder = out or run.path / "classifiers" / judge.removeprefix(JUDGE)
    if folder.exists() and any(folder.iterdir()):
        raise PolicyError(f"{folder} is not empty", rule="a classifier is written into a new folder", remedy="name another one")
    with storage_errors(f"writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        Files().write_atomic(folder / WEIGHTS, weights)
        Files().write_atomic(folder / FACTS, text)
    return folder, load(folder)


def load(folder: Path) -> Classifier:
    """Raises PolicyError when the folder holds no whole classifier of ours."""
    try:
        text, weights = (folder / FACTS).read_bytes(), (folder / WEIGHTS).read_bytes()
        facts = json.loads(text)
        if facts["format"] != FORMAT or facts["weights_sha256"] != hashlib.sha256(weights).hexdigest():
            raise ValueError("the weights are not those that classifier.json speaks of")
        config = {**facts["config"], "reads": {name: tuple(shape) for name, shape in facts["config"]["reads"].items()}}
        net = SuccessClassifier(SuccessConfig(**config))
        net.load_state_dict(read_tensors(io.BytesIO(weights), len(weights))[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, FleetError) as error:
        raise PolicyError(
            f"{folder} holds no classifier that can be used: {error}"[:500],
            rule=f"{FACTS} and {WEIGHTS}, as `fleet data classify train` writes them",
            remedy="train one: `fleet data classify train RUN`",
        ) from None
    return Classifier(net.eval(), facts, JUDGE + hashlib.sha256(text).hexdigest()[:12])


def newest(run: RunFolder) -> Path:
    """The folder of the run's newest classifier.

    Raises:
        NoData: There is none.
    """
    found = [path.parent for path in (run.path / "classifiers").glob(f"*/{FACTS}")]
    if not found:
        raise NoData(f"{run.path} has no classifier", rule="one was trained", remedy="`fleet data classify train RUN`")
    return max(found, key=lambda folder: json.loads((folder / FACTS).read_bytes())["made_ns"])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a classifier says of an episode: "success", "failure", or "" where it does not know. ``confidence``: p of that."""

    episode: Episode
    outcome: str
    confidence: float


def may_judge(episode: Episode, judge: str, over: bool) -> bool:
    """Whether a classifier may say what became of this episode: where nobody else did, or another classifier did.

    Args:
        judge: The classifier's name.
        over: Also over a person's or the robot's judgement; an aborted episode has no end that could be judged.
    """
    said_later = Judged(episode.labels).outcome
    if said_later is not None and said_later.judge.startswith(JUDGE):
        return said_later.judge != judge
    if over:
        return episode.outcome in ("success", "failure", "unknown")
    return episode.outcome == "unknown" and said_later is None


def verdicts(reader: Reader, classifier: Classifier, episodes: Sequence[Episode]) -> list[Verdict]:
    """Raises PolicyError or SpecError where the run's robots do not have what the classifier reads."""
    shapes, dim = reader.shapes(tuple(classifier.net.config.reads)), classifier.net.config.instruction_dim
    if shapes != dict(classifier.net.config.reads) or reader.instruction_dim != dim:
        raise PolicyError(
            f"the run has {shapes} and instructions of {reader.instruction_dim} numbers",
            rule=f"this classifier reads {dict(classifier.net.config.reads)} and instructions of {dim}",
            remedy="train one on this run",
        )
    score_E = scores(reader, classifier.net, episodes)
    p_E = (score_E / classifier.facts["temperature"]).sigmoid().tolist()
    said_E = classifier.thresholds.judge(score_E).tolist()
    names = {1: "success", 0: "failure", -1: ""}
    rows = zip(episodes, said_E, p_E, strict=True)
    return [Verdict(e, names[said], p if said == 1 else 1 - p if said == 0 else max(p, 1 - p)) for e, said, p in rows]


def labels_of(found: Sequence[Verdict], judge: str, time_ns: int) -> list[Label]:
    """What is to be appended: of an episode that another classifier judged and this one does not know, that it is unknown.

    Args:
        time_ns: When the episodes were read: what people say from then on counts more.
    """
    labels = []
    for verdict in found:
        old = verdict.episode.judged_by.startswith(JUDGE) and verdict.episode.outcome != "unknown"
        outcome = verdict.outcome or ("unknown" if old else "")
        if outcome:
            labels.append(Label(*verdict.episode.key, OUTCOME, outcome, judge, time_ns))
    return labels
