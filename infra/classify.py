"""Training a success classifier on the episodes of a run that people and robots judged.

A classifier never learns from what a classifier said. Kept and asked in ``infra/classifier.py``.

Shape suffixes: N steps, E episodes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms import success
from algorithms.policies.base import INSTRUCTION
from algorithms.policies.statistics import Statistics
from algorithms.success import SuccessClassifier, SuccessConfig
from buffer.browse import Episode, read_episodes
from buffer.image_cache import ImageCache
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Within
from fleet.errors import ConfigError, NoData, SpecError
from fleet.robot import Source
from fleet.runfolder import RunFolder

JUDGE = "classifier:"  # how the names of classifiers begin, where labels say who judged
MIN_EPISODES = 5  # of successes and of failures: fewer cannot be split
CACHE_BYTES = 512 << 20
STATISTICS_STEPS = 8192
ROWS = 256  # that are read at once


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a classifier is trained.

    Args:
        reads: Observation features; () for all that all robots of the run have.
        last: Steps at an episode's end by which it is judged.
        held_out: Share of the episodes that thresholds and temperature are chosen by, in (0, 1).
        false_positives, false_negatives, confidence: What the thresholds keep to, ``algorithms.success.choose_thresholds``.

    Raises:
        ConfigError: A value is out of its range.
    """

    reads: tuple[str, ...] = ()
    last: int = 5
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    held_out: float = 0.3
    false_positives: float = 0.01
    false_negatives: float = 0.05
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("held_out", "false_positives", "false_negatives", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"a classifier with {name} = {getattr(self, name)}", rule="above 0, below 1")
        if min(self.last, self.steps, self.batch_size - 1) < 1:
            raise ConfigError(
                f"a classifier of the last {self.last} steps, trained for {self.steps} steps of {self.batch_size}",
                rule="at least 1, 1 and 2",
            )


