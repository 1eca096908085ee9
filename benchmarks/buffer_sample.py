"""Sampling: batch 256 of (observation t, actions t .. t+15, observation t+16) from a log of 10,000 steps; a numpy gather
from memory, Reverb and TorchRL beside it. And the resident memory of a sampling process at 10 k, 50 k and 100 k steps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.buffer_data import fill_log, make_frames
from benchmarks.buffer_limits import GATHERS, gather_per_s
from benchmarks.buffer_process import ENV, ROOT, Child
from benchmarks.buffer_report import Peers, measured, median, missing, say
from benchmarks.results import Row

STEPS, TARGET_PER_S = 10_000, 90
Facts = dict[str, float]


def sample_in_child(folder: Path, *, warm: int, batches: int, cache_mb: int = 0) -> tuple[Facts, Facts]:
    """What opening took, and what the batches took, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.buffer_sampling", str(folder), str(warm), str(batches)]
    done = subprocess.run(
        [*command, *([str(cache_mb)] if cache_mb else [])], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    opened, sampled = (json.loads(line) for line in done.stdout.splitlines())
    return opened, sampled


def drop_from_page_cache(folder: Path) -> None:
    """Lets go of the pages of all files. Nobody may have them mapped: mapped pages stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def run(folder: Path, peers: Peers, *, repeats: int, steps: int = STEPS, batches: int = 200) -> list[Row]:
    """Rows of rates and CPU."""
    raw, jpeg = folder / "sample-raw", folder / "sample-jpeg"
    np.save(folder / "frames.npy", make_frames(128, seed=0))
    fill_log(raw, steps)
    fill_log(jpeg, steps, "jpeg")
    found: dict[str, list[tuple[float, float]]] = {}
    read_mb: list[float] = []

    def note(name: str, rate: float, cpu_ms: float) -> None:
        found.setdefault(name, []).append((rate, cpu_ms))
        say(f"sample, {name}: {rate:.1f} batches/s, {cpu_ms:.1f} CPU-ms")

    for _ in range(repeats):
        for how in GATHERS:
            note(f"numpy gather from memory, {how}", *gather_per_s(how, steps, batches))
        _, warm = sample_in_child(raw, warm=batches // 2, batches=batches)
        note("warm", warm["batches_per_s"], warm["cpu_ms"])
        drop_from_page_cache(raw)
        _, cold = sample_in_child(raw, warm=0, batches=max(batches // 20, 2))
        note("cold", cold["batches_per_s"], cold["cpu_ms"])
        read_mb.append(cold["read_mb"] / max(batches // 20, 2))
        _, images = sample_in_child(jpeg, warm=2, batches=max(batches // 20, 5))
        note("JPEG 224x224, decoded for each batch", images["batches_per_s"], images["cpu_ms"])
        _, cached = sample_in_child(jpeg, warm=batches // 2, batches=max(batches // 4, 5), cache_mb=4000)
        note("JPEG 224x224, cache of 4 GB", cached["batches_per_s"], cached["cpu_ms"])
        for name, rate, cpu_ms in _peer_rates(folder, peers, steps, max(batches // 10, 5)):
            note(name, rate, cpu_ms)
    shutil.rmtree(raw)
    shutil.rmtree(jpeg)
    return _rows(found, read_mb, peers)


def _peer_rates(folder: Path, peers: Peers, steps: int, batches: int) -> list[tuple[str, float, float]]:
    here, log, rates = ROOT / "benchmarks" / "peers", folder / "peers.log", []
    for name, python, script in (("Reverb", peers.reverb, "reverb_sample.py"), ("TorchRL", peers.torchrl, "torchrl_sample.py")):
        if python is None:
            continue
        child = Child([python, here / script, str(folder / "frames.npy"), str(steps), str(batches), str(folder)], log)
        for facts in json.loads(child.wait_for("rows")):
            rates.append((f"{name}, {facts['how']}", facts["batches_per_s"], facts["cpu_ms"]))
        child.end()
    return rates


def _rows(found: dict[str, list[tuple[float, float]]], read_mb: Sequence[float], peers: Peers) -> list[Row]:
    rows = []
    gathered = max(median([rate for rate, _ in values]) for name, values in found.items() if name.startswith("numpy"))
    reverb = [median([rate for rate, _ in values]) for name, values in found.items() if name.startswith("Reverb")]
    for name, values in found.items():
        rate = measured(f"sample, {name}", [r for r, _ in values], "batches/s", 1)
        cpu = measured(f"sample, {name}: CPU", [c for _, c in values], "ms/batch", 1)
        assert rate.value is not None
        if name == "warm":
            rate.limit, rate.target = (
                f"numpy gather {gathered:.1f}/s",
                f">= {TARGET_PER_S} and >= {gathered:.1f}: numpy's fastest gather",
            )
            rate.met = rate.value >= TARGET_PER_S and rate.value >= gathered
            rate.peer, rate.peer_value = "Reverb, its best", round(max(reverb), 1) if reverb else None
        if name == "cold":
            rate.why = f"{median(read_mb):.0f} MB read from the disk a batch"
        rows += [rate, cpu]
    rows += [missing("sample, Reverb", "batches/s", peers.why_no_reverb)] if peers.reverb is None else []
    rows += [missing("sample, TorchRL", "batches/s", peers.why_no_torchrl)] if peers.torchrl is None else []
    return rows


def run_memory(log: Path, sizes: Sequence[int], *, batches: int) -> list[Row]:
    """Resident memory while sampling, as the log at ``log`` grows to each size."""
    rows: list[Row] = []
    have, anon = 0, []
    for size in sizes:
        fill_log(log, size - have, boot_id=f"{size:016x}")
        have = size
        opened, sampled = sample_in_child(log, warm=0, batches=batches)
        say(f"memory at {size} steps: {sampled}, opened in {opened['open_s']:.2f} s")
        if opened["num_steps"] != size:
            raise RuntimeError(f"{opened['num_steps']} of {size} steps can be sampled")
        anon.append(sampled["RssAnon"])
        for name, text in (("VmRSS", "all"), ("RssAnon", "anonymous"), ("RssFile", "of mapped files")):
            rows.append(Row(f"resident memory of a sampling process at {size} steps, {text}", round(sampled[name]), "MB"))
        rows.append(Row(f"a new sampler has all of {size} steps after", round(opened["open_s"], 3), "s"))
    growth = rows[4 * (len(sizes) - 1) + 1]
    growth.target = f"<= 1.2x of that at {sizes[0]} steps"
    growth.met = anon[-1] <= 1.2 * anon[0]
    return rows
