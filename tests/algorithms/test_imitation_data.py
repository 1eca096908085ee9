"""What imitation gets from a log: windows of takeovers over many fragments, sampled and prepared."""

import numpy as np
import pytest
import torch

from algorithms.base import DataFacts
from algorithms.bc import Bc, BcConfig
from algorithms.hg_dagger import HgDagger, HgDaggerConfig
from algorithms.policies.base import INSTRUCTION
from algorithms.policies.registry import build
from buffer.mixture import loss_table
from buffer.sampler import Sampler
from fleet.robot import Source
from fleet.spec import STATE
from learner.feed import Feed
from tests.buffer.sampler_model import TASKS, Recorder

P, O, D = int(Source.POLICY), int(Source.OPERATOR), int(Source.DEMO)  # noqa: E741
H, BEFORE = 5, 3
EPISODES = {  # by number: sources in frames, cut into fragments anywhere; how it ended
    1: ([[P] * 4, [P] * 4, [P, O], [O, O, P], [P] * 5], "success"),
    2: ([[P, P], [P, O, O, P], [P, P]], "failure"),
    3: ([[P] * 6], "success"),
    4: ([[P] * 3, [O] * 2], None),
}


def _policy():
    torch.manual_seed(0)
    return build("mlp", {"reads": {STATE: [3]}, "action_dim": 2, "horizon": H, "instruction_dim": 2, "width": 8})


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    recorder = Recorder(tmp_path_factory.mktemp("log"))
    for number, (runs, closed) in EPISODES.items():
        for i, sources in enumerate(runs):
            closes = {"closed": closed} if i == len(runs) - 1 else {}
            recorder.fragment(0, number, sources, opened={} if i == 0 else None, new_chunk=1, **closes)
    recorder.fragment(1, 7, [D] * 8, task="push", opened={}, closed="success")
    recorder.commit()
    sampler = Sampler(recorder.folder, TASKS, 0)
    sampler.poll()
    yield sampler
    sampler.close()


def _batch(sampler, algorithm, step=0):
    return algorithm.prepare(Feed(torch.eye(2), torch.device("cpu")).batch(sampler.batch(algorithm.needs, step)))


def _labels(batch):
    """(episode, frame, source, labels of the frames that count) of each row; what ends were filled with left out."""
    rows = []
    for row in range(len(batch.step_B)):
        episode, frame = (int(v) for v in batch.obs[STATE][row, 1:])
        frames = batch.actions_BHA[row, batch.mask_BH[row], 0].int().tolist()
        assert {value // 1000 for value in frames} == {episode}
        rows.append((episode, frame, int(batch.source_B[row]), [value % 1000 for value in frames]))
    return rows


def _source(episode, frame):
    return D if episode == 7 else [s for run in EPISODES[episode][0] for s in run][frame]


CONFIGS = [
    {},
    {"mixture": "adaptive"},
    {"autonomous": "successful"},
    {"autonomous": "successful", "mixture": "adaptive"},
    {"autonomous": "successful", "weighting": "sirius"},
    {"autonomous": "successful", "weighting": "iwr"},
]


@pytest.mark.parametrize("fill_ends", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_labels_are_of_one_kind_and_never_of_what_the_operator_had_to_end(sampler, config, fill_ends):
    config = HgDaggerConfig(batch_size=600, pre_intervention_steps=BEFORE, fill_ends=fill_ends, **config)
    batch = _batch(sampler, HgDagger(_policy(), config, DataFacts(tasks=TASKS)))
    takeovers = {1: [9], 2: [3], 4: [3]}
    seen, own = set(), set()
    for (episode, frame, source, frames), weight in zip(_labels(batch), batch.weight_B.tolist(), strict=True):
        assert {_source(episode, one) for one in frames} == {source} and frames[0] == frame
        kinds = {any(at - BEFORE <= one < at for at in takeovers.get(episode, ())) for one in frames if source == P}
        assert len(kinds) <= 1, "windows of the policy's own steps end where those before a takeover begin"
        assert weight == 1.0 or kinds == {True}
        seen.add(source)
        own |= {(episode, one) for one in frames if source == P and weight > 0}
    assert seen == {O, D} | ({P} if config.autonomous == "successful" else set())
    successes = {(1, f) for f in (*range(6), *range(12, 18))} | {(3, f) for f in range(6)}
    if config.autonomous == "successful":
        assert own == successes, "no failure, no open episode"
        drawn = {(e, f) for e, f, _, _ in _labels(batch)}
        assert ((1, 8) in drawn) == (config.weighting != "none"), "without weighting they are not even drawn"


def test_windows_are_filled_at_the_ends_of_operators_and_episodes_and_not_before_a_takeover(sampler):
    config = HgDaggerConfig(batch_size=600, pre_intervention_steps=BEFORE, autonomous="successful")
    batch = _batch(sampler, HgDagger(_policy(), config))
    filled = {(episode, frame): frames for episode, frame, _, frames in _labels(batch)}
    assert filled[1, 10] == [10, 11, 11, 11, 11] and filled[3, 4] == [4, 5, 5, 5, 5] and filled[7, 7] == [7] * 5
    assert filled[1, 4] == [4, 5] and filled[1, 0] == [0, 1, 2, 3, 4]


def test_bc_of_everybody_has_every_step_alike_and_stated_shares_are_kept(sampler):
    names = ["demo", "operator", "policy"]
    everybody = _batch(sampler, Bc(_policy(), BcConfig(batch_size=2000, sources=names)))
    assert {(e, f) for e, f, _, _ in _labels(everybody)} == {
        (e, f) for e, (runs, _) in EPISODES.items() for f in range(sum(map(len, runs)))
    } | {(7, f) for f in range(8)}
    assert (everybody.source_B == D).float().mean() == pytest.approx(0.5, abs=0.01), "one of two tasks"
    stated = _batch(sampler, Bc(_policy(), BcConfig(batch_size=2000, sources=names, shares=[0.2, 0.3, 0.5])))
    for source, share in ((D, 0.2), (O, 0.3), (P, 0.5)):
        assert (stated.source_B == source).float().mean() == pytest.approx(share, abs=0.001)
    assert set(_batch(sampler, Bc(_policy(), BcConfig(batch_size=50))).source_B.tolist()) == {D}


def test_an_adaptive_mixture_is_fed_the_losses_of_both_sides_and_has_the_policys_own_steps_online(sampler):
    config = HgDaggerConfig(batch_size=400, autonomous="successful", mixture="adaptive", pre_intervention_steps=BEFORE)
    algorithm = HgDagger(_policy(), config)
    batch = _batch(sampler, algorithm)
    assert (batch.mask_BH.any(1)).all(), "a row without a label would tell its side that there is no loss"
    loss_B = algorithm.loss("policy", batch).per_sample_B.numpy()
    windows = sampler.batch(algorithm.needs, 0)
    found = loss_table(windows, loss_B, 2)
    for source in (P, O, D):
        of_source = windows.source_B == source
        assert found[:, source].sum(0) == pytest.approx([loss_B[of_source].sum(), of_source.sum()], rel=1e-5)
        assert np.isfinite(found).all() and of_source.any()
    assert INSTRUCTION in batch.obs
