"""Is a log whole? Every checksum, every Arrow value, every number: each (robot, boot, seq) once and without a gap.

What retention gave up leaves gaps that are no damage: between two fragments that are there, or before the first one, a
segment is missing or was kept in part. All else that is missing is named. Read-only; a gateway may be writing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buffer import sidecar
from buffer.ingest import Progress, advance
from buffer.labels import labels_folder
from buffer.log import load_spec
from buffer.manifest import FILE_NAME as MANIFEST
from buffer.manifest import Entry, Manifest, facts_of, live_segments, load_manifest
from buffer.parts import PartBuilder
from buffer.reader import LogRecord, SegmentMap, log_record, map_segment
from buffer.segment import KIND_FRAGMENT, BootKey, SegmentName, SegmentState, read_header, read_state_file
from fleet.errors import FragmentRefused, SpecError, StorageError
from fleet.record import Damage, Record, scan
from fleet.schema import Fragment, check_fragment, decode_fragment
from fleet.spec import RobotSpec

# Kinds of faults. The first ones are in the data; "state", "manifest" and "sidecar" can be made anew from it.
DAMAGED, HEADER, REFUSED, SPEC = "damaged", "header", "refused", "spec"
DOUBLED, MISSING, ORDER = "doubled", "missing", "order"
STATE, MANIFEST_FAULT, SIDECAR = "state", "manifest", "sidecar"
_MAKING_S = 0.5
REPAIRABLE = (STATE, MANIFEST_FAULT, SIDECAR)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that is not as it must be.

    Attributes:
        kind: One of the words above.
        segment, offset, end: Where: file and bytes; -1 where it is in no one place.
        robot_id, boot_id, seq, last_seq: Of which fragments, as far as that is known; -1 for none.
        what: One sentence.
    """

    kind: str
    what: str
    segment: str = ""
    offset: int = -1
    end: int = -1
    robot_id: str = ""
    boot_id: str = ""
    seq: int = -1
    last_seq: int = -1


