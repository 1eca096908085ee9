import numpy as np
import pytest

from actors.plan import NUM_DELAYS, REPEAT_FRAMES, Chunking, Plan, PlannedChunk
from fleet.errors import ConfigError


def chunk(number, frame, horizon=8, value=None):
    actions = np.arange(horizon, dtype=np.float32)[:, None] + 100 * number
    return PlannedChunk(number, frame, 1, actions if value is None else np.full((horizon, 1), value, np.float32))


def make_plan(mode="execute", execute=4, **options):
    return Plan(Chunking(mode, execute, **options))


def played(plan, delays, num_frames, horizon=16, acts=lambda frame: False):
    """Runs a plan against a policy whose n-th answer takes ``delays[n]`` frames, the last one from then on.

    Returns one (chunk_id, chunk_index), None where nothing was proposed, a frame; and (frame, prefix) of each request.
    """
    coming, made, seen, asked = [], 0, [], []

    def take(frame):
        while coming and coming[0][0] <= frame:
            plan.add(coming.pop(0)[1], frame)

    for frame in range(num_frames):
        take(frame)
        if plan.due(frame):
            asked.append((frame, plan.prefix(frame).ravel().tolist()))
            coming.append((frame + delays[min(made, len(delays) - 1)], chunk(made, frame, horizon)))
            made += 1
        take(frame)
        proposal = plan.propose(frame)
        seen.append(None if proposal is None or proposal.stale else (proposal.chunk_id, proposal.chunk_index))
        if acts(frame):
            plan.overruled(frame)
    return seen, asked


def test_a_chunk_is_asked_for_every_execute_frames():
    seen, asked = played(make_plan(), [0], 12)
    assert [frame for frame, _ in asked] == [0, 4, 8]
    assert seen == [(n, i) for n in range(3) for i in range(4)]


def test_a_late_chunk_is_entered_at_the_present_frame_and_the_old_one_bridges():
    plan = make_plan()
    plan.due(0)
    plan.add(chunk(1, 0), 0)
    assert plan.due(4) and plan.waits(4)
    assert plan.propose(4).action[0] == 104  # the rest of the old chunk, meant for this frame
    plan.add(chunk(2, 4), 5)
    assert not plan.waits(5)
    assert plan.propose(5).action[0] == 201  # its second action, not its first


def test_nothing_is_proposed_after_the_old_chunk_ends():
    plan = make_plan()
    assert plan.propose(0) is None
    plan.due(0)
    plan.add(chunk(1, 0), 0)
    assert plan.propose(7) is not None
    assert plan.propose(8) is None


def test_a_policy_slower_than_its_chunks_is_asked_for_what_is_newest_not_for_a_queue():
    seen, asked = played(make_plan(), [6], 30)
    assert [frame for frame, _ in asked] == [0, 6, 12, 18, 24]  # one at a time, as soon as the last is there
    assert seen[6:12] == [(0, i) for i in range(6, 12)]  # never older than it must be


def test_an_empty_answer_is_followed_by_the_next_request_in_its_time():
    plan = make_plan()
    asked = []
    for frame in range(12):
        if plan.due(frame):
            asked.append(frame)
            plan.add(PlannedChunk(0, frame, 0, np.zeros((0, 1), np.float32)), frame)
    assert asked == [0, 4, 8]


def test_a_request_that_nobody_answers_is_repeated_at_last():
    plan = make_plan()
    assert [frame for frame in range(2 * REPEAT_FRAMES + 1) if plan.due(frame)] == [0, REPEAT_FRAMES, 2 * REPEAT_FRAMES]


def test_an_older_chunk_does_not_replace_a_newer_one():
    plan = make_plan()
    plan.add(chunk(2, 4), 4)
    plan.add(chunk(1, 0), 4)
    assert plan.propose(5).chunk_id == 2


def test_a_new_episode_starts_empty_and_knows_how_late_chunks_are():
    plan = make_plan("async")
    played(plan, [3], 20)
    plan.reset()
    assert plan.propose(0) is None and plan.due(0) and plan.lead == 3


def test_async_asks_ahead_by_the_measured_delay():
    seen, asked = played(make_plan("async"), [3], 40)
    assert seen[:3] == [None] * 3  # nothing can be known before the first chunk
    assert [frame for frame, _ in asked][:4] == [0, 4, 8, 12]
    assert seen[3:19] == [(n, i) for n in range(4) for i in range(3, 7)]  # four actions of each, none twice, none skipped


