import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.log import Log
from buffer.manifest import Manifest, Retired, live_segments, load_manifest, store_manifest
from buffer.repair import repair
from buffer.retention import Limits, prune
from buffer.verify import DAMAGED, verify
from fleet.errors import RunFolderError
from fleet.files import Files
from tests.buffer.runs import POLICY, Writer, fill
from tests.buffer.test_verify import buffer, fragments, kinds, spoil  # noqa: F401

ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def spoil_all(folder):
    names = live_segments(folder)
    (folder / "manifest.json").write_text("{}")
    names[0].state_path.unlink()
    spoil(names[1].index_path, 500)
    names[2].index_path.unlink()
    shutil.copy(names[3].index_path, names[4].index_path)
    return names


def test_everything_but_the_segments_is_made_anew_from_them(buffer):  # noqa: F811
    before, steps = contents(buffer), verify(buffer).steps
    names = spoil_all(buffer)
    segments = {name.path: name.path.read_bytes() for name in names}
    done = repair(buffer, dry_run=False)
    assert len(done) == 5
    assert verify(buffer).faults == [] and verify(buffer).steps == steps
    assert {path: path.read_bytes() for path in segments} == segments
    assert contents(buffer) == before
    assert repair(buffer, dry_run=False) == []


def test_a_dry_run_says_the_same_and_changes_nothing(buffer):  # noqa: F811
    spoil_all(buffer)
    before = contents(buffer)
    found = repair(buffer)
    assert contents(buffer) == before
    assert repair(buffer, dry_run=False) == found


def test_what_a_killed_writer_left_is_sealed_at_its_last_valid_record(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.buffer.runs import *\n"
        "writer = Writer(Path(sys.argv[1]))\n"
        "writer.episode('arm-1', 'b', 0, [POLICY] * 12, closed=False)\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout.readline() == "written\n"
    with pytest.raises(RunFolderError, match="in use"):
        repair(tmp_path)
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    assert verify(tmp_path).open_segments == 1
    assert any("last valid record" in found.what for found in repair(tmp_path))
    assert verify(tmp_path).open_segments == 1
    repair(tmp_path, dry_run=False)
    report = verify(tmp_path)
    assert (report.faults, report.open_segments, report.steps) == ([], 0, 12)


@pytest.mark.parametrize("dry_run", [True, False])
def test_it_is_refused_while_a_gateway_holds_the_log(tmp_path, dry_run):
    fill(tmp_path)
    held = Log(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunFolderError):
        repair(tmp_path, dry_run=dry_run)
    assert contents(tmp_path) == before
    held.close()


def test_damage_in_a_segment_stays_and_its_sidecar_stops_naming_what_is_lost(buffer):  # noqa: F811
    name = live_segments(buffer)[1]
    spoil(name.path, fragments(name)[0].payload_at + 10)
    assert len(repair(buffer, dry_run=False)) == 1
    assert kinds(buffer) == [DAMAGED]


def test_after_retention_there_is_nothing_to_repair(buffer):  # noqa: F811
    assert prune(buffer, Limits(max_bytes=1), dry_run=False)
    repair(buffer, dry_run=False)
    (buffer / "manifest.json").unlink()
    repair(buffer, dry_run=False)
    assert verify(buffer).faults == []


def test_a_log_goes_on_after_a_repair(buffer):  # noqa: F811
    spoil_all(buffer)
    repair(buffer, dry_run=False)
    writer = Writer(buffer)
    writer.episode("arm-0", "boot0", 9, [POLICY] * 4)
    writer.close()
    assert verify(buffer).faults == []


def test_a_manifest_that_says_what_is_not_so_is_corrected(buffer):  # noqa: F811
    right = load_manifest(buffer)
    wrong = dataclasses.replace(right.segments[0], num_steps=1)
    gone = dataclasses.replace(right.segments[1], number=99, file="00000099-0123456789abcdef.seg")
    retired = Retired(1, "00000001-0123456789abcdef.seg", 10, 1, "age")
    store_manifest(Files(), buffer, Manifest((wrong, *right.segments[1:], gone), (retired,)))
    assert len(kinds(buffer)) == 2
    assert [found.file for found in repair(buffer, dry_run=False)] == ["manifest.json"]
    assert load_manifest(buffer) == Manifest(right.segments, (retired,))
