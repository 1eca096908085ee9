"""Policies on a GPU: how long ``act`` takes at chunks of 16, compiled and not, and what a release weighs; SmolVLA at its full
size too, with random weights.

    python -m benchmarks.gpu.policies --save          # on a machine with a GPU; SmolVLA where lerobot is installed
    python -m benchmarks.gpu.policies --size tiny     # anywhere: does it run?

Weights are fresh: time does not depend on them. Bytes are those of the tensors that a release carries (published) and of all
that the policy has (whole): the difference is the frozen backbone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.buffer_report import measured, missing, say
from benchmarks.gpu.smolvlm import make_backbone
from benchmarks.policies_cases import STATE
from benchmarks.policies_speed import BATCHES, CHUNK, SAME, release_bytes
from benchmarks.results import Row, machine
from fleet.errors import PolicyError

FOLDER = Path(__file__).parent
WARM = 3
CAMERAS = ("observation.images.front", "observation.images.wrist")


def cases(full: bool, folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Family and config by name."""
    size, state = (224, 14) if full else (32, 6)
    vectors = {"reads": {STATE: [state]}, "action_dim": 7 if full else 3, "instruction_dim": 32, "horizon": CHUNK}
    images = {**vectors, "reads": {STATE: [state], **{name: [size, size, 3] for name in CAMERAS}}}
    found = {
        "mlp": ("mlp", vectors),
        "cnn": ("cnn", images),
        "flow": ("flow", vectors),
        "token, parallel": ("token", {**vectors, "decoding": "parallel"}),
        "token, autoregressive": ("token", {**vectors, "decoding": "autoregressive"}),
        "token, diffusion": ("token", {**vectors, "decoding": "diffusion"}),
        "small_vla": ("small_vla", images),
    }
    smolvla = {"reads": images["reads"], "action_dim": images["action_dim"], "kind": "smolvla"}
    try:
        found["SmolVLA"] = ("lerobot", {**smolvla, "policy": {"chunk_size": CHUNK, **make_backbone(folder, full)}})
    except ModuleNotFoundError as absent:
        say(f"SmolVLA is left out: {absent}")
    return found


def observe(policy: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Noise of what the policy reads, and conditions."""
    from algorithms.policies.base import TEXT
    from algorithms.policies.text import text_of

    spec, generator = policy.spec, torch.Generator().manual_seed(0)
    obs = {name: torch.randn(batch, *shape, generator=generator) for name, shape in {**spec.vectors, **spec.conditions}.items()}
    for name, shape in spec.images.items():
        obs[name] = torch.randint(256, (batch, *shape), generator=generator, dtype=torch.uint8)
    if TEXT in spec.conditions:
        obs[TEXT] = text_of("press the button from above").expand(batch, -1)
    return {name: value.to(device) for name, value in obs.items()}


def act_ms(act: Any, obs: Mapping[str, Tensor], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each call, results waited for."""
    times = []
    with torch.inference_mode():
        for _ in range(WARM + repeats):
            start = time.perf_counter()
            act(obs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - start))
    return times[WARM:]


def measure(name: str, policy: Any, repeats: int, compiled: bool, device: torch.device) -> list[Row]:
    """Rows of one policy."""
    whole = sum(tensor.numel() * tensor.element_size() for tensor in policy.state_dict().values())
    rows = [
        measured(f"{name}: bytes of a release", [release_bytes(policy) / 1e6], "MB", 2),
        measured(f"{name}: bytes with what is frozen", [whole / 1e6], "MB", 2),
    ]
    policy.to(device)
    for batch in BATCHES:
        obs, what = observe(policy, batch, device), f"{name}: act, chunk {CHUNK}, batch {batch}"
        rows.append(measured(what, act_ms(policy.act, obs, repeats, device), "ms", 2))
        if compiled:
            rows.append(_compiled(f"{what}, compiled", policy, obs, repeats, device))
    return rows


def _compiled(what: str, policy: Any, obs: Mapping[str, Tensor], repeats: int, device: torch.device) -> Row:
    torch._dynamo.reset()
    try:
        act = torch.compile(policy.act, dynamic=False)
        with torch.inference_mode():
            apart = (act(obs).actions_BHA - policy.act(obs).actions_BHA).abs().max().item()
    except Exception as error:  # whatever the compiler says of this policy; the row tells it
        return missing(what, "ms", " ".join(f"{type(error).__name__}: {error}".split())[:200])
    if apart > SAME:
        return missing(what, "ms", f"compiled actions differ by {apart:.2g}")
    return measured(what, act_ms(act, obs, repeats, device), "ms", 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of images and of SmolVLA")
    parser.add_argument("--only", nargs="+", default=[], help="names of policies; default: all")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--json", action="store_true", help="print the rows")
    parser.add_argument("--save", action="store_true", help="write them beside this file")
    args = parser.parse_args()
    from algorithms.policies.registry import build

    device, rows = torch.device("cuda" if torch.cuda.is_available() else "cpu"), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for name, (family, config) in cases(args.size == "full", Path(folder)).items():
            if args.only and name not in args.only:
                continue
            torch.manual_seed(0)
            try:
                policy = build(family, config).eval()
            except PolicyError as error:
                rows.append(missing(f"{name}: act", "ms", str(error)))
                continue
            say(f"{name}: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters")
            rows += measure(name, policy, args.repeats, not args.eager, device)
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    for row in rows:
        row.command, row.machine = "python -m benchmarks.gpu.policies " + " ".join(sys.argv[1:]), machine() + gpu
        say(f"{row.what}: {row.value} {row.unit} {row.why}")
    found: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
    if args.save:
        (FOLDER / f"policies-{args.size}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
