"""Out of memory, as an error that says which setting helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fleet.errors import OutOfMemory
from learner.main import EngineConfig
from learner.ranks import Ranks

# Of plain RuntimeErrors: torch's allocator on the CPU, CUDA's runtime, cuBLAS, NCCL.
SAYINGS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory", "bad_alloc")


@contextmanager
def memory_errors(config: EngineConfig, ranks: Ranks, num_rows: int = 0) -> Iterator[None]:
    """Turns whatever torch raises when memory is short into OutOfMemory.

    Args:
        num_rows: Of this rank's batch; 0 where no batch is at work.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_short(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise OutOfMemory(
            f"rank {ranks.rank} is out of memory: {said}"[:400],
            rule="weights, optimizer state and the activations of one micro-batch fit in a rank's memory",
            remedy=", or ".join(free_knobs(config, ranks.size, num_rows)),
        ) from error


def is_short(error: BaseException) -> bool:
    """Whether torch or Python says with this error that memory is short."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(saying in str(error) for saying in SAYINGS)


def free_knobs(config: EngineConfig, num_ranks: int, num_rows: int) -> list[str]:
    """Settings that would need less memory and are not used yet, those that cost least first.

    Args:
        num_rows: Of a rank's batch; 0: not known, no micro-batch is proposed.
    """
    zero, micro = config.name == "deepspeed", min(config.micro_batch or num_rows, num_rows)
    knobs = {
        f"engine.micro_batch={micro // 2} (now {micro})": micro > 1,
        "engine.activation_checkpointing=true": not config.activation_checkpointing,
        "engine.dtype=bfloat16": config.dtype == "float32",
        f"engine.zero_stage={config.zero_stage + 1}": zero and num_ranks > 1 and config.zero_stage < 3,
        "engine.name=deepspeed engine.zero_stage=3": not zero and num_ranks > 1,
        "engine.offload_optimizer=true": zero and config.zero_stage >= 1 and not config.offload_optimizer,
        "engine.name=deepspeed engine.offload_optimizer=true": not zero,
        "more ranks (cluster.ranks)": zero and config.zero_stage >= 1,
    }
    return [knob for knob, free in knobs.items() if free] or ["a smaller policy", "a device with more memory"]
