"""Spools fragments until it is killed; says each number that was given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from fleet.robot import Source
from fleet.spool import Spool
from tests.buffer.fragments import fragment, make_spec

SPEC = make_spec(extra=20_000)


def work(folder: Path, say: Callable[[str], None]) -> None:
    spool = Spool(folder, max_bytes=1 << 40)
    say(f"boot {spool.boot_id}")
    make = functools.partial(fragment, "r1", spool.boot_id, spec=SPEC)
    episode = 0
    while True:
        for i in range(4):
            item = make(episode, i, [Source.POLICY], opened=i == 0, closed=i == 3)
            say(f"seq {spool.append(SPEC.hash, *item, episode)}")
        spool.flush()
        episode += 1
