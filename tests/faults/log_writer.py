"""Ingests fragments of two robots until it is killed; prints each acknowledgement. A second argument: where to start over."""

from __future__ import annotations

import sys
from pathlib import Path

from buffer.ingest import Ingest
from buffer.log import Log
from fleet.robot import Source
from tests.buffer.fragments import make_spec, message


def main() -> None:
    log = Log(Path(sys.argv[1]), segment_bytes=400_000)
    ingest, spec = Ingest(log), make_spec(extra=20_000)
    seqs = {}
    for robot in ("r1", "r2"):
        seqs[robot] = ingest.admit(robot, "b" * 16, spec)
    print("ready", seqs["r1"], seqs["r2"], flush=True)
    while True:
        for robot, count in (("r1", 3), ("r2", 1)):
            for seq in range(max(seqs[robot] - 1, 1), seqs[robot] + count + 1):  # the first ones are resent
                ingest.offer(robot, *message(robot, "b" * 16, seq, (seq - 1) // 5, (seq - 1) % 5, [Source.POLICY], spec=spec))
            seqs[robot] += count
        for robot, _, seq in ingest.commit():
            print("ack", robot, seq, flush=True)


if __name__ == "__main__":
    main()
