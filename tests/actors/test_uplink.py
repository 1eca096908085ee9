"""The robot's side of the wire against the real gateway, log and release store, over the in-memory link."""

import numpy as np
import pytest
from safetensors.numpy import save

from actors.fragments import encode_rows
from actors.mailbox import Mailbox
from actors.uplink import Refused, Uplink
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from fleet.errors import PolicyError
from fleet.identity import create_run_keys
from fleet.robot import Source
from fleet.server.gateway import Gateway
from fleet.server.membership import Membership
from fleet.server.releases import ReleaseStore
from fleet.spec import Feature, RobotSpec
from fleet.spool import Spool
from fleet.transport import MemoryHub

SPEC = RobotSpec("toy", 20, {"action": Feature("float32", (2,)), "observation.state": Feature("float32", (3,))})
TASKS = {"reach": {"instruction": "reach it", "embedding": [1.0]}}


class Server:
    """Gateway, log and releases of one run; ``restart`` is a kill and a new start on the same disk."""

    def __init__(self, folder, accepts=None):
        self.folder, self.accepts = folder, accepts
        create_run_keys(folder / "keys")
        self.start()

    def start(self):
        self.hub = MemoryHub()
        self.log = Log(self.folder / "buffer")
        self.releases = ReleaseStore(self.folder / "releases", self.folder / "keys")
        self.gateway = Gateway(
            self.hub,
            run_id="run",
            tasks=TASKS,
            settings={},
            ingest=Ingest(self.log),
            releases=self.releases,
            membership=Membership(),
            accepts=self.accepts,
        )

    def restart(self):
        self.log.close()
        self.start()

    def stored(self):
        reader = LogReader(self.folder / "buffer")
        keys = [(r.robot_id, r.boot_id, r.seq) for r in reader.poll()]
        reader.close()
        return keys


class RobotSide:
    """Spool, mailbox and uplink of one robot."""

    def __init__(self, server, folder, robot_id="arm-1"):
        self.robot_id, self.folder = robot_id, folder
        key = (server.folder / "keys" / "release.pub").read_text()
        self.mailbox = Mailbox(folder / "release", key)
        self.spool = Spool(folder / "spool", max_bytes=10_000_000)
        self.welcomes = []
        self.episode = 0
        self.dial(server)

    def dial(self, server):
        link = server.hub.connect(self.robot_id)
        self.uplink = Uplink(link, self.spool, SPEC, self.mailbox, lambda t, s: self.welcomes.append(t), lambda: {"version": 0})

    def record(self, num_steps=5):
        rows = []
        for frame in range(num_steps):
            row = {"robot_id": self.robot_id, "boot_id": self.spool.boot_id, "episode_id": self.episode, "frame_index": frame}
            row |= {"time_ns": 1, "mono_ns": 1, "task": "reach", "source": int(Source.POLICY), "operator_id": ""}
            row |= {"intervention": False, "chunk_id": -1, "chunk_index": -1, "next.reward": 0.0}
            row |= {"next.terminated": False, "next.truncated": False}
            row |= {"action": np.zeros(2, np.float32), "observation.state": np.zeros(3, np.float32)}
            rows.append(row)
        directory, payload = encode_rows(SPEC, {"steps": rows})
        self.spool.append(SPEC.hash, directory, payload, self.episode)
        self.episode += 1


def turn(server, *robots, times=8):
    for _ in range(times):
        for robot in robots:
            robot.uplink.run_once(0)
        server.gateway.run_once(0)


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path / "run")


def test_what_is_recorded_becomes_durable_and_leaves_the_spool(server, tmp_path):
    robot = RobotSide(server, tmp_path / "robot")
    for _ in range(3):
        robot.record()
    turn(server, robot)
    assert robot.uplink.drained
    assert server.stored() == [("arm-1", robot.spool.boot_id, seq) for seq in (1, 2, 3)]
    assert robot.welcomes == [TASKS]


def test_a_restarted_gateway_gets_what_it_lacks_and_nothing_twice(server, tmp_path):
    robot = RobotSide(server, tmp_path / "robot")
    robot.record()
    turn(server, robot)
    robot.record()
    robot.uplink.run_once(0)  # sent, and lost with the gateway's memory
    server.restart()
    robot.dial(server)
    robot.record()
    turn(server, robot)
    assert [seq for _, _, seq in server.stored()] == [1, 2, 3]
    assert robot.uplink.drained


def test_a_lost_acknowledgement_does_not_store_twice(server, tmp_path):
    robot = RobotSide(server, tmp_path / "robot")
    turn(server, robot)
    robot.record()
    robot.uplink.run_once(0)
    server.gateway.run_once(0)  # stored and acknowledged, but the robot's connection breaks before it reads
    robot.dial(server)
    turn(server, robot)
    assert [seq for _, _, seq in server.stored()] == [1]
    assert robot.uplink.drained


def test_the_backlog_of_an_earlier_start_is_sent_first(server, tmp_path):
    robot = RobotSide(server, tmp_path / "robot")
    robot.record()
    robot.record()
    first_boot = robot.spool.boot_id
    robot.spool.close()
    again = RobotSide(server, tmp_path / "robot")
    again.record()
    turn(server, again, times=20)
    assert again.spool.boot_id != first_boot
    assert server.stored() == [("arm-1", first_boot, 1), ("arm-1", first_boot, 2), ("arm-1", again.spool.boot_id, 1)]
    assert again.uplink.drained


def test_two_robots_with_the_same_numbers_do_not_mix(server, tmp_path):
    robots = [RobotSide(server, tmp_path / name, name) for name in ("arm-1", "arm-2")]
    for robot in robots:
        for _ in range(3):
            robot.record()
    turn(server, *robots)
    assert len(set(server.stored())) == len(server.stored()) == 6


def test_a_release_reaches_the_robot_without_asking(server, tmp_path):
    robot = RobotSide(server, tmp_path / "robot")
    turn(server, robot)
    policy = {"family": "mlp", "config": {}, "spec": {}}
    server.releases.publish(save({"w": np.ones(4)}), algorithm="bc", step=0, metrics={}, policy=policy)
    taken = None
    for _ in range(60):
        turn(server, robot, times=1)
        taken = taken or robot.mailbox.take()
        if taken:
            break
        import time

        time.sleep(0.01)
    assert taken[0].version == 1


def test_a_robot_that_the_policy_cannot_drive_is_told_so_once_and_for_all(tmp_path):
    def refuse(spec):
        raise PolicyError("robot type 'toy' has no camera", rule="the policy reads 'observation.images.top'")

    server = Server(tmp_path / "run", accepts=refuse)
    robot = RobotSide(server, tmp_path / "robot")
    robot.record()
    with pytest.raises(Refused, match="no camera"):
        turn(server, robot)
    assert robot.spool.num_pending == 1  # nothing is lost


def test_a_new_connection_is_introduced_anew(server, tmp_path):
    robot = RobotSide(server, tmp_path / "robot")
    turn(server, robot)
    assert len(robot.welcomes) == 1
    robot.uplink.link.connects += 1  # the link dialled again by itself: the gateway knows nothing of this connection
    robot.uplink._last_hello = -1e9
    turn(server, robot)
    assert len(robot.welcomes) == 2
