"""A control loop and a courier in one process, for tests: the loop runs in a thread, the courier is driven by hand."""

import queue
import threading

import numpy as np

from actors.courier import Counters, Courier
from actors.fragments import ChunkRow, FragmentBuilder
from actors.loop import ControlLoop, LoopSettings
from actors.operators import make_operator
from actors.plan import Chunking
from actors.records import chunk_dtype, step_dtype
from actors.ring import Ring, RingClosed, make_pipe
from actors.robots.toy import ToyRobot
from actors.safety import SafetyConfig, SafetyFilter


class ConstantRunner:
    """A policy that always answers the same chunk: eight times ``action``."""

    ready, version = True, 7

    def __init__(self, action):
        self.actions_HA = np.tile(np.asarray(action, np.float32), (8, 1))
        self.num_calls = 0

    def act(self, episode_id, frame_index, task, obs, prefix_DA=None):
        self.num_calls += 1
        return ChunkRow(episode_id, self.num_calls, frame_index, self.version, 0.1, self.actions_HA, [])


def run_episodes(
    runner,
    *,
    operator=None,
    demonstrates=False,
    episodes=1,
    realtime=False,
    robot=None,
    chunking="execute",
    execute=4,
    **settings,
):
    """All rows of some episodes by table name, and the loop."""
    robot = robot or ToyRobot()
    operator = operator or make_operator("scripted", expert="toy", mode="off")
    steps = Ring(step_dtype(robot.spec), 64, make_pipe())
    chunks = Ring(chunk_dtype(robot.spec), 16, make_pipe())
    rule = Chunking(chunking, execute)
    options = LoopSettings(["reach"], stream="test", num_episodes=episodes, chunking=rule, realtime=realtime, **settings)
    safety = SafetyFilter(robot.spec, SafetyConfig())
    loop = ControlLoop(robot, operator, safety, steps, chunks, options, lambda: False, demonstrates)
    cuts = queue.Queue(1000)
    builder = FragmentBuilder(robot.spec, "toy-1", "b" * 16, {"reach": "reach it"})
    courier = Courier(robot.spec, steps, chunks, runner, builder, cuts, Counters(), 0.5)

    errors = []

    def work():
        try:
            loop.run()
        except Exception as error:
            errors.append(error)
        finally:
            steps._writer.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while True:
            courier.serve_once(1.0)
    except RingClosed:
        pass
    thread.join()
    if errors:
        raise errors[0]
    tables = {}
    while not cuts.empty():
        for name, rows in cuts.get().items():
            tables.setdefault(name, []).extend(rows)
    steps.close()
    chunks.close()
    return tables, loop, courier
