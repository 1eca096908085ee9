"""Every number that a run shows to Prometheus: one catalogue, and how facts of the journal become numbers.

The processes write facts once, to their journal; ``MeteredJournal`` counts them on the way. So the live view, the
report and the dashboards cannot disagree. What is not a fact for people (bytes, duplicates) is counted directly.

Labels that come from the network have a bounded number of values: what is beyond is counted as "other".
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import prometheus_client as prometheus

from fleet.errors import ConfigError, PortInUse
from fleet.journal import Journal

MAX_LABEL_VALUES = 256
OTHER = "other"
_IN_USE = (errno.EADDRINUSE,)
_LATENCY_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_SHORT_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: Without the unit and the suffix that Prometheus adds.
        type: "counter", "gauge" or "histogram".
        unit: "seconds", "bytes", or "" for plain counts.
        labels: Names of its labels.
        help: One line for people.
        buckets: Upper bounds of a histogram, in ``unit``.
    """

    name: str
    type: str
    unit: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


GATEWAY = (
    Metric("fleet_steps_ingested", "counter", "", ("robot", "source"), "Steps that became durable, by who acted"),
    Metric("fleet_fragments", "counter", "", ("robot",), "Fragments taken in"),
    Metric("fleet_fragment_payload", "counter", "bytes", ("robot",), "Payload of the fragments taken in"),
    Metric("fleet_duplicates", "counter", "", ("robot",), "Fragments that came again and were not kept twice"),
    Metric("fleet_clock_jumps", "counter", "", ("robot",), "Wall clock of a robot that jumped or is ahead of ours"),
    Metric("fleet_refused", "counter", "", ("robot", "code"), "Messages refused, by the code of the error"),
    Metric("fleet_interventions", "counter", "", ("robot", "task"), "Steps in which an operator acted, of closed episodes"),
    Metric("fleet_episodes", "counter", "", ("task", "outcome"), "Episodes closed"),
    Metric("fleet_robot_version_lag", "gauge", "", ("robot",), "Newest release minus the release that the robot acts with"),
    Metric("fleet_robot_spool_depth", "gauge", "", ("robot",), "Fragments in the robot's spool"),
    Metric("fleet_robot_last_seen", "gauge", "seconds", ("robot",), "Unix time of the robot's last sign of life"),
    Metric("fleet_robot_clock_offset", "gauge", "seconds", ("robot",), "Robot's clock minus the gateway's"),
    Metric("fleet_robots_live", "gauge", "", (), "Robots that are connected"),
    Metric("fleet_release", "gauge", "", (), "Newest release that the gateway has"),
    Metric("fleet_pulls", "counter", "bytes", ("robot",), "Bytes of releases sent"),
    Metric("fleet_durable_latency", "histogram", "seconds", (), "Step executed until durable", _LATENCY_S),
    Metric("fleet_loaded_latency", "histogram", "seconds", (), "Release published until in a robot's policy", _LATENCY_S),
    Metric("fleet_commit", "histogram", "seconds", (), "One group commit with its fsync", _SHORT_S),
    Metric("fleet_disk_free", "gauge", "bytes", (), "Room on the disk of the buffer"),
    Metric("fleet_buffer_stored", "gauge", "bytes", (), "Segments of the buffer that count"),
    Metric("fleet_buffer_retired", "counter", "bytes", ("why",), "Given up by retention: age, bytes"),
    Metric("fleet_buffer_damaged", "gauge", "", (), "Segments of the buffer with damage in them"),
    Metric("fleet_keeper_errors", "counter", "", (), "Rounds of the buffer's keeper that met an error"),
    Metric("fleet_disk_full", "counter", "", (), "Group commits and fragments that found no room on the disk"),
)
LEARNER = (
    Metric("fleet_learner_updates", "counter", "", (), "Optimiser steps"),
    Metric("fleet_learner_updates_rate", "gauge", "", (), "Optimiser steps a second"),
    Metric("fleet_learner_loss", "gauge", "", (), "Loss of the newest report"),
    Metric("fleet_sampleable_latency", "histogram", "seconds", (), "Step executed until the learner can sample it", _LATENCY_S),
    Metric("fleet_learner", "counter", "seconds", ("part",), "Time of the learner by part of an update, see learner/budget.py"),
    Metric("fleet_learner_batches_ready", "gauge", "", (), "Batches that are ready before the learner asks for them"),
    Metric("fleet_learner_undecodable", "counter", "", (), "Windows left out because an image of theirs cannot be decoded"),
    Metric("fleet_learner_damaged", "counter", "", (), "Places in the log that the learner could not read"),
    Metric("fleet_learner_skipped_fragments", "counter", "", (), "Fragments that the learner could not use"),
    Metric("fleet_learner_skipped_steps", "counter", "", (), "Steps of tasks that the learner does not know"),
    Metric("fleet_learner_image_cache_hits", "counter", "", (), "Images of batches that were there decoded"),
    Metric("fleet_learner_image_cache_misses", "counter", "", (), "Images of batches that had to be decoded"),
    Metric("fleet_learner_image_cache", "gauge", "bytes", (), "Memory that holds decoded images"),
    Metric("fleet_learner_release", "gauge", "", (), "Version of the newest release published"),
    Metric("fleet_learner_checkpoint_step", "gauge", "", (), "Step of the newest checkpoint"),
    Metric("fleet_buffer_steps", "gauge", "", ("source",), "Steps that can be sampled, by who acted"),
)
EVALUATOR = (
    Metric("fleet_evaluation_success", "gauge", "", ("task",), "Share of held-out starts on which the tested release succeeds"),
    Metric("fleet_evaluation_success_low", "gauge", "", ("task",), "Lower end of its 95 % interval"),
    Metric("fleet_evaluation_success_high", "gauge", "", ("task",), "Upper end of its 95 % interval"),
    Metric("fleet_evaluation_release", "gauge", "", (), "Newest release that was tested"),
    Metric("fleet_evaluation_duration", "gauge", "seconds", (), "How long its test took"),
    Metric("fleet_evaluation_skipped", "counter", "", (), "Releases that were due, and old before they could be tested"),
)

