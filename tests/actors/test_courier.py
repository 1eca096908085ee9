import queue

import pytest
from loop_bench import ConstantRunner, run_episodes

from actors.courier import Counters, Courier
from actors.fragments import FragmentBuilder, encode_rows
from actors.records import RecordKind, chunk_dtype, pack_text, step_dtype
from actors.ring import Ring, RingClosed, make_pipe
from actors.robots.toy import ToyRobot
from fleet.errors import PolicyError
from fleet.robot import Source
from fleet.schema import check_fragment, decode_fragment


class StalledOnce(queue.Queue):
    """A queue that is full at one moment: for its third item."""

    def __init__(self):
        super().__init__()
        self.num_offered = 0

    def put_nowait(self, item):
        self.num_offered += 1
        if self.num_offered == 3:
            raise queue.Full
        super().put_nowait(item)


def cut_by_cut(courier, builder, episode, num_cuts, frames_per_cut=3):
    """One episode in pieces, as the courier would cut it."""
    builder._begin(episode, "reach", 1)
    frame = 0
    for _ in range(num_cuts):
        for _ in range(frames_per_cut):
            builder._append("steps", step(builder, episode, frame))
            frame += 1
        courier.cut()
    builder.end("failure", "robot", frame)
    courier.cut()


def step(builder, episode, frame):
    row = {"robot_id": builder.robot_id, "boot_id": builder.boot_id, "episode_id": episode, "frame_index": frame}
    row |= {"time_ns": 1, "mono_ns": 1, "task": "reach", "source": int(Source.POLICY), "operator_id": "", "intervention": False}
    row |= {"chunk_id": -1, "chunk_index": -1, "next.reward": 0.0, "next.terminated": False, "next.truncated": False}
    robot = ToyRobot()
    return row | {"action": robot.hold(), **robot.reset("reach", 1)}


def test_what_follows_a_lost_part_of_an_episode_is_lost_too_and_the_next_episode_is_whole():
    spec, cuts = ToyRobot().spec, StalledOnce()
    builder, counters = FragmentBuilder(spec, "toy-1", "b" * 16, {}), Counters()
    courier = Courier(spec, None, None, None, builder, cuts, counters, 0.5)
    cut_by_cut(courier, builder, 0, num_cuts=4)  # the third cut finds no room, the fourth would leave a gap
    cut_by_cut(courier, builder, 1, num_cuts=2)
    frames = {}
    while not cuts.empty():
        for row in cuts.get().get("steps", []):
            frames.setdefault(row["episode_id"], []).append(row["frame_index"])
    assert frames == {0: list(range(6)), 1: list(range(6))}
    assert counters.lost_rows == 3 + 3 + 1  # six steps and the closed row of the first episode


def test_the_builder_makes_what_the_gateway_takes():
    tables, _, courier = run_episodes(ConstantRunner([0.1, 0.1]), episodes=1)
    directory, payload = encode_rows(courier.spec, tables)
    check_fragment(decode_fragment(directory, payload), courier.spec, "toy-1", "b" * 16)
    assert courier.counters.steps == len(tables["steps"]) and courier.counters.episodes == 1


def test_an_episode_that_ended_while_the_policy_thought_is_recorded_to_its_end():
    spec, cuts = ToyRobot().spec, queue.Queue()
    steps, chunks = Ring(step_dtype(spec), 16, make_pipe()), Ring(chunk_dtype(spec), 16, make_pipe())
    texts = {RecordKind.OPEN: {"task": "reach", "seed": 1}, RecordKind.RESULT: {"operator": ""}}
    texts[RecordKind.CLOSE] = {"outcome": "success", "judge": "robot", "length": 1}
    for kind in RecordKind:
        record = steps.reserve()
        record["kind"], record["text"], record["wants_chunk"] = kind, pack_text(**texts.get(kind, {})), True
        steps.commit()
    steps.consumes_here()
    chunks._reader.close()  # the control process is gone, and with it the reader of chunks
    courier = Courier(spec, steps, chunks, ConstantRunner([0, 0]), FragmentBuilder(spec, "r", "b", {}), cuts, Counters(), 9.0)
    with pytest.raises(RingClosed):
        while True:
            courier.serve_once(1.0)
    rows = cuts.get_nowait()
    assert cuts.empty() and len(rows["steps"]) == 1 and rows["episodes"][-1]["outcome"] == "success"
    steps.close()
    chunks.close()


class FailingRunner(ConstantRunner):
    """Fails for every second chunk."""

    def act(self, *args):
        if args[1] % 8 == 0:
            raise PolicyError("'observation.state' is nan", rule="observations are finite")
        return super().act(*args)


def test_a_policy_that_fails_holds_the_robot_and_is_asked_again(caplog):
    tables, _, courier = run_episodes(FailingRunner([1.0, 1.0]), execute=4)
    sources = [s["source"] for s in tables["steps"]]
    assert sources[:4] == [Source.SCRIPT] * 4 and sources[4:8] == [Source.POLICY] * 4
    assert courier.counters.failed_chunks >= 5 and len(caplog.records) == 1 and "observation.state" in caplog.text
