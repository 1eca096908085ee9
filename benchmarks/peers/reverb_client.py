"""One robot that inserts into Reverb as fast as it can: ``python reverb_client.py PORT STEPS KIND FRAMES``.

The same steps as ``benchmarks/buffer_data.py``: two uint8 128 x 128 x 3 frames from the file FRAMES, state 39 and action
7 float32. ``done``: the server has confirmed all items. KIND is what an item is:

windows   at every step t: observation t, actions t .. t+15, observation t+16. What the sample benchmark draws, and what
          our buffer serves from the same data. A frame is a chunk of its own: a larger one would be sent whole for each
          window that touches it.
runs      every 16 steps these 16 steps, in one chunk a column: what costs Reverb least; only whole runs can be drawn.
"""

import sys

import numpy as np
import reverb

AHEAD = 16
IMAGES = ("front", "wrist")


def step_maker(path):
    frames = np.load(path)
    vectors = np.random.default_rng(0).normal(size=(len(frames), 39)).astype(np.float32)

    def make(step):
        i = step % len(frames)
        return {
            "front": frames[i],
            "wrist": frames[(i + 1) % len(frames)],
            "state": vectors[i],
            "action": vectors[i, :7],
        }

    return make


def window(history):
    """Trajectory of the window that ends with the newest step."""
    item = {f"{name}_{at}": history[name][i : i + 1] for name in (*IMAGES, "state") for at, i in (("t", -AHEAD - 1),)}
    item.update({f"{name}_ahead": history[name][-1:] for name in (*IMAGES, "state")})
    item["actions"] = history["action"][-AHEAD - 1 : -1]
    return item


def send(client, make, steps, kind):
    with client.trajectory_writer(num_keep_alive_refs=AHEAD + 1) as writer:
        for name in (*IMAGES, "state", "action"):
            length = AHEAD if kind == "runs" else 1 if name in IMAGES else AHEAD + 1
            writer.configure((name,), num_keep_alive_refs=AHEAD + 1, max_chunk_length=length)
        for step in range(steps):
            writer.append(make(step))
            if kind == "windows" and step >= AHEAD:
                writer.create_item("steps", priority=1.0, trajectory=window(writer.history))
                writer.flush(block_until_num_items=64)
            elif kind == "runs" and (step + 1) % AHEAD == 0:
                item = {name: column[-AHEAD:] for name, column in writer.history.items()}
                writer.create_item("steps", priority=1.0, trajectory=item)
                writer.flush(block_until_num_items=4)
        writer.flush()


if __name__ == "__main__":
    port, steps, kind, frames = sys.argv[1:]
    client = reverb.Client("127.0.0.1:" + port)
    make = step_maker(frames)
    send(client, make, 480, kind)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    send(client, make, int(steps), kind)
    sys.stdout.write("done\n")
    sys.stdout.flush()
    sys.stdin.readline()