_CLASSES: dict[str, Any] = {
    "counter": prometheus.Counter,
    "gauge": prometheus.Gauge,
    "histogram": prometheus.Histogram,
}


class Metrics:
    """The metrics of one process, in a collector registry of their own.

    Args:
        catalogue: ``GATEWAY``, ``LEARNER`` or ``EVALUATOR``.
    """

    def __init__(self, catalogue: tuple[Metric, ...]) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._metrics = {metric.name: _make(metric, self.registry) for metric in catalogue}
        self._values: dict[str, set[str]] = collections.defaultdict(set)
        self._updates = 0

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Counts up. ``amount`` is not negative."""
        self._child(name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._child(name, labels).set(value)

    def observe(self, name: str, value: float) -> None:
        """One observation of a histogram; NaN and infinity are left out, below 0 (clocks that differ) counts as 0."""
        if math.isfinite(value):
            self._child(name, {}).observe(max(value, 0.0))

    def forget(self, name: str, **labels: str) -> None:
        """Takes back what was said for these labels, for example of a robot that left."""
        metric = self._metrics[name]
        metric.remove(*(labels[label] for label in metric._labelnames))

    def fact(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Counts one fact of the journal; kinds and fields are those of ``fleet/journal.py``."""
        handler = _FACTS.get(kind)
        if handler is not None:
            handler(self, fields)

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serves ``/metrics`` from a thread of its own and returns the port; 0 takes a free one.

        Raises:
            PortInUse: Another process listens there.
            ConfigError: The address cannot be listened on.
        """
        try:
            server, _ = prometheus.start_http_server(port, addr=host, registry=self.registry)
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) in _IN_USE:
                remedy = "stop the other process, or set another port; port 0 takes a free one"
                raise PortInUse(f"{host}:{port} for metrics is in use", rule="one process a port", remedy=remedy) from None
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error}", rule="an address of this machine") from None
        return int(server.server_port)

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**{key: self._bounded(key, value) for key, value in labels.items()}) if labels else metric

    def _bounded(self, label: str, value: str) -> str:
        known = self._values[label]
        if value not in known:
            if len(known) >= MAX_LABEL_VALUES:
                return OTHER
            known.add(value)
        return value


class MeteredJournal(Journal):
    """A journal whose facts are counted in ``metrics`` as they are written."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        super().__init__(path)
        self._metrics = metrics

    def write(self, kind: str, **fields: Any) -> None:
        super().write(kind, **fields)
        self._metrics.fact(kind, fields)


