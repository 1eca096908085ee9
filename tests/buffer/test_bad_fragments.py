"""What no robot should send, at the gateway as it is shipped, over real sockets; and Arrow bytes changed at random."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.reader import LogReader
from fleet.identity import create_run_keys, enroll
from fleet.images import encode as encode_image
from fleet.journal import Journal, read_journal
from fleet.robot import Source
from fleet.schema import MAX_ROWS, TABLES, build_table, encode_fragment
from fleet.spec import Feature
from fleet.transport_zmq import ZmqRobotLink
from fleet.wire import MAX_PAYLOAD_BYTES, PROTOCOLS, Kind, Message
from tests.buffer.fragments import chunk_row, episode_row, make_rows, make_spec, message

ROOT = Path(__file__).resolve().parents[2]
P, SPEC, B = Source.POLICY, make_spec(image="jpeg"), "b" * 16
REFUSED = "fragment_refused"
LARGER = encode_image(Feature("uint8", (16, 32, 3), codec="jpeg"), np.zeros((16, 32, 3), np.uint8))

GATEWAY = """
import sys, threading
from pathlib import Path
from buffer.ingest import Ingest
from buffer.log import Log
from fleet.journal import Journal
from fleet.server.gateway import Gateway
from fleet.server.membership import Membership
from fleet.server.releases import ReleaseStore
from fleet.transport_zmq import ZmqServerLink
folder = Path(sys.argv[1])
link, ingest = ZmqServerLink("tcp://127.0.0.1:0", folder / "keys"), Ingest(Log(folder / "buffer"))
gateway = Gateway(link, run_id="run-1", tasks={}, settings={}, ingest=ingest, releases=ReleaseStore(folder / "releases"),
                  membership=Membership(), journal=Journal(folder / "gateway.jsonl"), commit_s=0.0)
link.on_malformed = gateway.count_malformed
print(link.endpoint, flush=True)
stop = threading.Event()
threading.Thread(target=gateway.run, args=(stop,), daemon=True).start()
sys.stdin.read()
stop.set()
print(ingest.stats.refused, flush=True)
"""


class Served:
    """A gateway process, and robots that talk to it one message at a time."""

    def __init__(self, folder):
        self.folder = folder
        create_run_keys(folder / "keys")
        (folder / "releases").mkdir()
        command = [sys.executable, "-c", GATEWAY, str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = self.process.stdout.readline().strip()
        self.links = {}

    def robot(self, robot_id, spec=SPEC, boot=B):
        """Connected and welcomed; the mark that it was told."""
        if robot_id not in self.links:
            self.links[robot_id] = ZmqRobotLink(enroll(self.folder / "keys", robot_id, self.endpoint, "run-1"))
        fields = {
            "protocols": list(PROTOCOLS),
            "software": "1",
            "boot_id": boot,
            "spec": spec.to_dict(),
            "spec_hash": spec.hash,
        }
        return self.ask(robot_id, Message(Kind.HELLO, fields), Kind.WELCOME).fields["seq"]

    def send(self, robot_id, fields, payload):
        """The code of the refusal, or None where the fragment was acknowledged."""
        answer = self.ask(robot_id, Message(Kind.FRAGMENT, fields, payload), Kind.ACK, Kind.BYE)
        return None if answer.kind == Kind.ACK else answer.fields["error"]["code"]

    def ask(self, robot_id, message, *kinds):
        link, deadline = self.links[robot_id], time.monotonic() + 20
        while not link.send(message):
            assert time.monotonic() < deadline
            link.receive(0.01)
        while True:
            assert time.monotonic() < deadline and self.process.poll() is None, "no answer"
            answer = link.receive(0.2)
            if answer is not None and answer.kind in kinds:
                return answer

    def end(self):
        """Closes; returns how many fragments were refused."""
        for link in self.links.values():
            link.close()
        said, _ = self.process.communicate("", timeout=20)
        assert self.process.returncode == 0
        return int(said)


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path)
    yield served
    served.process.kill()
    served.process.communicate()


def pack(tables, seq=2, spec=SPEC, **fields):
    """(fields, payload) of tables of any form."""
    directory, payload = encode_fragment({name: tables[name] for name in TABLES if name in tables})
    return {"boot_id": B, "seq": seq, "spec_hash": spec.hash, "tables": directory, **fields}, bytes(payload)


def steps(robot="bad", episode=0, first=5, sources=(P,) * 5, **changes):
    """A steps table that goes on where the first fragment ended, with some columns' values replaced."""
    rows = make_rows(robot, B, episode, first, list(sources), spec=SPEC)
    for name, value in changes.items():
        for row in rows:
            row[name.replace("__", ".")] = value
    return build_table("steps", SPEC, rows)


