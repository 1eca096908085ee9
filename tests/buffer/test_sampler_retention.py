"""A sampler that follows while retention gives up segments, also while another one is being written."""

import time

import numpy as np
import pytest

import buffer.follower
from buffer.retention import Limits, Upkeep
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Priority
from fleet.files import Files
from fleet.journal import Journal, read_journal
from fleet.robot import Source
from tests.buffer.fragments import make_spec
from tests.buffer.runs import DEMO, OPERATOR, POLICY, Writer, feed_back, fill

NEEDS = BatchNeeds(200, 1, ("observation.state",), {tuple(Source): 1.0}, by_task=False, priority=Priority(1.0, 1.0))


def retire(buffer):
    """All that is not protected; returns what was done."""
    upkeep, done = Upkeep(Files(), buffer), []
    upkeep.sync(time.time_ns())
    while more := upkeep.retire(Limits(max_bytes=1), time.time_ns()):
        done += [action.kind for action in more]
    return done


def by_source(sampler):
    sampler.poll()
    return {source.name: sampler.num_steps(source) for source in Source}


@pytest.fixture
def run(tmp_path):
    """A writer in the middle of a segment, and a sampler that read up to there before retention compacted older ones."""
    writer = Writer(tmp_path / "log", segment_bytes=60_000)
    numbers = iter(range(1000))

    def write(*sources):
        for source in sources:
            writer.episode("arm-0", "b0", next(numbers), [source] * 3)

    sampler = Sampler(tmp_path / "log", ["reach"], 0)
    write(*[DEMO, POLICY, POLICY] * 3, POLICY)
    sampler.poll()
    assert "compact" in retire(tmp_path / "log")
    sampler.poll()
    write(POLICY)  # to the segment that was begun before
    sampler.poll()
    yield tmp_path / "log", write, sampler
    sampler.close()
    writer.close()


def test_a_segment_that_was_read_around_a_compaction_takes_only_its_own_steps_along(run):
    buffer, write, sampler = run
    write(*[POLICY] * 12)
    sampler.poll()
    assert "drop" in retire(buffer)
    other = Sampler(buffer, ["reach"], 0)
    assert by_source(sampler) == by_source(other) and sampler.num_steps(DEMO) == 9
    other.close()


def test_scores_of_such_a_segment_come_back_to_the_same_steps(run):
    buffer, _, sampler = run
    scores = {}  # by what the steps are, not by their numbers

    def scores_of(which, windows):
        steps = zip(windows.episode_B.tolist(), windows.frame_B.tolist(), strict=True)
        return np.array([scores.setdefault((which.index.episodes.keys[e], frame), 1.0 + len(scores)) for e, frame in steps])

    batch = sampler.batch(NEEDS, 0)
    feed_back(sampler, batch, scores_of(sampler, batch))
    assert len(scores) == sampler.num_steps() == 18
    other = Sampler(buffer, ["reach"], 0)
    other.poll()
    other.load_state(sampler.state())
    seen = other.batch(NEEDS, 1)
    score_B = scores_of(other, seen)
    np.testing.assert_allclose(seen.weight_B, score_B.min() / score_B, rtol=1e-6)
    other.close()


def test_steps_that_came_since_a_state_are_counted_whatever_retention_takes(run):
    buffer, write, sampler = run
    write(POLICY)
    sampler.poll()
    state = sampler.state()
    write(*[POLICY] * 12)
    assert sampler.poll() == 36 and sampler.load_state(state) == 36
    before = sampler.num_steps()
    write(*[DEMO] * 12)
    assert "drop" in retire(buffer)
    other = Sampler(buffer, ["reach"], 0)
    other.poll()
    kept = sum(other.index.source.view == POLICY)
    assert other.num_steps() < before + 36 and other.load_state(state) == 36 + kept
    other.close()


def score_of(windows):
    """Different for each step, by what it is."""
    _, episode_B, frame_B = windows.obs["observation.state"].T.astype(float)
    return 10 + episode_B / 10 + frame_B / 100


