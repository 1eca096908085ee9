"""Which engine updates the parameters."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from algorithms.base import Algorithm
from fleet.errors import ConfigError
from fleet.lookup import resolve
from learner.engine import Engine
from learner.main import EngineConfig
from learner.memory import memory_errors
from learner.ranks import Ranks

ENGINES = {  # looked up when used: deepspeed takes seconds to load
    "torch": "learner.engine_torch:TorchEngine",
    "ddp": "learner.engine_ddp:DdpEngine",
    "deepspeed": "learner.engine_deepspeed:DeepSpeedEngine",
}
COMPILERS = ("g++", "clang++", "c++")


def make_engine(config: EngineConfig, algorithm: Algorithm, device: torch.device, ranks: Ranks) -> Engine:
    """The engine that the configuration names. All ranks call it together. With one rank "ddp" is plain torch, so that a run
    may go on when all ranks but one are lost.

    Raises:
        ConfigError: It does not go together with the ranks, the device, the algorithm or what is installed.
        OutOfMemory: The modules do not fit on the device.
    """
    check_engine(config, algorithm, device, ranks.size)
    name = config.name if config.name == "deepspeed" else "torch" if ranks.size == 1 else "ddp"
    make = resolve(ENGINES, name, kind="engine.name", error=ConfigError)
    with memory_errors(config, ranks):
        engine: Engine = make(algorithm, config, device, ranks)
    return engine


def check_engine(config: EngineConfig, algorithm: Algorithm, device: torch.device, num_ranks: int) -> None:
    """Raises ConfigError where a configuration cannot be used here; needs no other rank."""
    batch_size, cuda = algorithm.needs.batch_size, device.type == "cuda"
    rules = [
        (config.name == "torch" and num_ranks > 1, "name", f"torch has one rank, here are {num_ranks}", "engine.name=ddp"),
        (
            config.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None,
            "name",
            "the package deepspeed is installed",
            "install the extra `learner`, or engine.name=auto",
        ),
        (
            config.dtype == "bfloat16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False),
            "dtype",
            "the GPU computes in bfloat16 (Ampere or newer)",
            "engine.dtype=float32",
        ),
        (
            config.compile and not (os.environ.get("CXX") or any(shutil.which(name) for name in COMPILERS)),
            "compile",
            f"torch.compile needs a C++ compiler: {', '.join(COMPILERS)}",
            "install one, or engine.compile=false",
        ),
    ]
    for broken, key, rule, remedy in rules:
        if broken:
            raise ConfigError(f"engine.{key} = {getattr(config, key)!r}", rule=rule, remedy=remedy)
    if batch_size < num_ranks:
        raise ConfigError(
            f"a batch of {batch_size} for {num_ranks} ranks", rule="each rank has a row of each batch", remedy="cluster.ranks"
        )
