import numpy as np

from actors.plan import Plan, PlannedChunk


def chunk(number, frame, horizon=8):
    return PlannedChunk(number, frame, 1, np.arange(horizon, dtype=np.float32)[:, None] + 100 * number)


def test_a_chunk_is_asked_for_every_execute_frames():
    plan = Plan(execute=4)
    asked = []
    for frame in range(12):
        if plan.due(frame):
            asked.append(frame)
            plan.add(chunk(len(asked), frame))
    assert asked == [0, 4, 8]


def test_actions_are_taken_by_frame():
    plan = Plan(execute=4)
    plan.due(0)
    plan.add(chunk(1, 0))
    assert [float(plan.propose(f).action[0]) for f in range(4)] == [100, 101, 102, 103]
    assert plan.propose(2).chunk_index == 2


def test_a_late_chunk_is_entered_at_the_present_frame_and_the_old_one_bridges():
    plan = Plan(execute=4)
    plan.due(0)
    plan.add(chunk(1, 0))
    assert plan.due(4) and plan.waiting
    assert plan.propose(4).action[0] == 104  # the rest of the old chunk, meant for this frame
    plan.add(chunk(2, 4))
    assert not plan.waiting
    assert plan.propose(5).action[0] == 201  # its second action, not its first


def test_nothing_is_proposed_after_the_old_chunk_ends():
    plan = Plan(execute=4)
    assert plan.propose(0) is None
    plan.due(0)
    plan.add(chunk(1, 0))
    assert plan.propose(7) is not None
    assert plan.propose(8) is None


def test_a_chunk_that_never_comes_is_asked_for_again_but_not_every_frame():
    plan = Plan(execute=4)
    asked = [frame for frame in range(12) if plan.due(frame)]
    assert asked == [0, 4, 8]


def test_an_older_chunk_does_not_replace_a_newer_one():
    plan = Plan(execute=4)
    plan.add(chunk(2, 4))
    plan.add(chunk(1, 0))
    assert plan.propose(5).chunk_id == 2


def test_a_new_episode_starts_empty():
    plan = Plan(execute=4)
    plan.add(chunk(1, 0))
    plan.reset()
    assert plan.propose(0) is None and plan.due(0)
