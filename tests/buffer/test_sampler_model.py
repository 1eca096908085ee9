import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer import sidecar
from buffer.sampler import Sampler
from buffer.segment import list_segments
from fleet.batch import BatchNeeds, Filter, Outcome, Within
from fleet.errors import ConfigError, NoData
from fleet.files import Files
from fleet.robot import Source
from tests.buffer.sampler_model import EPISODES, NEEDS, STATE, TASKS, Recorder, assert_same, assert_windows, record_all

SCALE = int(os.environ.get("FLEET_TEST_SCALE", "1"))


def drawn(sampler, needs, step):
    try:
        return sampler.batch(needs, step)
    except NoData:
        return None


@settings(
    max_examples=20 * SCALE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    episodes=EPISODES,
    needs=st.lists(NEEDS, min_size=1, max_size=2),
    order=st.randoms(use_true_random=False),
    rarely=st.integers(1, 5),
    sealed=st.integers(0, 3),
)
def test_every_window_is_that_of_a_plain_model(tmp_path_factory, episodes, needs, order, rarely, sealed):
    """Fragments of two robots interleaved, restarts of the writer between them; takeovers, episodes without an end, dropped
    ones, labels before and after their episodes. A follower that polls in bits, one that begins with sidecars of some
    segments, and one that reads fragment by fragment draw the same, and that is what the model says."""
    folder = tmp_path_factory.mktemp("log")
    recorder, follower = Recorder(folder), Sampler(folder, TASKS, 3)
    num_new = 0

    def between():
        nonlocal num_new
        if order.randrange(rarely) == 0:
            recorder.commit()
            num_new += follower.poll(limit=order.choice([None, None, 1]))
        if order.randrange(6) == 0:
            recorder.commit()
            recorder.close()
            recorder.open()

    record_all(recorder, episodes, order, between)
    recorder.commit()
    recorder.close()
    num_new += follower.poll()
    for name in list_segments(folder)[:sealed]:
        sidecar.write(Files(), folder, name)
    restarted, in_bits = Sampler(folder, TASKS, 3), Sampler(folder, TASKS, 3)
    restarted.poll()
    while in_bits.poll(limit=2) or in_bits.position < follower.position:
        pass
    total = sum(len(e.steps) for e in recorder.episodes.values() if e.task in TASKS)
    assert num_new == total == follower.num_steps() == restarted.num_steps()
    assert follower.skipped_steps == sum(len(e.steps) for e in recorder.episodes.values() if e.task == "other")
    for step, need in enumerate(needs):
        batches = [drawn(sampler, need, step) for sampler in (follower, restarted, in_bits)]
        if batches[0] is None:
            assert not recorder.drawable() and batches == [None] * 3
            continue
        assert_windows(recorder, batches[0], need)
        for other in batches[1:]:
            assert_same(batches[0], other)
        seen = {tuple(int(v) for v in state) for state in batches[0].obs[STATE]}
        assert seen <= recorder.drawable()
    for sampler in (follower, restarted, in_bits):
        check_episodes(recorder, sampler)
        sampler.close()


def check_episodes(recorder, sampler):
    table = sampler.index.episodes
    for (robot, number), episode in recorder.episodes.items():
        row = table.find((f"r{robot}", "b" * 16, number))
        if not episode.steps:
            continue
        assert row is not None and table.robots[table.robot[row]] == f"r{robot}"
        assert table.finished[row] == episode.finished and table.outcome[row] == episode.judged
        assert table.length[row] == (episode.length if episode.finished else len(episode.steps))
        assert table.excluded[row] == episode.excluded
        assert table.start[row] == (f"seed:{episode.seed}" if episode.seed >= 0 else "")
        assert table.num_operator_steps[row] == sum(s.source == Source.OPERATOR for s in episode.steps)
        assert table.task[row] == (TASKS.index(episode.task) if episode.task in TASKS else -1)
        assert len(sampler.index.steps_of(row)) == len(episode.steps)


