"""Slow policies in real time: the control process with its own clock, and a courier whose policy takes its time."""

import multiprocessing
import queue

import numpy as np
import pytest
from safetensors.torch import save

from actors.config import ActorConfig, OperatorConfig, RobotConfig
from actors.control import ControlArgs, ControlProcess
from actors.courier import Counters, Courier
from actors.fragments import FragmentBuilder
from actors.policy_runner import PolicyRunner
from actors.ring import RingClosed
from algorithms.policies.registry import build
from fleet.releases import Manifest
from fleet.robot import Source

NUM_STEPS, PERIOD_S = 40, 0.05


def drive(policy_config, **actor):
    """Steps and chunks of an episode of two seconds at 20 Hz."""
    config = ActorConfig(num_episodes=1, **actor)
    robot = RobotConfig("toy", {"max_steps": NUM_STEPS})
    control = ControlProcess(multiprocessing.get_context("spawn"), ControlArgs(robot, OperatorConfig(), config))
    try:
        runner = PolicyRunner(control.spec, {"reach": [0.0]}, execute=config.execute)
        family = "tests.actors.odd_policies:Jumpy"
        described = {"family": family, "config": policy_config}
        runner.load(Manifest(1, None, "bc", 0, 0, {}, described, {}, ()), save(build(family, policy_config).state_dict()))
        cuts = queue.Queue(100)
        builder = FragmentBuilder(control.spec, "toy-1", "b" * 16, {"reach": ""})
        steps, chunks = control.go(["reach"], "test")
        courier = Courier(control.spec, steps, chunks, runner, builder, cuts, Counters(), 0.5)
        with pytest.raises(RingClosed):
            while True:
                courier.serve_once(1.0)
        control.join()
        assert control.failure is None
    finally:
        control.stop()
    tables = {"steps": [], "chunks": []}
    while not cuts.empty():
        for name, rows in cuts.get().items():
            tables.setdefault(name, []).extend(rows)
    return tables["steps"], tables["chunks"]


def held(steps):
    return [s["frame_index"] for s in steps if s["source"] == Source.SCRIPT]


def check_rate(steps):
    times_s = np.array([s["mono_ns"] for s in steps]) / 1e9
    assert [s["frame_index"] for s in steps] == list(range(NUM_STEPS))
    assert times_s[-1] - times_s[0] == pytest.approx((NUM_STEPS - 1) * PERIOD_S, rel=0.08)
    assert np.median(np.diff(times_s)) == pytest.approx(PERIOD_S, rel=0.1)


@pytest.mark.parametrize("latency_s", [0.03, 0.2])
def test_asked_ahead_of_time_a_slow_policy_neither_stops_the_robot_nor_slows_the_loop(latency_s):
    steps, chunks = drive({"seconds": latency_s, "max_delay": 8}, chunking="async", execute=6)
    check_rate(steps)
    first = round(latency_s / PERIOD_S) + 2
    assert not [frame for frame in held(steps) if frame > first]  # hold before the first chunk is there, and never again
    changes = np.abs(np.diff([s["action"][0] for s in steps if s["frame_index"] > first]))
    assert changes.max() < 0.005  # each chunk goes on where the one before is; alone they jump by 0.02
    assert all(c["latency_ms"] >= 1000 * latency_s for c in chunks)


def test_a_policy_that_needs_longer_than_its_chunks_last_is_held_at_full_rate():
    steps, chunks = drive({"seconds": 0.2, "horizon": 4}, execute=4)
    check_rate(steps)
    assert len(held(steps)) > NUM_STEPS * 0.7
    frames = [c["frame_index"] for c in chunks]
    assert max(np.diff(frames)) <= 8  # asked for anew as soon as it answered, with no queue behind
