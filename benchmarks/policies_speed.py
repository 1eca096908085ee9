"""How long ``act`` takes at chunks of 16, compiled and not; what a release weighs.

A policy as a robot loads it, with fresh weights: time does not depend on them. One thread. Compiled: ``torch.compile`` of the
modules that do the work, as long as the machine has a compiler; a chunk of each batch size is made before the clock starts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.buffer_report import measured, missing, say
from benchmarks.policies_cases import IMAGE_CASES, IMAGE_READS, STATE_CASES, STATE_READS, Case
from benchmarks.policies_process import inference_ms, plausible_observation
from benchmarks.results import Row

CHUNK, ACTION_DIM, INSTRUCTION_DIM, BATCHES = 16, 4, 32, (1, 8)


def measure_speed(repeats: int) -> list[Row]:
    """Rows of every case of the tables."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for cases, reads, images in ((STATE_CASES, STATE_READS, ""), (IMAGE_CASES, IMAGE_READS, ", 84 x 84 pixels")):
        for case in cases:
            rows += _of_case(case, reads, f"{case.name}{images}", repeats)
    why = "no GPU here: python -m benchmarks.gpu.policies"
    return [*rows, *(missing(f"SmolVLA, full size, random weights: act, batch {batch}", "ms", why) for batch in BATCHES)]


def make_policy(case: Case, reads: Mapping[str, Any]) -> Any:
    """The case's policy with chunks of 16, and fresh weights."""
    from algorithms.policies.registry import build

    known = {"reads": reads, "action_dim": ACTION_DIM, "instruction_dim": INSTRUCTION_DIM}
    torch.manual_seed(0)
    return build(case.family, {**known, **case.config, "horizon": CHUNK}).eval()


def release_bytes(policy: Any) -> int:
    """Of the tensors that a release carries."""
    from algorithms.policies.registry import published

    return sum(tensor.numel() * tensor.element_size() for tensor in published(policy).values())


def _of_case(case: Case, reads: Mapping[str, Any], name: str, repeats: int) -> list[Row]:
    policy = make_policy(case, reads)
    rows = [measured(f"{name}: bytes of a release", [release_bytes(policy) / 1e6], "MB", 2)]
    embedding = np.full(INSTRUCTION_DIM, INSTRUCTION_DIM**-0.5, np.float32)
    for compiled in (False, True):
        for batch in BATCHES:
            what = f"{name}: act, chunk {CHUNK}, batch {batch}{', compiled' * compiled}"
            obs = plausible_observation(policy, embedding, batch)
            if not compiled:
                rows.append(measured(what, inference_ms(policy, obs, repeats), "ms", 2))
            else:
                rows.append(_compiled(what, policy, obs, repeats))
    return rows


def _compiled(what: str, policy: Any, obs: dict[str, torch.Tensor], repeats: int) -> Row:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return missing(what, "ms", "torch.compile needs a C++ compiler on the CPU")
    start = time.perf_counter()
    try:
        faster = torch.compile(policy.act, dynamic=False)
        with torch.inference_mode():
            same = torch.allclose(faster(obs).actions_BHA, policy.act(obs).actions_BHA, atol=1e-3)
    except Exception as error:  # whatever a compiler says; the row tells it
        return missing(what, "ms", " ".join(f"{type(error).__name__}: {error}".split())[:160])
    say(f"{what}: compiled in {time.perf_counter() - start:.0f} s")
    if not same:
        return missing(what, "ms", "compiled actions differ by more than 1e-3")
    policy_like = type("Compiled", (), {"act": staticmethod(faster)})
    return measured(what, inference_ms(policy_like, obs, repeats), "ms", 2)