OTHER_PROCESS = """
import json, sys
from pathlib import Path
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds
from fleet.robot import Source
sampler = Sampler(Path(sys.argv[1]), ("reach", "push"), 3)
sampler.poll()
batch = sampler.batch(BatchNeeds(32, 4, ("observation.state",), {tuple(Source): 1.0}, offsets=(-1, 0, 2)), 11)
print(json.dumps([batch.obs["observation.state"].tolist(), batch.actions_BHA.tolist(), batch.mask_BH.tolist()]))
"""


def test_another_process_draws_the_same(tmp_path):
    recorder = Recorder(tmp_path)
    for episode in range(6):
        recorder.fragment(episode % 2, episode, [0, 1] * 5, opened={}, closed="success", new_chunk=episode)
    recorder.commit()
    sampler = Sampler(tmp_path, TASKS, 3)
    sampler.poll()
    batch = sampler.batch(BatchNeeds(32, 4, (STATE,), {tuple(Source): 1.0}, offsets=(-1, 0, 2)), 11)
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [batch.obs[STATE].tolist(), batch.actions_BHA.tolist(), batch.mask_BH.tolist()]


@pytest.mark.parametrize("within", list(Within))
def test_long_histories_and_lookahead_over_many_fragments(tmp_path, within):
    recorder = Recorder(tmp_path)
    for episode in range(3):
        for part in range(5):
            sources = [0, 0, 0] if part != 3 else [0, 1, 1]
            ends = {"closed": "success", "end": "terminated"} if part == 4 else {}
            recorder.fragment(1, episode, sources, rewards=[0.0, 1.0, 0.5], opened={} if part == 0 else None, **ends)
    recorder.commit()
    sampler = Sampler(tmp_path, TASKS, 0)
    sampler.poll()
    sources = {tuple(Source): 1.0}
    needs = BatchNeeds(300, 16, (STATE,), sources, (-20, -1, 0, 16, 40), within, takeover_within=9, discount=0.9)
    batch = sampler.batch(needs, 0)
    assert_windows(recorder, batch, needs)
    frames_and_distances = set(zip(batch.frame_B.tolist(), batch.takeover_in_B.tolist(), strict=True))
    assert set(sampler.batch(dataclasses.replace(needs, takeover_within=0), 0).takeover_in_B) == {-1}
    assert {(0, -1), (1, 9), (8, 2), (9, 1), (10, 0), (12, -1)} <= frames_and_distances, "frames 10 and 11 are the operator's"


