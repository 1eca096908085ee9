"""Real processes that meet over gloo, for tests of what several ranks do together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from learner.ranks import RankPlace, Ranks
from tests.ports import free_port

TIMEOUT_S = 120.0


def rendezvous() -> str:
    """A place on this machine where ranks may meet."""
    return f"tcp://127.0.0.1:{free_port()}"


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    shards: Sequence[int] = (),
    meet: bool = True,
    lost: Sequence[int] = (),
) -> list[Any]:
    """``function(ranks, *arguments)`` in ``size`` processes at once; what each returned, by rank.

    Args:
        function: Of a module, so that another process finds it.
        shards: Shard by rank; default: all read shard 0.
        meet: False: it gets its RankPlace instead, and makes its Ranks itself.
        lost: Ranks that end without a word; their answer is None.

    Raises:
        AssertionError: A rank raised, or did not end in time; its traceback is in the message.
    """
    at = rendezvous()
    places = [RankPlace(rank, tuple(shards) or (0,) * size, at, timeout_s=30.0) for rank in range(size)]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for place in places:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(there, place, meet, function, arguments), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    answers = []
    try:
        for rank, pipe in enumerate(pipes):
            if rank in lost:
                answers.append(None)
                continue
            assert pipe.poll(TIMEOUT_S), f"rank {rank} of {size} did not end within {TIMEOUT_S} s"
            error, value = pipe.recv()
            assert not error, f"rank {rank} of {size}:\n{error}"
            answers.append(value)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return answers


def _run(pipe: Any, place: RankPlace, meet: bool, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import torch

        torch.set_num_threads(1)
        ranks = Ranks(place) if meet else None
        value = function(ranks or place, *arguments)
        pipe.send_bytes(pickle.dumps(("", value)))  # tensors by value: send would share memory that ends with this process
        if ranks is not None:
            ranks.close()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