class Totals:
    """Turns totals that only grow, such as ``Progress.seconds``, into one counter with a label.

    Args:
        name: The counter.
        label: Its one label, the key of a total.
    """

    def __init__(self, metrics: Metrics, name: str, label: str) -> None:
        self._metrics, self._name, self._label = metrics, name, label
        self._seen: dict[str, float] = collections.defaultdict(float)

    def tell(self, totals: Mapping[str, float]) -> None:
        """Counts what came since the last call."""
        for key, total in totals.items():
            if total > self._seen[key]:
                self._metrics.add(self._name, total - self._seen[key], **{self._label: key})
                self._seen[key] = total


def _make(metric: Metric, registry: prometheus.CollectorRegistry) -> Any:
    more = {"buckets": metric.buckets} if metric.buckets else {}
    return _CLASSES[metric.type](metric.name, metric.help, metric.labels, unit=metric.unit, registry=registry, **more)


def _durable(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    latencies_ms = fields.get("latency_ms") or []
    for latency_ms in latencies_ms:
        metrics.observe("fleet_durable_latency", latency_ms / 1000)
    by_source = fields.get("steps") or {"unknown": len(latencies_ms)}
    for source, num_steps in by_source.items():
        metrics.add("fleet_steps_ingested", num_steps, robot=fields["robot"], source=source)
    if fields.get("clock_jumps"):
        metrics.add("fleet_clock_jumps", fields["clock_jumps"], robot=fields["robot"])


def _episode(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    task, outcome = str(fields["task"]), str(fields["outcome"])
    metrics.add("fleet_episodes", task=task, outcome=outcome)
    metrics.add("fleet_interventions", max(int(fields.get("operator_steps") or 0), 0), robot=fields["robot"], task=task)


def _loaded(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    metrics.observe("fleet_loaded_latency", fields["latency_ms"] / 1000)


def _sampleable(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    for latency_ms in fields.get("latency_ms") or []:
        metrics.observe("fleet_sampleable_latency", latency_ms / 1000)


def _update(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    metrics.add("fleet_learner_updates", max(int(fields["step"]) - metrics._updates, 0))
    metrics._updates = int(fields["step"])
    metrics.set("fleet_learner_loss", fields["loss"])
    metrics.set("fleet_learner_updates_rate", fields["updates_per_s"])


def _published(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    metrics.set("fleet_learner_release", fields["version"])


def _checkpoint(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    metrics.set("fleet_learner_checkpoint_step", fields["step"])


def _resumed(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    metrics._updates = int(fields["step"])
    metrics.set("fleet_learner_checkpoint_step", fields["step"])


def _retired(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    metrics.add("fleet_buffer_retired", max(int(fields["frees"]), 0), why=fields["why"])


def _evaluated(metrics: Metrics, fields: Mapping[str, Any]) -> None:
    for task, (rate, low, high) in fields["tasks"].items():
        metrics.set("fleet_evaluation_success", rate, task=task)
        metrics.set("fleet_evaluation_success_low", low, task=task)
        metrics.set("fleet_evaluation_success_high", high, task=task)
    metrics.set("fleet_evaluation_release", fields["version"])
    metrics.set("fleet_evaluation_duration", fields["seconds"])
    metrics.add("fleet_evaluation_skipped", fields["skipped"])


_FACTS = {
    "durable": _durable,
    "retired": _retired,
    "episode": _episode,
    "loaded": _loaded,
    "sampleable": _sampleable,
    "update": _update,
    "published": _published,
    "checkpoint": _checkpoint,
    "resumed": _resumed,
    "evaluated": _evaluated,
}
