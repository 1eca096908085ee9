import dataclasses
import time

import numpy as np
import pytest
from loop_bench import ConstantRunner, run_episodes

from actors.fragments import encode_rows
from actors.operators import make_operator
from actors.robots.toy import ToyRobot
from fleet.robot import Source, Takeover
from fleet.schema import check_fragment, decode_fragment


def test_an_episode_is_recorded_whole_and_passes_the_gateways_checks():
    tables, _, _ = run_episodes(ConstantRunner([0.0, 0.0]), episodes=2)
    spec = ToyRobot().spec
    directory, payload = encode_rows(spec, tables)
    fragment = decode_fragment(directory, payload)
    check_fragment(fragment, spec, "toy-1", "b" * 16)
    steps = fragment.tables["steps"]
    assert steps.num_rows == 120  # two episodes of 60, no success with a policy that stands still
    assert steps.column("frame_index").to_pylist() == [*range(60), *range(60)]
    events = fragment.tables["episodes"].to_pylist()
    assert [(e["event"], e["outcome"], e["length"]) for e in events] == [
        ("opened", "", -1),
        ("closed", "failure", 60),
    ] * 2
    assert events[0]["seed"] != events[2]["seed"]


def test_every_step_knows_the_chunk_and_version_behind_it():
    tables, _, _ = run_episodes(ConstantRunner([0.0, 0.0]), execute=4)
    chunk_of = {row["chunk_id"]: row for row in tables["chunks"]}
    for step in tables["steps"]:
        chunk = chunk_of[step["chunk_id"]]
        assert step["source"] == Source.POLICY
        assert step["frame_index"] == chunk["frame_index"] + step["chunk_index"]
        assert 0 <= step["chunk_index"] < 4
    assert tables["episodes"][-1]["first_version"] == tables["episodes"][-1]["last_version"] == 7


def test_the_operator_takes_over_and_the_policy_goes_on_in_shadow():
    operator = make_operator("scripted", expert="toy", gate_distance=0.5, window=5)
    tables, _, _ = run_episodes(ConstantRunner([-1.0, 1.0]), operator=operator, execute=4)
    sources = [s["source"] for s in tables["steps"]]
    first = sources.index(Source.OPERATOR)
    assert first >= 4 and set(sources[first:]) == {Source.OPERATOR}
    assert all(s["intervention"] and s["operator_id"] == "scripted" for s in tables["steps"][first:])
    assert max(c["frame_index"] for c in tables["chunks"]) > first
    assert tables["episodes"][-1]["outcome"] == "success"


def test_demonstrations_need_no_policy_and_are_no_interventions():
    runner = ConstantRunner([0.0, 0.0])
    runner.ready = False
    operator = make_operator("scripted", expert="toy", mode="demonstrate")
    tables, _, _ = run_episodes(runner, operator=operator, demonstrates=True)
    assert {s["source"] for s in tables["steps"]} == {Source.DEMO}
    assert not any(s["intervention"] for s in tables["steps"])
    assert runner.num_calls == 0


def test_a_policy_that_never_answers_leads_to_hold_not_to_a_repeat():
    runner = ConstantRunner([1.0, 1.0])
    runner.ready = False
    tables, loop, _ = run_episodes(runner, realtime=True, chunk_deadline_s=0.002, robot=ToyRobot(control_hz=200))
    assert {s["source"] for s in tables["steps"]} == {Source.SCRIPT}
    assert all(np.array_equal(s["action"], [0, 0]) for s in tables["steps"])
    assert loop.num_held == len(tables["steps"])


@pytest.mark.parametrize("bad", [[np.nan, 0.0], [np.inf, 0.0]])
def test_an_action_that_is_not_finite_never_reaches_the_robot(bad):
    tables, loop, _ = run_episodes(ConstantRunner(bad))
    assert all(np.isfinite(s["action"]).all() for s in tables["steps"])
    assert {s["source"] for s in tables["steps"]} == {Source.SCRIPT}
    assert loop.safety.num_not_finite == 60


def test_the_rate_is_kept():
    start = time.monotonic()
    run_episodes(ConstantRunner([0.0, 0.0]), realtime=True, robot=ToyRobot(control_hz=100, max_steps=50))
    assert 0.49 <= time.monotonic() - start < 1.5


class OneEpisodeLate(ConstantRunner):
    """Answers each request with a chunk that is marked as of the episode before, as one that was computed too late is."""

    def act(self, episode_id, frame_index, task, obs, prefix_DA=None):
        return dataclasses.replace(super().act(episode_id, frame_index, task, obs), episode_id=episode_id - 1)


def test_a_chunk_of_the_episode_before_is_not_executed():
    runner = OneEpisodeLate([1.0, 1.0])
    robot = ToyRobot(control_hz=200, max_steps=20)
    tables, _, _ = run_episodes(runner, realtime=True, chunk_deadline_s=0.002, robot=robot, episodes=2)
    assert {s["source"] for s in tables["steps"]} == {Source.SCRIPT}


