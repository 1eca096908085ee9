"""Spools fragments until it is killed; prints each number that was given."""

from __future__ import annotations

import sys
from pathlib import Path

from fleet.robot import Source
from fleet.spool import Spool
from tests.buffer.fragments import fragment, make_spec


def main() -> None:
    spool, spec = Spool(Path(sys.argv[1]), max_bytes=1 << 40), make_spec(extra=int(sys.argv[2]))
    print("boot", spool.boot_id, flush=True)
    episode = 0
    while True:
        for i in range(4):
            item = fragment("r1", spool.boot_id, episode, i, [Source.POLICY], spec=spec, opened=i == 0, closed=i == 3)
            print("seq", spool.append(spec.hash, *item, episode), flush=True)
        episode += 1


if __name__ == "__main__":
    main()