def test_async_learns_a_longer_delay_and_forgets_it_again():
    plan = make_plan("async")
    delays = [1, 5] + [1] * 40
    seen, asked = played(plan, delays, 120)
    assert None not in seen[1:]  # the late one is bridged by the one before
    steps = np.diff([frame for frame, _ in asked])
    assert steps[1] == 5 and plan.lead == 1 and set(steps[-3:]) == {4}
    assert len([s for s in steps if s < 4]) <= NUM_DELAYS + 1


def test_async_goes_on_when_the_delay_is_longer_than_execute():
    seen, asked = played(make_plan("async"), [7], 60)
    assert None not in seen[7:]
    assert set(np.diff([frame for frame, _ in asked])) == {7}


def test_async_holds_where_the_policy_needs_longer_than_its_chunks_last():
    seen, _ = played(make_plan("async"), [9], 60, horizon=8)
    assert set(seen) == {None}


def test_the_prefix_is_what_will_be_executed_until_the_chunk_is_there():
    seen, asked = played(make_plan("async"), [3], 24)
    assert asked[0][1] == []
    for frame, prefix in asked[1:5]:
        executed = [100.0 * n + i for n, i in seen[frame : frame + 3]]
        assert prefix == executed and len(prefix) == 3


@pytest.mark.parametrize("mode", ["execute", "ensemble"])
def test_only_async_commits_to_a_prefix(mode):
    assert all(prefix == [] for _, prefix in played(make_plan(mode), [3], 40)[1])


def test_ensembling_weighs_the_oldest_most():
    plan = make_plan("ensemble", execute=1)
    for frame, value in enumerate([1.0, 2.0, 3.0]):
        assert plan.due(frame)
        plan.add(chunk(frame, frame, value=value), frame)
    proposal = plan.propose(2)
    assert proposal.action[0] == pytest.approx(1.993333, abs=1e-6)  # ALGORITHMS.md, section 9
    assert (proposal.chunk_id, proposal.chunk_index) == (2, -1)  # no single chunk's density is its own


def test_ensembling_takes_each_chunks_action_for_the_present_frame():
    plan = make_plan("ensemble", execute=2, ensemble_decay=0.0)
    plan.add(chunk(0, 0), 0)
    plan.add(chunk(1, 2), 2)
    assert plan.propose(3).action[0] == pytest.approx((3 + 101) / 2)
    assert plan.propose(9).chunk_index == 7  # the older one is at its end


@pytest.mark.parametrize("mode", ["execute", "ensemble", "async"])
def test_after_a_hand_back_a_fresh_chunk_is_asked_for_at_once(mode):
    _, asked = played(make_plan(mode, execute=8), [0], 20, acts=lambda frame: 3 <= frame < 11)
    assert [frame for frame, _ in asked] == [0, 8, 12, 20][:3]  # in shadow at 8; control is back at 11, told by 12


def test_ensembling_forgets_what_was_said_before_a_takeover():
    plan = make_plan("ensemble", execute=2)
    seen, _ = played(plan, [0], 14, acts=lambda frame: 4 <= frame < 9)
    assert seen[9] == (4, 1)  # one chunk, the newest shadow, alone
    assert seen[10] == (5, 0)  # and nothing of before is mixed into what follows
    assert seen[12][1] == -1
    seen, _ = played(make_plan("ensemble", execute=4), [0], 8, acts=lambda frame: 4 <= frame < 6)
    assert seen[4:7] == [(1, -1), (1, 1), (1, 2)]  # also where nothing came while they acted


def test_what_a_slow_policy_said_while_an_operator_acted_is_not_executed_beyond_its_first_actions():
    seen, asked = played(make_plan("async"), [6], 60, acts=lambda frame: 20 <= frame < 31)
    observed = [frame for frame, _ in asked]
    for frame in range(31, 45):
        if seen[frame] is not None:
            number, index = seen[frame]
            assert observed[number] >= 31 or index < 4
    assert None in seen[31:40] and None not in seen[45:]


def test_nothing_is_certain_while_an_operator_acts():
    _, asked = played(make_plan("async"), [3, 1], 32, acts=lambda frame: 10 <= frame < 20)
    assert all(prefix == [] for frame, prefix in asked if 11 <= frame <= 20)
    lengths = {frame: len(prefix) for frame, prefix in asked}
    assert 3 in [n for frame, n in lengths.items() if frame <= 10] and 3 in [n for frame, n in lengths.items() if frame > 20]


@pytest.mark.parametrize("wrong", [{"mode": "asynchronous"}, {"execute": 0}, {"ensemble_decay": float("nan")}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        Chunking(**wrong)
