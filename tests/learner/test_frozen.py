"""A policy with a frozen backbone goes through the learner: it is trained nowhere, kept nowhere, published nowhere."""

import copy

import pytest
import torch
from safetensors.torch import load

from algorithms.ema import Ema
from algorithms.policies.frozen import fingerprints, require_same_frozen
from algorithms.policies.registry import build, describe, load_published, published, rebuild
from fleet.errors import LearnerError, PolicyError
from fleet.server.releases import ReleaseStore
from learner.checkpoint import Checkpoints
from learner.main import PolicyConfig
from learner.policy import make_policy
from learner.ranks import RankPlace, Ranks
from tests.learner import frozen_toys
from tests.learner_toys import SPEC, MemorySource, make_run, make_tables, make_toy_loop, state_of, train_toy

FAMILY = "tests.learner.frozen_toys:BackbonePolicy"
LEARNT = {"normaliser.mean_S", "normaliser.std_S", "head.weight", "head.bias", "body.adapter.weight", "body.adapter.bias"}
CONFIG = {"reads": {"observation.state": [3]}, "action_dim": 2}


def tables(**learner):
    made = make_tables(**{"start_steps": 0, **learner})
    made["policy"].family, made["policy"].config = FAMILY, {}
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("frozen") / "run")
    return run, train_toy(run, tables())


def test_a_release_holds_what_is_learnt(trained):
    run, loop = trained
    store = ReleaseStore(run.releases)
    manifest, data = store.manifest(store.newest()), store.load(store.newest())
    policy = loop._algorithm.parts["policy"].module
    backbone = sum(tensor.numel() * tensor.element_size() for tensor in policy.body["backbone"].state_dict().values())
    assert set(load(data)) == LEARNT and len(data) < backbone
    assert manifest.policy["frozen"] == {"body.backbone": fingerprints(policy)["body.backbone"]}
    rebuilt = rebuild(manifest.policy)
    load_published(rebuilt, load(data))
    obs = {"observation.state": torch.randn(5, 3)}
    assert torch.equal(rebuilt.act(obs).actions_BHA, loop._algorithm.acting().act(obs).actions_BHA)


def test_nothing_trains_or_keeps_a_frozen_module(trained):
    run, loop = trained
    algorithm, fresh = loop._algorithm, build(FAMILY, CONFIG)
    policy, average = algorithm.parts["policy"].module, algorithm.acting()
    for name, tensor in policy.body["backbone"].state_dict().items():
        assert torch.equal(tensor, fresh.body["backbone"].state_dict()[name]), name
    assert average.body["backbone"] is policy.body["backbone"] and average.head is not policy.head
    assert not policy.body["backbone"].training and not any(p.requires_grad for p in policy.body["backbone"].parameters())
    kept = Checkpoints(run.checkpoints).newest().state
    assert set(kept["parts"]["policy"]) == set(kept["algorithm"]["ema"]) == LEARNT
    assert set(kept["optimizers"]["policy"]["state"]) == LEARNT - {"normaliser.mean_S", "normaliser.std_S"}


def test_a_resumed_run_builds_it_anew(tmp_path, trained):
    _, straight = trained
    run = make_run(tmp_path / "cut")
    train_toy(run, tables(steps=20))
    resumed, whole = state_of(train_toy(run, tables())), state_of(straight)
    assert set(resumed) == set(whole) and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_other_files_are_refused_by_robots_and_by_who_goes_on(tmp_path, trained, monkeypatch):
    run, loop = trained
    described = describe(loop._algorithm.acting())
    monkeypatch.setattr(frozen_toys, "FILES", 2)
    mine = fingerprints(build(FAMILY, CONFIG))["body.backbone"]
    with pytest.raises(PolicyError) as caught:
        rebuild(described)
    said = str(caught.value)
    assert "'body.backbone'" in said and mine[:12] in said and described["frozen"]["body.backbone"][:12] in said
    with pytest.raises(PolicyError, match=r"'body\.backbone' is sha256 .* here"):
        make_toy_loop(run, tables(steps=80), MemorySource(1000))


class OtherNode(Ranks):
    """Two ranks, of which the other one has other files."""

    def __init__(self):
        super().__init__(RankPlace())
        self.size = 2

    def gather_bytes(self, data):
        return [data, b'{"body.backbone": "0123"}']


def test_ranks_with_other_files_do_not_begin():
    with pytest.raises(LearnerError, match=r"'body\.backbone' of ranks \[1\] differs"):
        make_policy(PolicyConfig(FAMILY), None, [SPEC], 4, MemorySource(10), OtherNode())


def test_a_policy_without_the_module_is_refused():
    policy = build("mlp", {**CONFIG, "width": 8})
    require_same_frozen(policy, {})
    with pytest.raises(PolicyError, match=r"'vlm' is absent here; .*trained with sha256 0123"):
        require_same_frozen(policy, {"frozen": {"vlm": "0123456789abcdef"}})
    policy.frozen = ("nothing",)
    with pytest.raises(PolicyError, match="'nothing' as frozen"):
        fingerprints(policy)


def test_the_average_writes_to_no_shared_buffer():
    """A buffer that is written to counts as changed, and would be sent from rank to rank after each update."""
    policy = build(FAMILY, CONFIG)
    average = Ema(policy, 0.9)
    versions = [buffer._version for buffer in policy.buffers()]
    average.update(0)
    assert [buffer._version for buffer in policy.buffers()] == versions
    state = copy.deepcopy(average.state_dict())
    with torch.no_grad():
        policy.head.weight.add_(1.0)
    average.update(1)
    assert not torch.equal(average.state_dict()["head.weight"], state["head.weight"])
    average.load_state_dict(state)
    assert torch.equal(average.module.head.weight, state["head.weight"]) and set(published(average.module)) == LEARNT
