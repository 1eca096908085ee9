"""Which node gets which ranks, in many clusters."""

from __future__ import annotations

import dataclasses

import pytest

from fleet.errors import ConfigError
from learner.main import ClusterConfig
from learner.placement import KnownNodes, Node, plan


def node(name, cpus=8, gpus=0, here=False, robots=()):
    return Node(f"id-{name}", name, f"10.0.0.{len(name)}", cpus, gpus, here, robots)


LAPTOP = [node("a", 8, 0, here=True)]
BOX = [node("a", 64, 8, here=True)]
HEAD_AND_TWO = [node("head", 4, 0, here=True), node("b", 32, 8), node("c", 32, 8)]
THREE = [node("a", 8, 0, here=True), node("b", 8, 0), node("c", 8, 0)]


def shape(present, config, device="auto", lost=()):
    """Nodes by rank and GPUs of each."""
    made = plan(present, ClusterConfig(**config), device, lost)
    names = [slot.node.name for slot in made.slots]
    shards = list(made.shards)
    assert shards == sorted(shards) and len(set(shards)) == len(set(names))
    assert all((names[i] == names[j]) == (shards[i] == shards[j]) for i in range(len(names)) for j in range(len(names)))
    return "".join(name[0] for name in names), made.slots[0].gpus if made.slots else None


@pytest.mark.parametrize(
    ("nodes", "device", "config", "expected"),
    [
        (LAPTOP, "auto", {}, ("a", 0)),
        (LAPTOP, "auto", {"ranks": 4}, ("aaaa", 0)),
        (BOX, "auto", {}, ("a" * 8, 1)),
        (BOX, "cuda", {"ranks": 2}, ("aa", 1)),
        (BOX, "cpu", {}, ("a", 0)),
        (BOX, "auto", {"gpus_per_rank": 2}, ("aaaa", 2)),
        (BOX, "auto", {"gpus_per_rank": 0.5, "ranks": 16}, ("a" * 16, 0.5)),
        (BOX, "auto", {"gpus_per_rank": 0}, ("a", 0)),
        (HEAD_AND_TWO, "auto", {}, ("b" * 8 + "c" * 8, 1)),
        (HEAD_AND_TWO, "auto", {"ranks": 10}, ("b" * 8 + "c" * 2, 1)),
        (HEAD_AND_TWO, "cpu", {"ranks": 5}, ("hhhhb", 0)),
        (HEAD_AND_TWO, "auto", {"nodes": ["c"]}, ("c" * 8, 1)),
        (HEAD_AND_TWO, "auto", {"nodes": ["c", "b"], "ranks": 4}, ("ccbb", 1)),
        (THREE, "auto", {"nodes": ["c", "b", "a"]}, ("acb", 0)),
        (THREE, "auto", {"nodes": ["a", "b"], "ranks": 3}, ("aab", 0)),
        (THREE, "auto", {"ranks": 9, "cpus_per_rank": 2}, ("aaaabbbbc", 0)),
        (THREE, "auto", {"ranks": 2, "cpus_per_rank": 0}, ("aa", 0)),
        ([node("arm", 8, 1, robots=("7",)), *LAPTOP], "auto", {"ranks": 2}, ("aa", 0)),
        ([*LAPTOP, node("arm", 8, 0, robots=("7",))], "auto", {"ranks": 2, "nodes": ["a", "arm"]}, ("aa", 0)),
        ([node("x", 3, 3, here=True)], "auto", {"gpus_per_rank": 0.4, "ranks": 3, "cpus_per_rank": 0.5}, ("xxx", 0.4)),
    ],
)
def test_ranks_get_places(nodes, device, config, expected):
    assert shape(nodes, config, device) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "config", "says"),
    [
        (LAPTOP, "auto", {"gpus_per_rank": 1}, ["a: 8 CPUs, 0 GPUs", "room for 0", "cluster.gpus_per_rank=0"]),
        (LAPTOP, "cuda", {}, ["learner.device = 'cuda'", "a: 8 CPUs, 0 GPUs", "learner.device=auto"]),
        (LAPTOP, "auto", {"ranks": 9}, ["cluster.ranks = 9", "room for 8", "cluster.ranks=8", "cpus_per_rank"]),
        (LAPTOP, "auto", {"cpus_per_rank": 9}, ["cluster.ranks = 1 with 9 CPUs", "a smaller cluster.cpus_per_rank"]),
        (BOX, "auto", {"ranks": 9}, ["cluster.ranks = 9", "1 GPUs each", "cluster.ranks=8", "smaller cluster.gpus_per_rank"]),
        (BOX, "auto", {"gpus_per_rank": 16}, ["16 GPUs each", "64 CPUs, 8 GPUs", "room for 0"]),
        (BOX, "auto", {"gpus_per_rank": 1.5}, ["cluster.gpus_per_rank = 1.5", "whole number"]),
        ([node("a", 4, 8, here=True)], "auto", {}, ["cluster.ranks = 8 with 1 CPUs", "room for 4", "cpus_per_rank"]),
        (THREE, "auto", {"nodes": ["a", "dd"]}, ["cluster.nodes has 'dd'", "a: 8 CPUs", "--node-name dd"]),
        (THREE, "auto", {"nodes": ["a", "a"]}, ["'a' twice"]),
        (THREE, "auto", {"nodes": ["a", "b"], "ranks": 1}, ["cluster.ranks = 1", "2 nodes"]),
        ([*LAPTOP, node("a")], "auto", {}, ["2 nodes of the Ray cluster are called 'a'", "--node-name"]),
        ([node("b", 0, 0, here=True)], "auto", {}, ["room for 0"]),
    ],
)
def test_an_impossible_placement_says_what_there_is_and_what_to_change(nodes, device, config, says):
    with pytest.raises(ConfigError) as caught:
        plan(nodes, ClusterConfig(**config), device)
    assert [words for words in says if words not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("there", "config", "expected"),
    [
        ("ab", {"nodes": ["a", "b", "c"]}, "ab"),
        ("ac", {"nodes": ["a", "b", "c"], "ranks": 6}, "aacc"),
        ("ab", {"ranks": 20}, "a" * 8 + "b" * 8),
        ("ac", {"ranks": 10}, "a" * 8 + "cc"),
        ("a", {"ranks": 20, "min_ranks": 8}, "a" * 8),
        ("a", {"ranks": 20, "min_ranks": 9}, ""),
        ("a", {"nodes": ["a", "b", "c"], "min_ranks": 2}, ""),
        ("a", {"nodes": ["b", "c"]}, ""),
    ],
)
def test_training_goes_on_or_waits_when_nodes_are_lost(there, config, expected):
    now = [n for n in THREE if n.name in there]
    lost = [dataclasses.replace(n, id="") for n in THREE if n.name not in there]
    assert shape(now, config, lost=lost)[0] == expected
    made = plan(now, ClusterConfig(**config), "auto", lost)
    assert all(slot.node.id for slot in made.slots)
    assert plan(THREE, ClusterConfig(**config), "auto").better_than(made) == (len(expected) < made.wanted)
    if not expected:
        assert "nodes that are away" in made.waiting and "c" in made.waiting


def test_a_run_remembers_nodes_that_are_away(tmp_path):
    path = tmp_path / "nodes.json"
    assert KnownNodes(path).lost(THREE) == []
    [lost] = KnownNodes(path).lost(THREE[:2])
    assert (lost.name, lost.cpus, lost.here, lost.id) == ("c", 8, False, "")
    path.write_text("[{")
    assert KnownNodes(path).lost(THREE[:1]) == []
