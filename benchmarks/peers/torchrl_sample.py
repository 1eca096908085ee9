"""Samples windows from TorchRL: ``python torchrl_sample.py FRAMES STEPS BATCHES FOLDER``. Prints ``rows`` and JSON.

Two ways over the same ``LazyMemmapStorage``: ``SliceSampler`` with slices of 17 steps, which is what the library offers
and reads all frames between t and t+16; and by hand, indexing the storage at t, t+16 and for the actions.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SliceSampler

AHEAD, BATCH, EPISODE = 16, 256, 400


def fill(buffer, frames, steps):
    vectors = np.random.default_rng(0).normal(size=(len(frames), 39)).astype(np.float32)
    for first in range(0, steps, EPISODE):
        at = np.arange(first, min(first + EPISODE, steps))
        i = at % len(frames)
        fields = {
            "front": torch.from_numpy(frames[i]),
            "wrist": torch.from_numpy(frames[(i + 1) % len(frames)]),
            "state": torch.from_numpy(vectors[i]),
            "action": torch.from_numpy(vectors[i, :7]),
            "episode": torch.full((len(at),), first // EPISODE),
        }
        buffer.extend(TensorDict(fields, batch_size=[len(at)]))


def by_hand(buffer, steps):
    storage = buffer.storage

    def draw():
        t = torch.randint(0, steps - AHEAD, (BATCH,))
        stored = storage._storage  # the public get() copies whole rows; this reads the columns that a window has
        names = ("front", "wrist", "state")
        window = {name: stored[name][t] for name in names}
        window.update({f"{name}_ahead": stored[name][t + AHEAD] for name in names})
        window["actions"] = stored["action"][t[:, None] + torch.arange(AHEAD)]
        return window

    return draw


def measure(how, draw, batches):
    draw()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        draw()
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return {"how": how, "batches_per_s": batches / wall_s, "cpu_ms": 1000 * cpu_s / batches}


def main():
    frames, steps, batches, folder = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    scratch = folder / "torchrl"
    shutil.rmtree(scratch, ignore_errors=True)
    sampler = SliceSampler(slice_len=AHEAD + 1, traj_key="episode", cache_values=True)
    storage = LazyMemmapStorage(steps, scratch_dir=scratch)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=BATCH * (AHEAD + 1))
    fill(buffer, frames, steps)
    rows = [
        measure("storage indexed by hand", by_hand(buffer, steps), batches),
        measure("SliceSampler", buffer.sample, max(batches // 8, 2)),
    ]
    sys.stdout.write(f"rows {json.dumps(rows)}\n")
    sys.stdout.flush()
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
