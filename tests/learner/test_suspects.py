"""What a learner says when a loss or gradient is not finite."""

import dataclasses

import pytest
import torch
from torch import nn

from algorithms.base import LossOutput, Part
from fleet.errors import LearnerError
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.suspects import find_suspects
from tests.batches import make_batch
from tests.learner.engine_toys import ALONE, CPU
from tests.learner_toys import BrokenSource, MemorySource, make_run, make_tables, train_toy


def batch(rows=4, **fields):
    obs = {"observation.state": torch.zeros(rows, 3), "observation.images.top": torch.zeros(rows, 2, 2, 3, dtype=torch.uint8)}
    known = {"episode_B": torch.arange(rows) + 70, "frame_B": torch.arange(rows) + 500}
    return make_batch(obs, torch.zeros(rows, 2, 2), **{**known, **fields})


def said(batch, losses=(), parameters=None):
    return find_suspects(batch, losses, parameters or {}, ALONE)


def test_nothing_is_said_of_what_is_as_usual():
    usual = batch()
    usual.actions_BHA[1, 1] = float("nan")  # masked
    usual.mask_BH[1, 1] = False
    assert said(usual, [torch.zeros(2), torch.ones(2)], {"w": nn.Parameter(torch.zeros(2))}) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: b.obs["observation.state"][2].fill_(torch.nan), "'observation.state' is not finite in 1 of 4 rows"),
        (lambda b: b.obs["observation.state"][2, 1].fill_(3e38), "'observation.state' is beyond 1e+06 in 1 of 4 rows"),
        (lambda b: b.actions_BHA[2, 0].fill_(-torch.inf), "'action' is not finite in 1 of 4 rows"),
        (lambda b: b.rewards_BH[2].fill_(1e30), "'reward' is beyond 1e+06 in 1 of 4 rows"),
        (lambda b: b.weight_B[2].fill_(torch.nan), "'weight' is not finite in 1 of 4 rows"),
    ],
)
def test_features_are_named_with_where_they_are(change, expected):
    broken = batch()
    change(broken)
    (phrase,) = said(broken)
    assert phrase.startswith(expected) and "first: task 0, episode 72, frame 502" in phrase and "elements " in phrase


def test_other_offsets_and_replay_columns_are_looked_at():
    broken = batch(
        obs_at={-1: {"observation.state": torch.full((4, 3), torch.inf)}}, replay={"log_prob_T": torch.full((4,), torch.nan)}
    )
    assert [phrase.split(" is not")[0] for phrase in said(broken)] == ["'observation.state at -1'", "'log_prob_T'"]


def test_rows_and_parameters_are_named():
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1) for i in range(4)})
    for p in layers.parameters():
        p.grad = torch.full_like(p, torch.nan)
    layers["layer2"].bias.grad = None
    with torch.no_grad():
        layers["layer3"].weight.fill_(torch.inf)
    losses = [torch.tensor([0.0, torch.inf]), torch.tensor([1.0, torch.nan])]
    rows, weights, gradients = said(batch(), losses, dict(layers.named_parameters()))
    assert rows == "the loss is not finite in 2 of 4 rows (first: task 0, episode 71, frame 501)"
    assert weights == "weights are not finite in layer3.weight"
    assert gradients.startswith("gradients are not finite in layer0.weight, layer0.bias") and gradients.endswith("and 3 more")


def test_a_run_on_broken_data_names_the_feature(tmp_path):
    with pytest.raises(LearnerError, match=r"step 1[0-9] of hg_dagger: .*'observation\.state' is not finite in 1 of 16 rows"):
        train_toy(make_run(tmp_path / "run"), make_tables(engine={"max_grad_norm": 1.0}), BrokenSource(1000))


class Huge(MemorySource):
    """From step 5 on one action is so large that sums of it are beyond what a float holds."""

    def batch(self, needs, step, newest_version=-1):
        windows = super().batch(needs, step)
        if step >= 5:
            windows.actions_BHA[3] = 3.4e38
            windows.mask_BH[3] = True
        return windows


def test_an_overflow_in_bfloat16_names_the_action_and_the_way_out(tmp_path):
    tables = make_tables(engine={"dtype": "bfloat16"})
    with pytest.raises(LearnerError) as caught:
        train_toy(make_run(tmp_path / "run"), tables, Huge(1000))
    assert "'action' is beyond 1e+06 in 1 of 16 rows" in str(caught.value) and "engine.dtype=float32" in str(caught.value)


class Root(nn.Module):
    """A loss that is finite where its gradient is not: the root of a square at zero."""

    def __init__(self):
        super().__init__()
        self.fine, self.root = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(1))


def test_a_gradient_alone_names_its_parameter_before_clipping_spreads_it():
    module = Root()
    needs = dataclasses.make_dataclass("Needs", ["batch_size"])(4)
    parts = {"policy": Part(module, lambda parameters: torch.optim.SGD(parameters, 0.1))}
    algorithm = dataclasses.make_dataclass("Algorithm", ["parts", "frozen", "needs"])(parts, {}, needs)

    def loss(part, micro):
        loss_B = torch.ones(4) * (module.root.square().sqrt().sum() + module.fine.sum())
        return LossOutput(loss_B.sum(), torch.tensor(4.0), loss_B.detach(), {})

    engine = make_engine(EngineConfig(max_grad_norm=1.0), algorithm, CPU, ALONE)
    with pytest.raises(LearnerError, match=r"loss 2\.0 and gradient norm nan: gradients are not finite in root") as caught:
        engine.update("policy", loss, batch())
    assert "fine" not in caught.value.what and torch.equal(module.fine, torch.ones(2))
