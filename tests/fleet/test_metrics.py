"""The catalogue of metrics, and how facts of the journal become numbers."""

import urllib.request

import pytest

from fleet.errors import PortInUse
from fleet.journal import read_journal
from fleet.metrics import GATEWAY, LEARNER, MAX_LABEL_VALUES, OTHER, MeteredJournal, Metrics, Totals


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_every_metric_of_the_catalogue_is_served():
    for catalogue in (GATEWAY, LEARNER):
        metrics = Metrics(catalogue)
        port = metrics.serve(0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        for metric in catalogue:
            name = f"{metric.name}_{metric.unit}" if metric.unit else metric.name
            assert f"# HELP {name}" in text and metric.help in text


def test_two_processes_cannot_serve_one_port():
    port = Metrics(GATEWAY).serve(0)
    with pytest.raises(PortInUse, match=str(port)):
        Metrics(LEARNER).serve(port)


def test_facts_are_written_and_counted(tmp_path):
    metrics = Metrics(GATEWAY)
    journal = MeteredJournal(tmp_path / "gateway.jsonl", metrics)
    journal.write("durable", robot="arm-1", boot="b", seq=1, latency_ms=[30.0, 700.0, -4.0], steps={"policy": 2, "operator": 1})
    journal.write("durable", robot="arm-1", boot="b", seq=2, latency_ms=[30.0])
    journal.write("episode", robot="arm-1", task="reach", outcome="success", operator_steps=40)
    journal.write("loaded", robot="arm-1", version=3, latency_ms=250.0)
    journal.write("member", robot="arm-1", event="joined")
    journal.close()
    assert len(list(read_journal(tmp_path / "gateway.jsonl"))) == 5
    assert value(metrics, "fleet_steps_ingested_total", robot="arm-1", source="operator") == 1
    assert value(metrics, "fleet_steps_ingested_total", robot="arm-1", source="unknown") == 1
    assert value(metrics, "fleet_durable_latency_seconds_count") == 4
    assert value(metrics, "fleet_durable_latency_seconds_bucket", le="0.5") == 3
    assert value(metrics, "fleet_episodes_total", task="reach", outcome="success") == 1
    assert value(metrics, "fleet_interventions_total", robot="arm-1", task="reach") == 40
    assert value(metrics, "fleet_loaded_latency_seconds_sum") == 0.25


def test_the_learner_counts_updates_across_a_resume(tmp_path):
    metrics = Metrics(LEARNER)
    journal = MeteredJournal(tmp_path / "learner.jsonl", metrics)
    journal.write("resumed", step=1000, version=4)
    journal.write("update", step=1100, loss=0.5, updates_per_s=200.0)
    journal.write("sampleable", robot="arm-1", seq=1, latency_ms=[100.0, 200.0])
    journal.write("published", version=5, step=1100)
    journal.write("checkpoint", step=1100)
    assert value(metrics, "fleet_learner_updates_total") == 100
    assert value(metrics, "fleet_learner_loss") == 0.5
    assert value(metrics, "fleet_sampleable_latency_seconds_count") == 2
    assert value(metrics, "fleet_learner_release") == 5 and value(metrics, "fleet_learner_checkpoint_step") == 1100


def test_labels_from_the_network_are_bounded():
    metrics = Metrics(GATEWAY)
    for n in range(MAX_LABEL_VALUES + 50):
        metrics.add("fleet_episodes", task=f"task {n}", outcome="success")
    assert value(metrics, "fleet_episodes_total", task=OTHER, outcome="success") == 50


def test_totals_become_a_counter():
    metrics = Metrics(LEARNER)
    totals = Totals(metrics, "fleet_learner", "part")
    totals.tell({"forward": 1.5, "wait": 0.0})
    totals.tell({"forward": 2.0, "poll": 1.0})
    totals.tell({"forward": 1.0})  # never backwards
    totals.tell({"forward": 2.5})
    assert value(metrics, "fleet_learner_seconds_total", part="forward") == 2.5
    assert value(metrics, "fleet_learner_seconds_total", part="poll") == 1.0
