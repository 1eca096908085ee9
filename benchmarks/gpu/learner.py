"""A transformer policy of 0.5 to 3 billion parameters with ZeRO-3 and bfloat16: step time, memory, MFU, snapshot time.

    python -m benchmarks.gpu.learner --size 0.5B --save     # on a machine with a GPU; also 1B and 3B
    python -m benchmarks.gpu.learner --size tiny --steps 3  # anywhere: does it run?

One rank on one GPU through the project's own engine, algorithm (behaviour cloning with its moving average), copies and time
budget; batches are made beforehand and lie on the device. MFU counts 6 operations for each parameter and token, and the
attention's; not those of activation checkpointing, which are done twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from algorithms.base import Batch
from algorithms.bc import Bc, BcConfig
from algorithms.policies.base import INSTRUCTION
from benchmarks.buffer_report import measured, missing, say
from benchmarks.gpu.policy import TransformerConfig, TransformerPolicy
from benchmarks.results import Row, machine
from fleet.errors import OutOfMemory
from fleet.robot import Source
from learner.budget import Budget
from learner.copies import Copies
from learner.engine import Engine
from learner.engines import make_engine
from learner.main import EngineConfig
from learner.ranks import RankPlace, Ranks

FOLDER = Path(__file__).parent
SIZES = {  # width, layers, heads
    "tiny": (64, 2, 4),
    "0.5B": (1280, 25, 20),
    "1B": (1792, 26, 28),
    "3B": (2560, 38, 40),
}
WARM_STEPS = 3
PARTS = ("forward", "backward", "optimizer", "after_step")


def make_batch(config: TransformerConfig, size: int, device: torch.device) -> Batch:
    """Noise in the form of windows."""
    generator = torch.Generator(device).manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def whole(value: int) -> torch.Tensor:
        return torch.full((size,), value, device=device)

    image = (size, config.image_size, config.image_size, 3)
    obs = {name: torch.randint(256, image, generator=generator, dtype=torch.uint8, device=device) for name in config.cameras}
    obs |= {"observation.state": floats(size, config.state_dim), INSTRUCTION: floats(size, config.instruction_dim)}
    no_BH = torch.zeros(size, config.horizon, dtype=torch.bool, device=device)
    whole_numbers = ("task_B", "version_B", "step_B", "episode_B", "frame_B", "steps_to_go_B", "outcome_B", "takeover_in_B")
    return Batch(
        obs=obs,
        obs_at={},
        inside_at={},
        actions_BHA=floats(size, config.horizon, config.action_dim),
        rewards_BH=no_BH.float(),
        terminated_BH=no_BH,
        truncated_BH=no_BH,
        mask_BH=~no_BH,
        source_BH=whole(int(Source.DEMO))[:, None].expand(-1, config.horizon),
        source_B=whole(int(Source.DEMO)),
        **{name: whole(0) for name in whole_numbers},
        terminated_B=no_BH[:, 0],
        return_B=whole(0).float(),
        weight_B=whole(1).float(),
        replay={},
        index_B=torch.arange(size, device=device),
        shard_weight=1.0,
    )


def flops_of_step(config: TransformerConfig, num_parameters: int, batch_size: int) -> float:
    """Of forward and backward."""
    attention = 12 * config.num_layers * config.width * config.num_tokens
    return (6.0 * num_parameters + attention) * config.num_tokens * batch_size


def measure(name: str, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Rows of one size."""
    width, layers, heads = SIZES[name]
    config = TransformerConfig(width, layers, heads, image_size=28 if name == "tiny" else 224)
    engine_config = EngineConfig(
        "deepspeed",
        zero_stage=3,
        dtype="bfloat16",
        micro_batch=args.micro_batch,
        max_grad_norm=1.0,
        activation_checkpointing=args.activation_checkpointing,
    )
    torch.manual_seed(0)
    with device:
        policy = TransformerPolicy(config)
    num_parameters = sum(p.numel() for p in policy.parameters())
    algorithm = Bc(policy, BcConfig(batch_size=args.batch, ema_decay=0.999))
    say(f"{name}: {num_parameters / 1e9:.3f} B parameters, batch {args.batch}, {config.num_tokens} tokens")
    engine = make_engine(engine_config, algorithm, device, Ranks(RankPlace(), device.type))
    title = f"{name} parameters, ZeRO-3, bfloat16, batch {args.batch}"
    try:
        times_s, seconds = _steps(engine, algorithm, make_batch(config, args.batch, device), args.steps, device)
        rows = [measured(f"step, {title}", [1000 * t for t in times_s], "ms", 1)]
        rows += [measured(f"of it {part}", [1000 * seconds[part] / args.steps], "ms", 1) for part in PARTS]
        rows.append(_mfu(f"MFU, {title}", flops_of_step(config, num_parameters, args.batch), times_s, args.peak_tflops, device))
        rows.append(_memory(f"peak memory of the device, {title}", device))
        return rows + _snapshot(engine, algorithm, title, device)
    finally:
        engine.close()  # type: ignore[attr-defined]  # of deepspeed's


