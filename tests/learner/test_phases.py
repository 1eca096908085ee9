"""A run's phases share the policy: each brings an algorithm, optimizers and an engine of its own."""

import torch

from tests.learner_toys import make_run, make_tables, train_toy
from tests.rank_processes import on_ranks


def start_with_cloning(ranks, folder, engine):
    tables = make_tables(engine)
    tables["start"].name, tables["start"].config = "bc", {"batch_size": 16}
    loop = train_toy(make_run(folder), tables)
    with loop._engine.gathered():
        return loop.progress.stats["loss"], loop._engine.weights()["policy"]


def test_the_next_phase_takes_the_policy_over_from_every_engine(tmp_path):
    """Bit for bit: with one rank nothing is summed in another order."""
    loss, weights = start_with_cloning(None, tmp_path / "torch", {})
    [(zero_loss, zero)] = on_ranks(1, start_with_cloning, tmp_path / "zero", {"name": "deepspeed", "zero_stage": 3})
    assert zero_loss == loss and list(zero) == list(weights)
    used = [name for name in weights if name != "log_std_A"]  # no loss uses it; under ZeRO its weight decay goes on
    assert all(torch.equal(zero[name], weights[name]) for name in used)
