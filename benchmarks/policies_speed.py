"""How long ``act`` takes at chunks of 16, compiled and not; what a release weighs.

    python -m benchmarks.policies_speed KEY BATCH REPEATS      # one compiled policy, prints milliseconds as JSON

A policy as a robot loads it, with fresh weights: time does not depend on them. One thread. Compiled: ``torch.compile`` of the
whole ``act``, in a process of its own that is given ``COMPILE_S``; it is done before the clock starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.buffer_process import ENV, ROOT
from benchmarks.buffer_report import measured, missing, say
from benchmarks.policies_cases import IMAGE_CASES, IMAGE_READS, STATE_CASES, STATE_READS, Case
from benchmarks.policies_process import inference_ms, plausible_observation
from benchmarks.results import Row

CHUNK, ACTION_DIM, INSTRUCTION_DIM, BATCHES = 16, 4, 32, (1, 8)
COMPILE_S = 120.0
SAME = 1e-3  # compiled actions may differ by so much
CASES: dict[str, tuple[Case, Mapping[str, Any]]] = {
    **{case.name: (case, STATE_READS) for case in STATE_CASES},
    **{f"{case.name}, 84 x 84 pixels": (case, IMAGE_READS) for case in IMAGE_CASES},
}


def measure_speed(repeats: int, families: Sequence[str], compiled: bool = True) -> list[Row]:
    """Rows of every case of the tables, or of those named."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for key, (case, _) in CASES.items():
        if not families or case.name in families:
            rows += _of_case(key, repeats, compiled)
    why = "no GPU here: python -m benchmarks.gpu.policies"
    return [*rows, *(missing(f"SmolVLA, full size, random weights: act, batch {batch}", "ms", why) for batch in BATCHES)]


def make_policy(key: str) -> Any:
    """The case's policy with chunks of 16, and fresh weights."""
    from algorithms.policies.registry import build

    case, reads = CASES[key]
    sizes = {"reads": reads, "action_dim": ACTION_DIM, "instruction_dim": INSTRUCTION_DIM, "horizon": CHUNK}
    torch.manual_seed(0)
    return build(case.family, {**case.config, **sizes}).eval()


def release_bytes(policy: Any) -> int:
    """Of the tensors that a release carries."""
    from algorithms.policies.registry import published

    return sum(tensor.numel() * tensor.element_size() for tensor in published(policy).values())


def _of_case(key: str, repeats: int, compiled: bool) -> list[Row]:
    policy = make_policy(key)
    rows = [measured(f"{key}: bytes of a release", [release_bytes(policy) / 1e6], "MB", 2)]
    for batch in BATCHES:
        times = inference_ms(policy, _observation(policy, batch), repeats)
        rows.append(measured(f"{key}: act, chunk {CHUNK}, batch {batch}", times, "ms", 2))
    for batch in BATCHES if compiled else ():
        rows.append(_compiled(f"{key}: act, chunk {CHUNK}, batch {batch}, compiled", key, batch, repeats))
        if rows[-1].value is None:
            break  # the other batch says the same, and as late
    return rows


def _compiled(what: str, key: str, batch: int, repeats: int) -> Row:
    if shutil.which("g++") is None:
        return missing(what, "ms", "torch.compile needs g++ on the CPU")
    command = [sys.executable, "-m", "benchmarks.policies_speed", key, str(batch), str(repeats)]
    env = {**ENV, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=COMPILE_S)
    except subprocess.TimeoutExpired:
        return missing(what, "ms", f"not compiled within {COMPILE_S:.0f} s")
    if done.returncode:
        return missing(what, "ms", " ".join(done.stderr.split())[-200:])
    said = json.loads(done.stdout.splitlines()[-1])
    say(f"{what}: compiled in {said['compile_s']:.0f} s")
    if said["apart"] > SAME:
        return missing(what, "ms", f"compiled actions differ by {said['apart']:.2g}")
    return measured(what, said["ms"], "ms", 2)


def _observation(policy: Any, batch: int) -> dict[str, torch.Tensor]:
    return plausible_observation(policy, np.full(INSTRUCTION_DIM, INSTRUCTION_DIM**-0.5, np.float32), batch)


class _Compiled:
    def __init__(self, policy: Any) -> None:
        self.act = torch.compile(policy.act, dynamic=False)


def main() -> None:
    torch.set_num_threads(1)
    policy = make_policy(sys.argv[1])
    obs, compiled = _observation(policy, int(sys.argv[2])), _Compiled(policy)
    with torch.inference_mode():
        start = time.perf_counter()
        apart = (compiled.act(obs).actions_BHA - policy.act(obs).actions_BHA).abs().max().item()
        compile_s = time.perf_counter() - start
    facts = {"compile_s": compile_s, "apart": apart, "ms": inference_ms(compiled, obs, int(sys.argv[3]))}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