def test_replay_columns_have_one_form_also_where_no_policy_was_called(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(0, 0, [Source.DEMO] * 5)
    recorder.fragment(1, 1, [Source.POLICY] * 5, new_chunk=3)
    recorder.fragment(1, 1, [Source.POLICY] * 5, new_chunk=3)
    recorder.commit()
    sampler = Sampler(tmp_path, TASKS, 0)
    sampler.poll()
    replay = ("replay.seed", "log_prob_T", "replay.unknown")
    demos, calls = (
        sampler.batch(BatchNeeds(30, 2, (STATE,), {(source,): 1.0}, replay=replay), 0).replay
        for source in (Source.DEMO, Source.POLICY)
    )
    assert set(calls["replay.seed"].tolist()) == {10, 20} and calls["log_prob_T"].shape == (30, 2)
    assert {tuple(row) for row in calls["log_prob_T"].tolist()} == {(0.0, 0.0), (0.0, 1.0)}
    assert demos["replay.seed"].tolist() == [0] * 30 and demos["replay.seed"].dtype == calls["replay.seed"].dtype
    assert demos["log_prob_T"].shape == calls["replay.unknown"].shape == (30, 0)
    assert demos["log_prob_T"].dtype == calls["log_prob_T"].dtype


def test_filters_by_task_robot_outcome_and_age(tmp_path):
    recorder = Recorder(tmp_path)
    outcomes = ["success", "failure", "unknown", None]
    for episode in range(8):
        task = TASKS[episode % 2]
        version = episode if episode != 3 else None
        recorder.fragment(episode // 4, episode, [0] * 4, task=task, opened={}, closed=outcomes[episode % 4], new_chunk=version)
    recorder.label(1, 4, "excluded", "true", 5)
    recorder.label(0, 1, "outcome", "success", 5)
    recorder.commit()
    sampler = Sampler(tmp_path, TASKS, 0)
    sampler.poll()

    def seen(filter, newest=-1):
        needs = BatchNeeds(200, 1, (STATE,), {tuple(Source): 1.0}, filter=filter)
        return {int(e) for e in sampler.batch(needs, 0, newest).obs[STATE][:, 1]}

    assert seen(Filter()) == {0, 1, 2, 3, 5, 6, 7}, "an excluded episode is never drawn"
    assert seen(Filter(tasks=("push",))) == {1, 3, 5, 7}
    assert seen(Filter(robots=("r1",))) == {5, 6, 7}
    assert seen(Filter(outcomes=(Outcome.SUCCESS,))) == {0, 1}, "by the newest label"
    assert seen(Filter(outcomes=(Outcome.OPEN, Outcome.UNKNOWN))) == {2, 3, 6, 7}
    assert seen(Filter(max_version_age=1)) == {3, 6, 7}, "steps without a version pass"
    assert seen(Filter(max_version_age=1), newest=8) == {3, 7}
    with pytest.raises(NoData):
        seen(Filter(robots=("r9",)))


def test_only_the_policys_steps_are_filtered_by_outcome_and_by_what_follows(tmp_path):
    recorder = Recorder(tmp_path)
    own, operator, demo = int(Source.POLICY), int(Source.OPERATOR), int(Source.DEMO)
    for episode, (closed, task) in enumerate([("success", "reach"), ("failure", "reach"), (None, "push")]):
        recorder.fragment(0, episode, [own] * 3, task=task, opened={})
        recorder.fragment(0, episode, [own, operator, operator, own], task=task, closed=closed)
    recorder.fragment(1, 3, [demo] * 3, opened={}, closed="unknown")
    recorder.commit()
    sampler = Sampler(tmp_path, TASKS, 0)
    sampler.poll()

    def seen(**filter):
        batch = sampler.batch(BatchNeeds(600, 1, (STATE,), {tuple(Source): 1.0}, by_task=False, filter=Filter(**filter)), 0)
        return {(int(e), int(f)) for e, f in batch.obs[STATE][:, 1:]}

    judged = {"outcomes": (Outcome.SUCCESS,), "outcomes_of": (Source.POLICY,)}
    of_operator = {(episode, frame) for episode in range(3) for frame in (4, 5)}
    others = of_operator | {(3, frame) for frame in range(3)}
    assert seen(**judged) == others | {(0, frame) for frame in (0, 1, 2, 3, 6)}
    assert seen(**judged, before_takeover=2) == others | {(0, frame) for frame in (0, 1, 6)}
    assert seen(**judged, before_takeover=9) == others | {(0, 6)}
    assert seen(before_takeover=1) == others | {(e, frame) for e in range(3) for frame in (0, 1, 2, 6)}
    recorder.label(0, 0, "outcome", "failure", 5)
    recorder.label(1, 3, "excluded", "true", 5)
    recorder.commit()
    sampler.poll()
    assert seen(**judged) == of_operator, "by the newest label, and what is excluded is of nobody"
    assert seen(outcomes=(Outcome.FAILURE,), outcomes_of=(Source.OPERATOR,), robots=("r0",)) == {
        (e, frame) for e in range(3) for frame in range(7) if e != 2 or frame not in (4, 5)
    }


def test_nobody_looks_into_the_past_for_a_takeover():
    with pytest.raises(ConfigError, match="takeover_within = -1"):
        BatchNeeds(4, 1, (), {tuple(Source): 1.0}, takeover_within=-1)
    with pytest.raises(ConfigError, match="before_takeover = -2"):
        Filter(before_takeover=-2)