def test_rows_of_the_index_do_not_grow_behind_a_protected_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(buffer.follower, "ROWS_MIN", 60)
    writer = Writer(tmp_path / "log", segment_bytes=40_000)
    sampler = Sampler(tmp_path / "log", ["reach"], 0)
    rows = []
    for number in range(60):
        if number == 20:
            windows = sampler.batch(NEEDS, 0)
            feed_back(sampler, windows, score_of(windows))
        writer.episode("arm-0", "b0", number, [DEMO if number in (0, 7, 30) else POLICY] * 3)
        sampler.poll()
        if number % 4 == 3:
            retire(tmp_path / "log")
            sampler.poll()
        rows.append((sampler.index.num_rows, sampler.index.num_there))
    assert all(held <= max(4 * there, 60 + 12) for held, there in rows) and rows[-1][1] < 30
    assert sampler.index.end > 180 and sampler.index.fragment.first > 100
    demos = [sampler.index.episodes.find(("arm-0", "b0", number)) for number in (0, 7, 30)]
    frames = [sampler.index.frame(sampler.index.steps_of(number)).tolist() for number in demos]
    assert frames == [[0, 1, 2]] * 3 and sampler.num_steps(DEMO) == 9
    windows = sampler.gather(sampler.windows_of(demos, NEEDS))
    assert windows.obs["observation.state"][:, 1].tolist() == [0] * 3 + [7] * 3 + [30] * 3
    other = Sampler(tmp_path / "log", ["reach"], 0)
    other.poll()
    other.load_state(sampler.state())
    (saved,) = sampler.state()["scores"].values()
    assert len(saved["values"]) <= sampler.index.num_rows and saved["first"] == sampler.index.fragment.first
    for which in (sampler, other):
        windows = which.batch(NEEDS, 1)
        early = np.isin(windows.obs["observation.state"][:, 1], (0, 7))
        score_B, weight_B = score_of(windows)[early], windows.weight_B[early]
        assert len(np.unique(score_B)) == 6
        np.testing.assert_allclose(weight_B * score_B, weight_B[0] * score_B[0], rtol=1e-6)
        which.close()
    writer.close()


def test_what_is_read_again_is_neither_new_nor_counted_again(tmp_path):
    fill(tmp_path / "log")
    sampler = Sampler(tmp_path / "log", ["reach"], 0, Journal(tmp_path / "learner.jsonl"))
    sampler.poll()
    operated = sampler.index.episodes.num_operator_steps.view.copy()
    assert operated.sum() == 6 and "compact" in retire(tmp_path / "log")
    assert sampler.poll() == 0 and sampler.num_steps(OPERATOR) == 6
    np.testing.assert_array_equal(sampler.index.episodes.num_operator_steps.view, operated)
    # The latency of steps that were sampled long ago is not what a robot's newest step takes.
    assert [line for line in read_journal(tmp_path / "learner.jsonl") if line["kind"] == "sampleable"] == []
    sampler.close()


def test_letting_go_of_a_segment_looks_at_no_neighbours_but_its_own(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "log", segment_bytes=100_000, spec=make_spec())
    for number in range(150):
        writer.episode("arm-0", "b0", number, [POLICY] * 3)
    writer.close()
    sampler = Sampler(tmp_path / "log", ["reach"], 0)
    sampler.poll()
    linked, link = [], sampler.index._link
    monkeypatch.setattr(sampler.index, "_link", lambda *fragments: (linked.append(fragments), link(*fragments)))
    first, end = list(sampler._log._segments.values())[1].runs[0]
    gone = set(sampler.index.episode[np.arange(first, end)].tolist())
    sampler.index.drop(first, end)
    assert linked == [(first - 1, end)] and end - first > 5
    starts = sampler.index.episodes.first_step.view
    assert {number for number in range(150) if starts[number] < 0} == gone
    assert all(sampler.index.episode[sampler.index.fragment[starts[n]]] == n for n in set(range(150)) - gone)
    sampler.close()
