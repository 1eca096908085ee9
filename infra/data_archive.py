"""``fleet data archive | restore``: a run's data at another place, and back."""

from __future__ import annotations

from pathlib import Path

from buffer.archive import archive, restore
from buffer.archive_store import Store
from fleet.runfolder import RunFolder
from infra.data_care import progress_bar
from infra.tables import console


def archive_run(run_path: Path, uri: str, everything: bool, check: bool) -> int:
    """Returns the exit code: 0, or 1 where something in the archive was altered and cannot be copied anew."""
    run, out = RunFolder.open(run_path), console()
    with progress_bar("archiving") as progress:
        done = archive(run, Store.open(uri), everything=everything, check=check, progress=progress)
    out.print(f"copied {done.files:,} files, {done.bytes / 1e9:.3f} GB; {done.kept:,} were there", markup=False)
    if done.open_segments:
        out.print(f"{done.open_segments} segments are still written to: archive again when the run has ended")
    if done.damaged:
        out.print(f"{done.damaged} places in the copied segments are damaged in the run itself: fleet data verify names them")
    for path in done.altered:
        out.print(f"altered in the archive, and no longer in the run: {path}", markup=False, style="red")
    return 1 if done.altered else 0


def restore_run(uri: str, run_path: Path) -> None:
    out = console()
    with progress_bar("restoring") as progress:
        done = restore(Store.open(uri), run_path, progress=progress)
    run = RunFolder.open(run_path)
    out.print(f"restored run {run.run_id}: {done.files + done.kept:,} files, {done.bytes / 1e9:.3f} GB copied", markup=False)
    if not (run.keys / "server.key").exists():
        out.print("the archive has no keys: enroll the robots anew with fleet enroll")
    if not any(run.checkpoints.iterdir()):
        out.print("the archive has no checkpoint: the learner begins anew on this data")
    out.print(f"go on with: fleet up {run_path} --resume", markup=False)
