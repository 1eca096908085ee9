"""kill -9 of the shard process while robots send, with 100,000 steps stored: until it serves again, and what is lost.

What counts as acknowledged is what the robots' spools let go of. Stored steps are counted by (robot, boot, episode,
frame): none may be missing, none may be there twice.
"""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path

import numpy as np

from actors.fragments import encode_rows
from actors.mailbox import Mailbox
from actors.uplink import HELLO_EVERY_S, Uplink
from benchmarks.buffer_client import MemorySpool
from benchmarks.buffer_data import Robot, fill_log
from benchmarks.buffer_process import Shard
from benchmarks.buffer_report import measured, say
from benchmarks.buffer_sample import sample_in_child
from benchmarks.results import Row
from buffer.reader import LogReader
from fleet.identity import Credential
from fleet.schema import decode_fragment
from fleet.transport_zmq import ZmqRobotLink

READY_S = 2.0


class Sender(threading.Thread):
    """A robot that sends until it is told to stop, and then until all is acknowledged."""

    def __init__(self, shard: Shard, number: int) -> None:
        super().__init__(daemon=True)
        path = shard.credential(f"sender-{number}")
        credential = Credential.load(path)
        self.spool = MemorySpool()
        self.robot = Robot(credential.robot_id, self.spool.boot_id, seed=number)
        mailbox = Mailbox(Path(f"{path}.state"), credential.release_public)
        self.uplink = Uplink(ZmqRobotLink(credential), self.spool, self.robot.spec, mailbox, lambda tasks, settings: None, dict)
        self.stop = threading.Event()
        self.num_steps = 0
        self.start()

    def run(self) -> None:
        while not (self.stop.is_set() and self.spool.num_pending == 0):
            if not self.stop.is_set() and self.spool.num_pending < 8:
                for episode, rows in self.robot.fragments(16):
                    directory, payload = encode_rows(self.robot.spec, rows)
                    self.spool.append(self.robot.spec.hash, directory, payload, episode)
                    self.num_steps += len(rows["steps"])
            self.uplink.run_once(0.005)
        self.uplink.bye()


def run(run_folder: Path, *, steps: int, repeats: int) -> list[Row]:
    """``run_folder`` is made here and holds the log afterwards."""
    shard = Shard(run_folder)
    shard.start()
    shard.credential("first")  # returns once the gateway has told its address
    shard.stop()
    say(f"restart: storing {steps} steps")
    fill_log(shard.run.buffer, steps)
    shard.start()
    senders = [Sender(shard, number) for number in range(2)]
    ready_s = []
    for repeat in range(repeats):
        time.sleep(1.0 + np.random.default_rng(repeat).uniform(0, 0.5))
        shard.kill()
        start = time.perf_counter()
        shard.start()
        _say_hello(shard, f"hello-{repeat}")
        ready_s.append(time.perf_counter() - start)
        say(f"restart {repeat + 1}/{repeats}: answers a HELLO after {ready_s[-1]:.2f} s")
    time.sleep(2 * HELLO_EVERY_S)
    for sender in senders:
        sender.stop.set()
    for sender in senders:
        sender.join(60)
        if sender.is_alive():
            raise RuntimeError("a robot has not got everything acknowledged")
    lost, twice = _count(shard.run.buffer, steps, senders)
    shard.kill()
    opened, _ = sample_in_child(shard.run.buffer, warm=0, batches=2)
    ready = measured(f"kill -9 at {steps} steps: until a HELLO is answered", ready_s, "s", 2)
    ready.target, ready.met = f"< {READY_S} s", max(ready_s) < READY_S
    return [
        ready,
        Row(f"kill -9 at {steps} steps: acknowledged steps lost", lost, "steps", repeats=repeats, target="0", met=lost == 0),
        Row(f"kill -9 at {steps} steps: steps stored twice", twice, "steps", repeats=repeats, target="0", met=twice == 0),
        Row(f"kill -9 at {steps} steps: a new sampler has all steps after", round(opened["open_s"], 3), "s"),
    ]


def _say_hello(shard: Shard, robot_id: str) -> None:
    """Returns when the gateway has welcomed a robot of its own, which dials as long as nobody answers."""
    credential = Credential.load(shard.credential(robot_id))
    spool = MemorySpool()
    mailbox = Mailbox(shard.run.robots / f"{robot_id}.state", credential.release_public)
    uplink = Uplink(
        ZmqRobotLink(credential), spool, Robot(robot_id, secrets.token_hex(8)).spec, mailbox, lambda tasks, settings: None, dict
    )
    while not uplink.connected:
        uplink.run_once(0.005)
    uplink.bye()
    uplink.link.close()


def _count(buffer: Path, steps: int, senders: list[Sender]) -> tuple[int, int]:
    """Acknowledged steps that are missing, and steps that are there more than once."""
    expected = {("robot-0", "0" * 16): steps, **{(s.robot.robot_id, s.spool.boot_id): s.num_steps for s in senders}}
    seen: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in expected}
    reader = LogReader(buffer, verify=False)
    for record in reader.poll():
        table = decode_fragment(record.tables, record.payload).tables["steps"]
        episode, frame = (table.column(name).to_numpy().astype(np.int64) for name in ("episode_id", "frame_index"))
        seen[record.robot_id, record.boot_id].append((episode << 32) | frame)
    reader.close()
    lost = twice = 0
    for key, count in expected.items():
        keys = np.concatenate(seen[key])
        unique = len(np.unique(keys))
        lost += count - unique
        twice += len(keys) - unique
    return lost, twice
