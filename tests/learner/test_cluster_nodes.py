"""A Ray cluster of three nodes on this host, each a raylet of its own: ranks train on all, one node dies, and comes back."""

from __future__ import annotations

import json
import os
import secrets
import time

import psutil
import pytest

from fleet.errors import ConfigError, LearnerError
from learner.placement import KnownNodes, plan
from tests.learner.test_cluster import COUNT, SERVE, gone, until
from tests.learner_toys import make_run, make_tables

pytestmark = pytest.mark.timeout(240)
NAMES = ("head", "left", "right")


@pytest.fixture(scope="module")
def ray_nodes(tmp_path_factory):
    """Ray's own objects of the nodes by name; this process has joined the cluster with the token it was started with."""
    saved = dict(os.environ)
    token = tmp_path_factory.mktemp("keys") / "token"
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    from learner.cluster import start_ray, stop_ray
    from learner.cluster.session import _read_environment_again

    _read_environment_again()
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        nodes = {"head": cluster.add_node(node_name="head", num_cpus=2, include_dashboard=False)}
        nodes |= {n: cluster.add_node(node_name=n, num_cpus=2, resources={f"robot:arm-{n}": 1}) for n in NAMES[1:]}
        start_ray(cluster.address)
        yield cluster, nodes
    finally:
        stop_ray()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(saved)


def test_three_nodes_train_one_dies_and_comes_back(ray_nodes, tmp_path):
    from learner.cluster import LearnerHandle, Placed, launch, nodes, place_on

    cluster, raylets = ray_nodes
    there = nodes()
    assert [node.name for node in there] == list(NAMES) and there[0].here
    assert there[1].robots == ("arm-left",) and there[1].cpus == 2
    folders = {name: make_run(tmp_path / name) for name in NAMES}
    shared = folders["head"].checkpoints
    for name in NAMES[1:]:
        folders[name].checkpoints.rmdir()
        folders[name].checkpoints.symlink_to(shared)
    tables = make_tables(steps=10**6)
    tables["cluster"].nodes, tables["cluster"].min_ranks = list(NAMES), 2
    known = KnownNodes(tmp_path / "nodes.json")

    def make():
        now = nodes()
        return plan(now, tables["cluster"], "cpu", known.lost(now))

    paths = {name: run.path for name, run in folders.items()}
    learner = LearnerHandle(tables, make, paths, grow_after_s=3.0, function=COUNT)
    gateway = place_on("arm-right", ["python", "-c", "import time; time.sleep(300)"], tmp_path / "gateway.log")
    simulator = Placed("sim", SERVE, {}, num_cpus=0.5, node=there[2])
    try:
        until(simulator.poll, lambda s: s.report)
        first = until(learner.poll, lambda s: s.progress.get("step", 0) > 10)
        assert first.progress["stats"]["size"] == 3
        assert [(r["node"], r["shard"]) for r in first.ranks] == [("head", 0), ("left", 1), ("right", 2)]
        facts = [json.loads((folders[name].path / f"rank-{rank}.json").read_text()) for rank, name in enumerate(NAMES)]
        assert all(tuple(f["shards"]) == (0, 1, 2) for f in facts)

        raylets["right"].kill_raylet()
        killed = time.monotonic()
        two = until(learner.poll, lambda s: s.progress["stats"]["size"] == 2)
        print(f"node killed: training again with 2 ranks after {time.monotonic() - killed:.1f} s")
        assert [r["node"] for r in two.ranks] == ["head", "left"] and two.wanted == 3
        assert two.restarts == 1 and "rank 2 on right" in two.last_error
        assert two.progress["stats"]["began"] >= first.progress["step"]
        assert all(gone(r["pid"]) for r in first.ranks) and psutil.pid_exists(gateway)
        assert [node.name for node in nodes()] == ["head", "left"]
        lost = until(simulator.poll, lambda s: s.restarts)
        assert "sim ended" in lost.last_error
        with pytest.raises(LearnerError, match="node right"):
            launch(there[2], ["python", "-c", ""], tmp_path / "no.log")

        raylets["right"] = cluster.add_node(node_name="right", num_cpus=2, resources={"robot:arm-right": 1})
        back = time.monotonic()
        three = until(learner.poll, lambda s: s.progress["stats"]["size"] == 3)
        print(f"node back: training with 3 ranks after {time.monotonic() - back:.1f} s")
        assert three.restarts == 1 and three.progress["stats"]["began"] > two.progress["step"]
    finally:
        learner.stop()
        simulator.stop()
        psutil.Process(gateway).kill()
    tables["cluster"].nodes = ["head", "middle"]
    with pytest.raises(ConfigError, match="'middle', and the Ray cluster has head: 2 CPUs"):
        make()
