"""Samples windows from Reverb: ``python reverb_sample.py FRAMES STEPS BATCHES FOLDER``. Prints ``rows`` and JSON.

The server is a process of its own and holds the items that ``reverb_client.py windows`` makes. Batches of 256 come from
``TrajectoryDataset`` with Reverb's prefetching. CPU is that of both processes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import reverb
import tensorflow as tf
from reverb_client import AHEAD, IMAGES, send, step_maker

BATCH = 256
HERE = Path(__file__).parent


def dataset(address):
    shapes = {}
    for at in ("t", "ahead"):
        shapes.update({f"{name}_{at}": ((1, 128, 128, 3), tf.uint8) for name in IMAGES})
        shapes[f"state_{at}"] = ((1, 39), tf.float32)
    shapes["actions"] = ((AHEAD, 7), tf.float32)
    items = reverb.TrajectoryDataset(
        address,
        "steps",
        dtypes={name: dtype for name, (_, dtype) in shapes.items()},
        shapes={name: tf.TensorShape(shape) for name, (shape, _) in shapes.items()},
        max_in_flight_samples_per_worker=2 * BATCH,
        num_workers_per_iterator=2,
    )
    return items.batch(BATCH, drop_remainder=True).prefetch(2)


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    frames, steps, batches, _ = sys.argv[1:]
    command = [sys.executable, str(HERE / "reverb_server.py"), steps]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    address = "127.0.0.1:" + server.stdout.readline().split()[1]
    send(reverb.Client(address), step_maker(frames), int(steps), "windows")
    drawn = iter(dataset(address))
    for _ in range(4):
        next(drawn)
    start, cpu = time.perf_counter(), cpu_s(server.pid) + cpu_s("self")
    for _ in range(int(batches)):
        next(drawn)
    wall_s, cpu = time.perf_counter() - start, cpu_s(server.pid) + cpu_s("self") - cpu
    facts = {"how": "windows", "batches_per_s": int(batches) / wall_s, "cpu_ms": 1000 * cpu / int(batches)}
    sys.stdout.write(f"rows {json.dumps([facts])}\n")
    sys.stdout.flush()
    server.kill()


if __name__ == "__main__":
    main()