class TakesOver:
    """Acts from frame ``first`` to before ``end`` of each episode."""

    def __init__(self, first, end):
        self._first, self._end, self._frame = first, end, -1

    def reset(self, task, seed):
        self._frame = -1

    def poll(self, obs, proposed):
        self._frame += 1
        return Takeover(np.zeros(2, np.float32), "me") if self._first <= self._frame < self._end else None


class SlowRunner(ConstantRunner):
    """Answers after ``seconds``."""

    def __init__(self, seconds):
        super().__init__([0.3, 0.3])
        self._seconds = seconds

    def act(self, *args):
        time.sleep(self._seconds)
        return super().act(*args)


def test_after_a_hand_back_a_slow_policy_does_not_go_on_with_what_it_said_before():
    robot, operator = ToyRobot(control_hz=50, max_steps=50), TakesOver(15, 30)
    tables, _, _ = run_episodes(
        SlowRunner(0.09), robot=robot, operator=operator, realtime=True, chunking="async", execute=2, chunk_deadline_s=0.01
    )
    observed = {row["chunk_id"]: row["frame_index"] for row in tables["chunks"]}
    after = tables["steps"][30:]
    for step in after:
        if step["source"] == Source.POLICY:
            assert observed[step["chunk_id"]] >= 30 or step["chunk_index"] < 2
    sources = [s["source"] for s in after]
    assert Source.SCRIPT in sources[:10] and Source.POLICY in sources


class Timed(ToyRobot):
    """Knows how long a tick took from looking to acting, in seconds."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.took_s = []

    def observe(self):
        self._looked = time.monotonic()
        return super().observe()

    def send(self, action):
        self.took_s.append(time.monotonic() - self._looked)
        return super().send(action)


def test_an_operator_does_not_feel_that_the_policy_is_slow():
    robot = Timed(control_hz=25, max_steps=40)
    run_episodes(SlowRunner(0.1), robot=robot, operator=TakesOver(10, 40), realtime=True, chunk_deadline_s=0.03, execute=2)
    assert max(robot.took_s[:10]) > 0.025  # the policy's own ticks wait, as long as they may
    assert sorted(robot.took_s[11:])[-5] < 0.015


def test_in_simulated_time_no_chunk_is_late_and_asking_ahead_changes_nothing():
    tables, loop, _ = run_episodes(SlowRunner(0.02), chunking="async", execute=4, robot=ToyRobot(max_steps=20))
    assert loop.num_held == 0
    assert [s["chunk_index"] for s in tables["steps"]] == [0, 1, 2, 3] * 5


class HangsOnce(ConstantRunner):
    """A policy whose second call does not come back for a while."""

    def act(self, *args):
        chunk = super().act(*args)
        if self.num_calls == 2:
            time.sleep(1.5)
        actions_HA = np.full((100, 2), 0.1, np.float32)
        return dataclasses.replace(chunk, actions_HA=actions_HA)


class Remembers(ToyRobot):
    def send(self, action):
        self.sent = [*getattr(self, "sent", []), (time.monotonic(), np.array(action))]
        return super().send(action)


def test_a_robot_whose_policy_hangs_does_not_go_on_moving_when_nothing_more_can_be_recorded():
    robot = Remembers(control_hz=100, max_steps=60)
    tables, loop, _ = run_episodes(HangsOnce([0, 0]), robot=robot, realtime=True, episodes=2, execute=4)
    assert loop.num_lost_episodes == 1
    times_s, actions = zip(*robot.sent, strict=True)
    stall = int(np.argmax(np.diff(times_s)))
    assert times_s[stall + 1] - times_s[stall] > 0.5 and 20 < stall < 60  # nobody reads what is recorded
    np.testing.assert_array_equal(actions[stall], robot.hold())
    assert (actions[stall - 1] == 0.1).all()  # in the middle of a chunk
    closed = [(e["outcome"], e["judge"]) for e in tables["episodes"] if e["event"] == "closed"]
    assert closed[0] == ("aborted", "courier too slow") and len(closed) == 2


class SlowAndLoud(ConstantRunner):
    """Needs two ticks, proposes more than the robot takes, and keeps what it is to continue."""

    def act(self, *args):
        self.prefixes = [*getattr(self, "prefixes", []), np.array(args[-1])]
        time.sleep(0.05)
        return super().act(*args)


def test_a_policy_continues_what_is_executed_not_what_was_proposed():
    runner = SlowAndLoud([1.5, -0.5])
    tables, _, _ = run_episodes(runner, robot=ToyRobot(control_hz=40, max_steps=40), realtime=True, chunking="async")
    assert max(len(prefix_DA) for prefix_DA in runner.prefixes) >= 2
    for prefix_DA in runner.prefixes:
        np.testing.assert_array_equal(prefix_DA, np.tile(np.float32([1.0, -0.5]), (len(prefix_DA), 1)))
    assert tables["steps"][-1]["action"].tolist() == [1.0, -0.5]