class Reader:
    """Reads the steps of a run's finished episodes. Close it.

    Attributes:
        tasks: Of tasks.json, by name.
        episodes: Finished ones whose last step is there, of these tasks, not excluded.

    Raises:
        StorageError, RunFolderError: The log cannot be read.
    """

    def __init__(self, run: RunFolder) -> None:
        self.tasks: dict[str, Any] = json.loads((run.path / "tasks.json").read_text())
        self._embeddings = [torch.tensor(task["embedding"], dtype=torch.float32) for task in self.tasks.values()]
        known = read_episodes(run.buffer)  # first: what has ended by then is whole in what is read now
        self._sampler = Sampler(run.buffer, list(self.tasks), 0, cache=ImageCache(CACHE_BYTES))
        self._sampler.poll()
        self._fragments = self._by_episode()
        usable = [e for e in known if e.finished and not e.excluded and e.task in self.tasks]
        self.episodes = [e for e in usable if self._has_end(e)]

    @property
    def instruction_dim(self) -> int:
        return len(self._embeddings[0]) if self._embeddings else 0

    def close(self) -> None:
        self._sampler.close()

    def steps_of(self, episode: Episode) -> np.ndarray:
        """Numbers of its steps that are there, in order."""
        index = self._sampler.index
        found = self._fragments.get(index.episodes.find(episode.key), ())
        spans = [np.arange(index.first_step[f], index.first_step[f] + index.num_steps[f]) for f in found]
        return np.concatenate([np.empty(0, np.int64), *spans])

    def _by_episode(self) -> dict[int | None, np.ndarray]:
        """Fragments with steps, in order, by the number of their episode; of all episodes at once."""
        index = self._sampler.index
        fragments = np.array([f for boot in index.boots.values() for f in boot.fragments], np.int64)
        fragments = fragments[np.lexsort((index.first_frame[fragments], index.episode[fragments]))]
        episodes, first = np.unique(index.episode[fragments], return_index=True)
        return dict(zip(episodes.tolist(), np.split(fragments, first[1:]), strict=True)) if len(fragments) else {}

    def _has_end(self, episode: Episode) -> bool:
        last = self.steps_of(episode)[-1:]
        return bool((self._sampler.index.frame(last) + 1 == episode.length).any())

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of observation features; of all that all robots have where none is named.

        Raises:
            SpecError: A feature is no observation of every robot, or there is none.
        """
        features = [spec.observations for spec in self._sampler.specs]
        common = set.intersection(*map(set, features)) if features else set()
        missing = sorted(set(names) - common)
        if missing or not common:
            raise SpecError(
                f"{missing[0]!r} is no observation of all robots of this run" if missing else "the robots share no observation",
                rule="a classifier reads what every robot has",
                remedy=f"they all have {', '.join(sorted(common)) or 'none'}",
            )
        return {name: features[0][name].shape for name in sorted(names or common)}

    def read(self, steps_N: np.ndarray, names: Sequence[str]) -> tuple[dict[str, Tensor], np.ndarray]:
        """Observations at these steps, with the instruction; and the steps that they are of: others stand in for those with
        an image that cannot be decoded.

        Raises:
            SpecError: Robots have these features in different shapes.
            StorageError: The disk cannot be read, or more than half of the images cannot be decoded.
        """
        needs = BatchNeeds(max(1, len(steps_N)), 1, tuple(names), {tuple(Source): 1.0}, within=Within.EPISODE)
        windows = self._sampler.gather(self._sampler.windows_at(steps_N, needs))
        obs = {name: torch.from_numpy(value) for name, value in windows.obs.items()}
        obs[INSTRUCTION] = torch.stack(self._embeddings)[torch.from_numpy(windows.task_B)]
        return obs, windows.step_B


def truth(episode: Episode) -> bool | None:
    """Whether it succeeded, as a person or the robot said; None where nobody did."""
    if episode.judged_by.startswith(JUDGE):
        return None
    return {"success": True, "failure": False}.get(episode.outcome)


def split(episodes: Sequence[Episode], held_out: float, seed: int) -> tuple[list[Episode], list[Episode]]:
    """Judged episodes to train on and to hold out: of each task and outcome the same share, at least one where there are two.

    Raises:
        NoData: There are too few successes or failures; says how many of each.
    """
    judged = [e for e in episodes if truth(e) is not None]
    num = {said: sum(truth(e) is said for e in judged) for said in (True, False)}
    if min(num.values()) < MIN_EPISODES:
        raise NoData(
            f"{num[True]} successful and {num[False]} failed episodes were judged by people or robots",
            rule=f"a classifier is made of at least {MIN_EPISODES} of each",
            remedy="judge some with `fleet data label RUN outcome success|failure EPISODE ...`; `fleet data list` shows them",
        )
    groups: dict[tuple[str, bool], list[Episode]] = {}
    for episode in sorted(judged, key=lambda e: e.name):
        groups.setdefault((episode.task, truth(episode) is True), []).append(episode)
    train: list[Episode] = []
    held: list[Episode] = []
    for number, key in enumerate(sorted(groups)):
        group = groups[key]
        order = np.random.default_rng((seed, number)).permutation(len(group))
        count = min(max(1, round(held_out * len(group))), len(group) - 1)
        held += [group[i] for i in order[:count]]
        train += [group[i] for i in order[count:]]
    for part, name in ((train, "train on"), (held, "hold out")):
        if len({truth(e) for e in part}) < 2:
            raise NoData(
                f"of {len(judged)} judged episodes there are not both kinds to {name}",
                rule="each task gives its share of successes and of failures, where it has two",
                remedy="judge more episodes of each task",
            )
    return train, held


def train(reader: Reader, episodes: Sequence[Episode], settings: TrainSettings) -> SuccessClassifier:
    """A classifier without temperature, from judged episodes. A function of the data and the settings.

    Raises:
        SpecError: See ``Reader.shapes``.
    """
    config = SuccessConfig(reader.shapes(settings.reads), reader.instruction_dim, settings.last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        classifier = SuccessClassifier(config)
    classifier.set_statistics(_statistics(reader, episodes, classifier))
    positive, negatives = _pools(reader, episodes, settings.last)
    sizes = _shares(settings.batch_size // 2, len(negatives))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        rng = np.random.default_rng((settings.seed, step))
        rows = [rng.choice(positive, settings.batch_size - sum(sizes))]
        rows += [rng.choice(pool, size) for pool, size in zip(negatives, sizes, strict=True)]
        obs, steps_N = reader.read(np.concatenate(rows), list(config.reads))
        loss = classifier.loss(obs, torch.from_numpy(np.isin(steps_N, positive)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def scores(reader: Reader, classifier: SuccessClassifier, episodes: Sequence[Episode]) -> Tensor:
    """(E,) float64 of these episodes, before the temperature; NaN where no frame of the end can be read.

    Raises:
        PolicyError, SpecError: The classifier reads what the run's robots do not have, or in another shape.
    """
    lasts = [reader.steps_of(episode)[-classifier.config.last :] for episode in episodes]
    step_N = np.concatenate([np.empty(0, np.int64), *lasts])
    owner = dict(zip(step_N.tolist(), np.repeat(np.arange(len(lasts)), list(map(len, lasts))).tolist(), strict=True))
    logits, owners = [torch.empty(0)], [torch.empty(0, dtype=torch.long)]
    for first in range(0, len(step_N), ROWS):
        obs, read_N = reader.read(step_N[first : first + ROWS], list(classifier.config.reads))
        with torch.no_grad():
            logits.append(classifier(obs))
        owners.append(torch.tensor([owner[step] for step in read_N.tolist()]))
    return success.episode_scores(torch.cat(logits), torch.cat(owners), len(episodes))


def _pools(reader: Reader, episodes: Sequence[Episode], last: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Steps of successes' ends; and those that are none, in groups that share a batch: ends of failures, their other steps,
    and successes before the end. As many steps as are the end are left out before it: there both look the same."""
    succeeded = [reader.steps_of(e) for e in episodes if truth(e)]
    failed = [reader.steps_of(e) for e in episodes if not truth(e)]
    groups = ([s[-last:] for s in failed], [s[:-last] for s in failed], [s[: -2 * last] for s in succeeded])
    negatives = [np.concatenate(group) for group in groups]
    return np.concatenate([s[-last:] for s in succeeded]), [pool for pool in negatives if len(pool)]


def _shares(total: int, num: int) -> list[int]:
    """``total`` cut into ``num`` nearly equal parts."""
    edges = [i * total // num for i in range(num + 1)]
    return [b - a for a, b in itertools.pairwise(edges)]


def _statistics(reader: Reader, episodes: Sequence[Episode], classifier: SuccessClassifier) -> dict[str, Statistics]:
    """Of the vectors that it reads, over steps spread evenly over these episodes."""
    names = list(classifier.value.reader.normaliser.shapes)
    step_N = np.concatenate([reader.steps_of(e) for e in episodes])
    obs, _ = reader.read(step_N[:: -(-len(step_N) // STATISTICS_STEPS)], names)
    return {name: Statistics.of(obs[name].numpy()) for name in names}
