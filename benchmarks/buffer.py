"""The buffer: durable ingest, sampling, memory, restart; beside it Reverb, TorchRL and what the machine can do at most.

    tools/setup_peers.sh                            # once: the peers' environments
    python -m benchmarks.buffer                     # all, about 13 minutes on 2 quiet cores
    python -m benchmarks.buffer --quick             # all in 3 minutes, with rough numbers that are not saved
    python -m benchmarks.buffer --only ingest memory

Every step is 98,488 bytes (two raw 128 x 128 cameras) unless a row says JPEG. Every system's server and clients are
processes of their own. CPU is user and system time of server and clients from /proc. Ours acknowledges a step when
it is fsynced; Reverb, when it is in the server's memory. Needs 25 GB of disk at --folder for the time of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import buffer_ingest, buffer_restart, buffer_sample
from benchmarks.buffer_report import Peers, say
from benchmarks.results import Row, save

PARTS = ("ingest", "sample", "memory", "restart")


def run_part(part: str, folder: Path, peers: Peers, *, quick: bool) -> list[Row]:
    """Rows of one of ``PARTS``."""
    if part == "ingest":
        return buffer_ingest.run(folder, peers, repeats=1 if quick else 5, steps=2_000 if quick else 10_000)
    if part == "sample":
        steps, batches = (2_000, 40) if quick else (buffer_sample.STEPS, 200)
        return buffer_sample.run(folder, peers, repeats=1 if quick else 5, steps=steps, batches=batches)
    if part == "memory":
        sizes = (1_000, 5_000, 10_000) if quick else (10_000, 50_000, 100_000)
        return buffer_sample.run_memory(folder / "memory", sizes, batches=20 if quick else 300)
    return buffer_restart.run(folder / "restart", steps=5_000 if quick else 100_000, repeats=2 if quick else 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small counts, once; nothing is saved")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="where data lies during the run; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="print the rows")
    args = parser.parse_args()
    peers, command = Peers.find(), "python -m benchmarks.buffer " + " ".join(sys.argv[1:])
    for why in [peers.why_no_reverb] * (peers.reverb is None) + [peers.why_no_torchrl] * (peers.torchrl is None):
        say(why)
    every: list[Row] = []
    for part in args.only:
        folder = Path(tempfile.mkdtemp(prefix=f"fleet-{part}-", dir=args.folder))
        try:
            rows = run_part(part, folder, peers, quick=args.quick)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for row in rows:
            say(f"{row.what}: {row.value} {row.unit} {row.target and f'(target {row.target}: {row.met})'}")
        if not args.quick:
            say(f"saved: {save(f'buffer_{part}', rows, command.strip())}")
        every += rows
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in every], indent=1) + "\n")


if __name__ == "__main__":
    main()
