"""Imports a dataset into a run; says on standard output how far it is. For tests that kill it."""

import sys
from pathlib import Path

from buffer.import_lerobot import Demonstrations
from fleet.runfolder import RunFolder
from infra.data_lerobot import import_dataset

if __name__ == "__main__":
    run, dataset = RunFolder.open(Path(sys.argv[1])), Demonstrations(Path(sys.argv[2]))
    import_dataset(run, dataset, progress=lambda steps: print(steps, flush=True))