@dataclasses.dataclass
class Report:
    """What was checked, and what was found.

    Attributes:
        given_up: Fragments that retention took away.
        without_sidecar: Sealed segments that have none yet.
        open_segments: Not sealed: the one that is being written, or what a killed gateway left.
    """

    segments: int = 0
    bytes: int = 0
    fragments: int = 0
    steps: int = 0
    boots: int = 0
    labels: int = 0
    given_up: int = 0
    without_sidecar: int = 0
    open_segments: int = 0
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verify(buffer: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Reads all of a run's log and of its labels.

    Args:
        buffer: The run's buffer folder.
        progress: Called with (bytes done, bytes in all).

    Raises:
        OSError, StorageError: The folder cannot be read.
    """
    report = Report()
    folders = [folder for folder in (buffer, labels_folder(buffer)) if folder.is_dir()]
    total = sum(_size(folder) for folder in folders)
    for folder in folders:
        _LogCheck(folder, report, lambda done: progress(done, total)).run()
    return report


def _size(folder: Path) -> int:
    states = (read_state_file(name.state_path) for name in live_segments(folder))
    return sum(state.length for state in states if state is not None)


@dataclasses.dataclass(frozen=True)
class _Gap:
    """Fragments that are not there, and the numbers of the segments in which they may have been."""

    boot: BootKey
    first_seq: int
    last_seq: int
    after: int
    before: int


class _LogCheck:
    """One pass over one log."""

    def __init__(self, folder: Path, report: Report, progress: Callable[[int], None]) -> None:
        self._folder, self._report, self._progress = folder, report, progress
        self._last: dict[BootKey, tuple[int, int]] = {}  # seq, number of its segment
        self._states: dict[BootKey, Progress] = {}
        self._gaps: list[_Gap] = []
        self._specs: dict[str, RobotSpec | None] = {}
        self._whole: set[int] = set()  # numbers of segments that retention did not touch
        self._damaged: dict[int, str] = {}  # segments with something that cannot be read, by number
        self._marks: dict[BootKey, int] = {}
        self._header = self._newest = 0  # numbers: of the last segment with an intact header, of the last one

    def run(self) -> None:
        manifest = self._manifest()
        names = live_segments(self._folder, manifest)
        self._check_files(manifest, {name.path.name for name in names})
        for name in names:
            try:
                self._segment(name, manifest, is_last=name == names[-1])
            except (FileNotFoundError, StorageError):
                if name in live_segments(self._folder):
                    raise  # else retention took it away since the listing
        for boot, seq in self._marks.items():
            self._missing_before(boot, seq + 1, self._newest)
        self._report.boots += len(self._last)
        self._judge_gaps()

    def _manifest(self) -> Manifest:
        try:
            manifest = load_manifest(self._folder)
        except StorageError as error:
            self._fault(MANIFEST_FAULT, str(error), segment=MANIFEST)
            return Manifest()
        if manifest is None:
            if (self._folder / MANIFEST).exists():
                self._fault(MANIFEST_FAULT, "its checksum does not hold", segment=MANIFEST)
            return Manifest()
        return manifest

    def _check_files(self, manifest: Manifest, there: set[str]) -> None:
        """Segments that the manifest has and the folder has not, and that retention did not take away just now."""
        gone = [entry for entry in manifest.segments if entry.file not in there]
        still_named = {entry.file for entry in self._manifest_now().segments} if gone else set()
        for entry in gone:
            if entry.file in still_named:
                self._whole.add(entry.number)
                self._damaged[entry.number] = entry.file
                self._fault(DAMAGED, f"the file with {entry.num_fragments} fragments is gone", entry.file, 0, entry.length)

    def _manifest_now(self) -> Manifest:
        return load_manifest(self._folder) or Manifest()

    def _segment(self, name: SegmentName, manifest: Manifest, *, is_last: bool) -> None:
        state, segment = read_state_file(name.state_path), map_segment(name)
        entry = next((entry for entry in manifest.segments if entry.file == name.path.name), None)
        if state is None and is_last:
            time.sleep(_MAKING_S)  # a gateway may be just making it
            state = read_state_file(name.state_path)
        if state is None:
            self._fault(STATE, "its state is lost: readers do not see what it holds", segment=name.path.name)
            if entry is None:
                return
            state = SegmentState(entry.length, True)
        self._report.segments += 1
        self._report.open_segments += not state.sealed
        if segment is None or len(segment.data) < state.length:
            there = 0 if segment is None else len(segment.data)
            self._fault(DAMAGED, f"{state.length - there} bytes at its end are gone", name.path.name, there, state.length)
            self._damaged[name.number] = name.path.name
        header = read_header(name)
        if header is None:
            self._fault(HEADER, "its header, with the high-water marks before it, is damaged", name.path.name, 0)
            self._damaged[name.number] = name.path.name
            self._whole.add(name.number)
        else:
            if header.generation == 0:
                self._whole.add(name.number)
            for boot, mark in header.marks.items():
                self._missing_before(boot, mark.seq + 1, name.number - 1)
                self._marks[boot] = mark.seq
            self._header = name.number
        self._newest = name.number
        if segment is not None:
            self._records(name, state, segment)
        if entry is not None and state.sealed:
            self._compare_entry(name, state, entry)

    def _records(self, name: SegmentName, state: SegmentState, segment: SegmentMap) -> None:
        builder = PartBuilder(segment.address, len(segment.bytes))
        num_damaged, before = 0, self._report.bytes
        length = min(state.length, len(segment.data))
        for item in scan(segment.data, 0, length, name.salt):
            if isinstance(item, Damage):
                num_damaged += 1
                self._damage(name, item)
            elif item.kind == KIND_FRAGMENT:
                record = log_record(item, segment)
                builder.add(record)
                self._fragment(name, item, record)
            self._report.bytes = before + item.end
            self._progress(self._report.bytes)
        part = builder.build()
        part.num_damaged = num_damaged
        self._report.labels += part.labels.num_rows
        if not state.sealed:
            return
        try:
            stored = name.index_path.read_bytes()
        except FileNotFoundError:
            self._report.without_sidecar += 1
            return
        if stored != sidecar.to_bytes(part, name, state.length):
            self._fault(SIDECAR, "it is not what the segment says", segment=name.index_path.name)

    def _damage(self, name: SegmentName, damage: Damage) -> None:
        self._damaged[name.number] = name.path.name
        if damage.at == 0:
            return  # the header, which was named already
        key = damage.key or {}
        boot, seq = (key.get("robot", ""), key.get("boot", "")), key.get("seq", -1)
        if damage.key is not None:
            # Counted as there, so that it is named once: as damaged, not as missing too.
            self._missing_before(boot, seq, name.number)
            self._last[boot] = (seq, name.number)
            self._states[boot] = Progress.from_note(tuple(key["note"]))
            what = "a fragment whose payload's checksum does not hold"
        else:
            what = "no valid record"
        self._fault(DAMAGED, what, name.path.name, damage.at, damage.end, boot=boot, seq=seq)

    def _fragment(self, name: SegmentName, item: Record, record: LogRecord) -> None:
        boot, seq = (record.robot_id, record.boot_id), record.seq
        place: dict[str, Any] = {"segment": name.path.name, "offset": item.at, "end": item.end, "boot": boot, "seq": seq}
        self._report.fragments += 1
        last = self._last.get(boot, (0, 0))[0]
        if seq <= last:
            self._fault(DOUBLED, f"seq {seq} after seq {last}", **place)
            return
        self._missing_before(boot, seq, name.number)
        self._last[boot] = (seq, name.number)
        before = self._states.get(boot, Progress() if seq == 1 else None)
        after = self._states[boot] = Progress.from_note(tuple(item.key["note"]))
        try:
            fragment = decode_fragment(record.tables, record.payload)
            self._report.steps += fragment.num_steps
            self._check_spec(record, fragment)
        except (FragmentRefused, SpecError) as error:
            self._fault(SPEC if isinstance(error, SpecError) else REFUSED, error.what, **place)
            return
        if before is not None and item.key["note"]:
            self._check_order(before, after, fragment, place)

    def _check_spec(self, record: LogRecord, fragment: Fragment) -> None:
        """Against the spec that it was stored under; labels that came later have none."""
        if not record.spec_hash:
            return
        if record.spec_hash not in self._specs:
            self._specs[record.spec_hash] = None
            self._specs[record.spec_hash] = load_spec(self._folder, record.spec_hash)
        spec = self._specs[record.spec_hash]
        if spec is None:
            raise SpecError(f"its spec {record.spec_hash} is not there or damaged")
        check_fragment(fragment, spec, record.robot_id, record.boot_id)

    def _check_order(self, before: Progress, after: Progress, fragment: Fragment, place: dict[str, Any]) -> None:
        try:
            reached = advance(before, fragment)[0]
        except FragmentRefused as error:
            self._fault(ORDER, error.what, **place)
            return
        if reached != after:
            self._fault(ORDER, f"it leads to {reached}, noted was {after}", **place)

    def _compare_entry(self, name: SegmentName, state: SegmentState, entry: Entry) -> None:
        facts = facts_of(name, state.length)
        if not entry.agrees_with(facts):
            self._fault(MANIFEST_FAULT, f"its entry of {name.path.name} is not what the segment says", segment=MANIFEST)

    def _missing_before(self, boot: BootKey, seq: int, segment: int) -> None:
        """Notes a gap where something lies between the last fragment of a boot and this one.

        Args:
            segment: Number of the last segment in which it may have been.
        """
        last, after = self._last.get(boot, (0, self._header))  # one that no header knew began after that
        if seq > last + 1:
            self._gaps.append(_Gap(boot, last + 1, seq - 1, after, max(after, segment)))
            self._last[boot] = (seq - 1, max(after, segment))
            self._states.pop(boot, None)

    def _judge_gaps(self) -> None:
        for gap in self._gaps:
            between = range(max(gap.after, 1), gap.before + 1)
            damaged = [self._damaged[number] for number in between if number in self._damaged]
            count = gap.last_seq - gap.first_seq + 1
            if any(number not in self._whole for number in between):
                self._report.given_up += count
                continue
            why = f"; there is damage in {', '.join(damaged)}" if damaged else ""
            what = f"{count} fragments that were acknowledged are gone{why}"
            place = damaged[0] if damaged else ""
            self._fault(MISSING, what, place, boot=gap.boot, seq=gap.first_seq, last_seq=gap.last_seq)

    def _fault(
        self,
        kind: str,
        what: str,
        segment: str = "",
        offset: int = -1,
        end: int = -1,
        boot: BootKey = ("", ""),
        seq: int = -1,
        last_seq: int = -1,
    ) -> None:
        where = f"{self._folder.name}/{segment}" if segment else self._folder.name
        self._report.faults.append(Fault(kind, what, where, offset, end, *boot, seq, max(seq, last_seq)))
