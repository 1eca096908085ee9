"""Several ranks train together on a real log, each in a process of its own."""

import numpy as np

from fleet.runfolder import RunFolder
from learner.checkpoint import Checkpoints
from learner.train import train
from tests.learner.test_train import fill
from tests.learner_toys import make_run, make_tables
from tests.rank_processes import on_ranks


def learn(place, path, tables):
    """Trains this rank; losses by step as far as reports tell them, and the weights at the end."""
    import learner.loop

    learner.loop.REPORT_S = 0.0
    run, seen = RunFolder.open(path), []
    train(run, tables, stop=lambda: False, report=seen.append, place=place)
    return {p.step: p.stats["loss"] for p in seen if p.stats}


def curve(tmp_path, name, ranks, tables):
    run = make_run(tmp_path / name)
    fill(run)
    losses = on_ranks(ranks, learn, run.path, tables, meet=False)
    weights = Checkpoints(run.checkpoints).newest().state["parts"]["policy"]
    return losses, weights


def test_ranks_follow_the_curve_of_one(tmp_path):
    one, alone = curve(tmp_path, "one", 1, make_tables())
    for size in (2, 3):
        several, weights = curve(tmp_path, f"of{size}", size, make_tables())
        assert all(losses == several[0] for losses in several) and set(several[0]) == set(range(1, 41))
        np.testing.assert_allclose(list(several[0].values()), list(one[0].values()), rtol=1e-4)
        for name, value in weights.items():
            np.testing.assert_allclose(value, alone[name], rtol=1e-3, atol=1e-4)
