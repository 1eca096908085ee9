"""Ingests fragments of two robots until it is killed; says each acknowledgement."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from buffer.ingest import Ingest
from buffer.log import Log
from fleet.robot import Source
from tests.buffer.fragments import make_spec, message

BOOT, SPEC = "b" * 16, make_spec(extra=20_000)


@functools.cache
def fragment_of(robot: str, seq: int):
    """The fragment of a number is always the same."""
    return message(robot, BOOT, seq, (seq - 1) // 5, (seq - 1) % 5, [Source.POLICY], spec=SPEC)


def work(folder: Path, say: Callable[[str], None], files=None) -> None:
    ingest = Ingest(Log(folder, files=files, segment_bytes=400_000))
    seqs = {robot: ingest.admit(robot, BOOT, SPEC) for robot in ("r1", "r2")}
    say(f"ready {seqs['r1']} {seqs['r2']}")
    while True:
        for robot, count in (("r1", 3), ("r2", 1)):
            for seq in range(max(seqs[robot] - 1, 1), seqs[robot] + count + 1):  # the first ones are resent
                ingest.offer(robot, *fragment_of(robot, seq))
            seqs[robot] += count
        for robot, _, seq in ingest.commit():
            say(f"ack {robot} {seq}")


if __name__ == "__main__":
    work(Path(sys.argv[1]), functools.partial(print, flush=True))