def _steps(
    engine: Engine, algorithm: Bc, batch: Batch, num_steps: int, device: torch.device
) -> tuple[list[float], dict[str, float]]:
    """Wall seconds of each step, and seconds by part of all of them."""
    budget, times_s, before = Budget(device), [], {}
    for step in range(WARM_STEPS + num_steps):
        if step == WARM_STEPS:
            _wait(device)
            budget.step(step)
            before = dict(budget.seconds)
        start = time.perf_counter()
        numbers = engine.update("policy", algorithm.loss, algorithm.prepare(batch), budget.timed)
        with budget.timed("after_step"), engine.gathered():
            algorithm.after_step(step, numbers)
        _wait(device)
        budget.step(step + 1)
        if step >= WARM_STEPS:
            times_s.append(time.perf_counter() - start)
    budget.close()
    return times_s, {part: total - before[part] for part, total in budget.seconds.items()}


def _snapshot(engine: Engine, algorithm: Bc, title: str, device: torch.device) -> list[Row]:
    """How long updates stand still for a release, and for a checkpoint."""
    weights, states = Copies(device), Copies(device)
    publish_s, checkpoint_s = [], []
    for _ in range(4):  # the first one takes the memory
        start = time.perf_counter()
        with engine.gathered():
            copy = weights.take(algorithm.acting().state_dict())
        publish_s.append(time.perf_counter() - start)
        assert copy.state
        start = time.perf_counter()
        with engine.gathered():
            copy = states.take({"parts": engine.weights(), "algorithm": algorithm.state_dict(), "optimizers": engine.state()})
        checkpoint_s.append(time.perf_counter() - start)
        assert copy.state
        del copy
    return [
        measured(f"copy for a release, the loop stands still, {title}", [1000 * s for s in publish_s[1:]], "ms", 1),
        measured(f"copy for a checkpoint, the loop stands still, {title}", [1000 * s for s in checkpoint_s[1:]], "ms", 1),
    ]


def _mfu(what: str, flops: float, times_s: list[float], peak_tflops: float, device: torch.device) -> Row:
    if device.type != "cuda":
        return missing(what, "%", "no GPU here")
    return measured(what, [100 * flops / t / (peak_tflops * 1e12) for t in times_s], "%", 1)


def _memory(what: str, device: torch.device) -> Row:
    if device.type != "cuda":
        return missing(what, "GiB", "no GPU here")
    row = measured(what, [torch.cuda.max_memory_allocated(device) / 2**30], "GiB", 1)
    row.limit = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.5B", help="each in a process of its own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in dense bfloat16; H100 and H200: 989")
    parser.add_argument("--json", action="store_true", help="print the rows")
    parser.add_argument("--save", action="store_true", help="write them beside this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        rows = measure(args.size, args, device)
    except OutOfMemory as error:
        rows = [missing(f"step, {args.size}, batch {args.batch}", "ms", str(error))]
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    for row in rows:
        row.command, row.machine = "python -m benchmarks.gpu.learner " + " ".join(sys.argv[1:]), machine() + gpu
        say(f"{row.what}: {row.value} {row.unit} {row.why}")
    found: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
    if args.save:
        (FOLDER / f"learner-{args.size}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