def column(table, name, values):
    """The table with another column of this name."""
    return table.set_column(table.schema.get_field_index(name), name, values)


def compressed(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(table)
    data = sink.getvalue().to_pybytes()
    return data + bytes(-len(data) % 64)


def raw(data, **fields):
    return {"boot_id": B, "seq": 2, "spec_hash": SPEC.hash, "tables": {"steps": len(data)}, **fields}, data


def bad_fragments():
    good = steps()
    chunk = build_table("chunks", SPEC, [chunk_row(0, 1, 1)])
    nan = np.array([np.nan, 0], np.float32)
    fields, payload = pack({"steps": good})
    return {
        "no tables": ({**fields, "tables": {}}, b""),
        "no payload": (fields, b""),
        "an unknown table": ({**fields, "tables": {"secrets": len(payload)}}, payload),
        "more payload than tables": (fields, payload + bytes(64)),
        "a length below zero": ({**fields, "tables": {"steps": -64}}, payload),
        "a length that is no number": ({**fields, "tables": {"steps": "all"}}, payload),
        "zeros": raw(bytes(640)),
        "text": raw(b"<html>" * 64),
        "the largest payload": raw(bytes(MAX_PAYLOAD_BYTES)),
        "half a stream": raw(payload[: len(payload) // 128 * 64]),
        "no rows": raw(_stream(good.slice(0, 0))),
        "too many rows": pack({"chunks": pa.concat_batches([chunk] * (MAX_ROWS + 1))}),
        "compressed rows": raw(compressed(good)),
        "another schema": pack({"steps": good.drop_columns(["action"])}),
        "one column more": pack({"steps": good.append_column("extra.x", pa.array([1] * 5))}),
        "a column twice": pack({"steps": good.append_column("task", good.column("task"))}),
        "actions as doubles": pack({"steps": column(good, "action", pa.array([[0.0, 0.0]] * 5, pa.list_(pa.float64(), 2)))}),
        "actions of three": pack({"steps": column(good, "action", pa.array([[0.0] * 3] * 5, pa.list_(pa.float32(), 3)))}),
        "no action": pack({"steps": column(good, "action", pa.array([None] * 5, pa.list_(pa.float32(), 2)))}),
        "frames as text": pack({"steps": column(good, "frame_index", pa.array(list("56789")))}),
        "NaN action": pack({"steps": steps(action=nan)}),
        "infinite state": pack({"steps": steps(observation__state=np.full(3, np.inf, np.float32))}),
        "no image": pack({"steps": steps(observation__images__top=b"")}),
        "an image that is none": pack({"steps": steps(observation__images__top=b"\xff\xd8 and so on")}),
        "an image of another size": pack({"steps": steps(observation__images__top=LARGER)}),
        "NaN reward": pack({"steps": steps(next__reward=float("nan"))}),
        "a frame again": pack({"steps": steps(first=4)}),
        "a frame left out": pack({"steps": steps(first=6)}),
        "frames out of order": pack({"steps": good.take(pa.array([0, 2, 1, 3, 4]))}),
        "a negative frame": pack({"steps": steps(first=-5)}),
        "an episode before this one": pack({"steps": steps(episode=-1)}),
        "another robot": pack({"steps": steps(robot="good")}),
        "another boot": pack({"steps": steps(boot_id="c" * 16)}),
        "an unknown source": pack({"steps": steps(source=200)}),
        "a long text": pack({"steps": steps(task="x" * 100_000)}),
        "closed by nobody": pack({"episodes": build_table("episodes", SPEC, [episode_row(3, "closed", outcome="success")])}),
        "an unknown event": pack({"episodes": build_table("episodes", SPEC, [episode_row(0, "paused")])}),
        "an unknown outcome": pack({"episodes": build_table("episodes", SPEC, [episode_row(0, "closed", outcome="great")])}),
        "replay of any type": pack({"chunks": chunk.append_column("replay.x", pa.array([{"a": 1}]))}),
        "replay of nothing": pack({"chunks": chunk.append_column("replay.x", pa.nulls(1))}),
        "a number left out": ({**fields, "seq": 3}, payload),
        "a number far away": ({**fields, "seq": 2**63}, payload),
        "a spec that nobody said": ({**fields, "spec_hash": "f" * 16}, payload),
        "a spec's name as a path": ({**fields, "spec_hash": "../" * 900}, payload),
        "a spec's name longer than a file's": ({**fields, "spec_hash": "f" * 300}, payload),
    }


def _stream(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_batch(table)
    data = sink.getvalue().to_pybytes()
    return data + bytes(-len(data) % 64)


def first_fragment(robot, **options):
    return message(robot, B, 1, 0, 0, [P] * 5, spec=SPEC, opened=True, **options)


def stored(folder, robot):
    return [record.seq for record in LogReader(folder / "buffer").poll() if record.robot_id == robot]


@pytest.mark.timeout(180)
def test_each_is_refused_by_type_and_counted_and_harms_nobody(served, tmp_path):
    """Between any two bad fragments another robot is served; then the bad one does better."""
    bad, refused, good_seq = bad_fragments(), 0, 1
    served.robot("bad")
    served.robot("good")
    assert served.send("bad", *first_fragment("bad")) is None and served.send("good", *first_fragment("good")) is None
    for name, (fields, payload) in bad.items():
        assert served.send("bad", fields, payload) == REFUSED, name
        refused += 1
        good_seq += 1
        fragment = message("good", B, good_seq, 0, good_seq + 3, [P], spec=SPEC)
        assert served.send("good", *fragment) is None, f"{name} harmed another robot"
        assert served.robot("bad") == 1, name
    assert served.send("bad", *pack({"steps": steps()})) is None
    counted = served.end()
    assert refused - counted == 2, "numbers out of order are refused before ingest"
    assert stored(tmp_path, "bad") == [1, 2] and stored(tmp_path, "good") == list(range(1, good_seq + 1))
    told = [line for line in read_journal(tmp_path / "gateway.jsonl") if line["kind"] == "refused"]
    assert told and {line["error"]["code"] for line in told} == {REFUSED}


@pytest.mark.timeout(60)
def test_an_episode_that_goes_on_after_its_end_is_refused(served):
    served.robot("bad")
    assert served.send("bad", *first_fragment("bad", closed=True)) is None
    closed_again = build_table("episodes", SPEC, [episode_row(0, "closed", outcome="failure")])
    for tables in ({"steps": steps()}, {"episodes": closed_again}):
        assert served.send("bad", *pack(tables)) == REFUSED
        assert served.robot("bad") == 1
    assert served.send("bad", *pack({"steps": steps(episode=1, first=0)})) is None


def test_a_clock_that_jumps_is_counted_and_spoils_no_latency(tmp_path):
    """Frames say what follows what, so its steps are taken like all others."""
    log, journal = Log(tmp_path / "buffer"), Journal(tmp_path / "gateway.jsonl")
    ingest, second = Ingest(log, journal), 1_000_000_000
    ingest.admit("bad", B, SPEC)
    now = time.time_ns()
    clocks = [now, now - 3600 * second, now, -(2**63), 0, 2**63 - 1, now + 86400 * second, now]
    for i, wall in enumerate(clocks):
        fields, payload = pack({"steps": steps(first=i, sources=[P], time_ns=wall, mono_ns=i)}, seq=i + 1)
        ingest.offer("bad", fields, payload)
        ingest.commit()
    assert stored(tmp_path, "bad") == list(range(1, len(clocks) + 1))
    assert ingest.stats.steps == {("bad", "policy"): len(clocks)} and ingest.stats.clock_jumps == 9
    lines = [line for line in read_journal(tmp_path / "gateway.jsonl") if line["kind"] == "durable"]
    latencies = [ms for line in lines for ms in line["latency_ms"]]
    assert len(latencies) == 4 and all(-1000 <= ms < 3700_000 for ms in latencies)
    assert sum(line["clock_jumps"] for line in lines) == 9
    log.close()


SAMPLE_ALL = """
import sys
from pathlib import Path
from buffer.reader import LogReader
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Within
from fleet.errors import StorageError
from fleet.robot import Source
from fleet.schema import decode_fragment
folder = Path(sys.argv[1])
for record in LogReader(folder).poll():
    for batch in decode_fragment(record.tables, record.payload).tables.values():
        batch.to_pylist()
sampler = Sampler(folder, ["reach"], 0)
sampler.poll()
images = ("observation.images.top",)
for within in Within:
    for names in (("observation.state",), images):
        needs = BatchNeeds(64, 4, names, {tuple(Source): 1.0}, offsets=(-1, 0, 4), within=within, replay=("log_prob_T",))
        for step in range(10):
            try:
                assert sampler.batch(needs, step).actions_BHA.shape == (64, 4, 2)
            except StorageError as error:  # of the few steps here, many are images that were changed
                assert names == images and "cannot be decoded" in error.what, error
print(sampler.num_steps(), sampler.damaged, sum(sampler.skipped_fragments.values()))
"""


@pytest.mark.timeout(600)
def test_bytes_changed_at_random_never_end_the_gateway(served, tmp_path, scale):
    """Whatever it refuses it names; whatever it takes can be read and sampled."""
    rng, taken, refused, boot = random.Random(4), 0, 0, ""
    served.robot("good")
    for trial in range(300 * scale):
        if not boot:  # the last change did no harm: the next one meets another boot
            boot = f"{trial:016x}"
            served.robot("bad", boot=boot)
            assert served.send("bad", *message("bad", boot, 1, 0, 0, [P] * 5, spec=SPEC, opened=True)) is None
            fields, payload = message("bad", boot, 2, 0, 5, [P] * 5, spec=SPEC, closed=True, chunk=(1, 1))
        code = served.send("bad", fields, mutate(rng, payload))
        if code is None:
            taken, boot = taken + 1, ""
        else:
            assert code == REFUSED
            refused += 1
            assert served.robot("bad", boot=boot) == 1
    served.robot("good")  # who was silent for so long has to say HELLO again
    assert served.send("good", *first_fragment("good")) is None
    assert served.end() == refused > 10 and taken > 10
    command = [sys.executable, "-c", SAMPLE_ALL, str(tmp_path / "buffer")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    num_steps, damaged, skipped = map(int, said.stdout.split())
    assert num_steps > 0 and damaged == skipped == 0


def mutate(rng, data):
    """Some bytes changed, in one of the ways in which bytes go wrong."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                at -= at % 4
                data[at : at + 4] = rng.choice([2**31 - 1, 2**32 - 1, 0, 1, len(data), 1 << 30]).to_bytes(4, "little")
            case 3:
                at -= at % 8
                data[at : at + 8] = rng.choice([2**63 - 1, 2**64 - 1, 2**40, len(data)]).to_bytes(8, "little")
            case 4:
                other, length = rng.randrange(len(data)), rng.randrange(64)
                piece = data[other : other + length]
                data[at : at + len(piece)] = piece
    return bytes(data)
