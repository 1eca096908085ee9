"""A LeRobotDataset v3 as demonstrations: its episodes cut into fragments whose numbers never change.

Fragment ``seq`` always holds the same frames of the same episode, and the boot's id is made from the dataset. So the
dataset itself is the queue, and the gateway's high-water mark says where an import that was killed goes on: nothing is
stored twice, and nothing has to be written down here.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from buffer.format_lerobot import DONE, REWARD, SUCCESS, TRUNCATED, Info, load_lerobot, read_info
from fleet.errors import DatasetError
from fleet.images import encode
from fleet.robot import Source
from fleet.schema import build_table, check_fragment, decode_fragment, encode_fragment
from fleet.spec import ACTION, Feature
from fleet.spool import SpooledFragment

FRAGMENT_BYTES = 4 * 1024 * 1024  # of values before encoding
MAX_FRAMES = 100  # of a fragment
JUDGE = "dataset"
SUCCESS_RULES = ("all", "column", "unknown")


@dataclasses.dataclass(frozen=True)
class EpisodePlace:
    """Where an episode lies in the dataset: frames ``first`` to ``end``; its fragments begin with number ``first_seq``."""

    index: int
    first: int
    end: int
    instruction: str
    first_seq: int

    @property
    def length(self) -> int:
        return self.end - self.first


class Demonstrations:
    """A dataset, opened for import.

    Args:
        root: The dataset's folder.
        cameras: New name by the dataset's name, without ``observation.images.``.
        leave_out: Columns not to take over.
        codec: How images are stored, "jpeg" or "raw".
        success: Outcome of the episodes: "all" succeeded, "column" reads next.success, "unknown".

    Attributes:
        spec: Of the robot that the dataset was recorded with.
        boot_id: Made from features, settings and the first episode: the same at each start, and while the dataset grows.
        episodes: In the dataset's order.
        num_fragments, num_steps: Of all episodes.

    Raises:
        DatasetError: The folder is no dataset that can be taken over.
        SpecError: A column has a name or shape out of the rules.
    """

    def __init__(
        self,
        root: Path,
        *,
        cameras: Mapping[str, str] | None = None,
        leave_out: Collection[str] = (),
        codec: str = "jpeg",
        success: str = "all",
    ) -> None:
        self.info = read_info(root, cameras=cameras or {}, leave_out=leave_out, codec=codec)
        self.spec = self.info.spec
        if success not in SUCCESS_RULES:
            raise DatasetError(f"success = {success!r}", rule=f"one of {SUCCESS_RULES}")
        if success == "column" and SUCCESS not in self.info.has:
            raise DatasetError(f"the dataset has no column {SUCCESS!r}", rule="success is read from it", remedy="--success all")
        self._success = success
        self._frames = frames_per_fragment(list(self.spec.features.values()))
        self._dataset = _open(self.info, self._frames)
        columns = [column for column in self.info.columns.values() if column not in self.info.videos]
        self._rows = self._dataset.hf_dataset.select_columns([*columns, *sorted(self.info.has & {REWARD, DONE, TRUNCATED})])
        self.episodes = self._places()
        last = self.episodes[-1]
        self.num_fragments = last.first_seq - 1 + -(-last.length // self._frames)
        self.num_steps = last.end - self.episodes[0].first
        self.boot_id = self._make_boot_id()

    @property
    def instructions(self) -> list[str]:
        """All different ones."""
        return sorted({episode.instruction for episode in self.episodes})

    def steps_before(self, seq: int) -> int:
        """Steps of the fragments before ``seq``."""
        if seq > self.num_fragments:
            return self.num_steps
        place = self._place(seq)
        return place.first - self.episodes[0].first + (seq - place.first_seq) * self._frames

    def fragment(self, seq: int, robot_id: str, tasks: Mapping[str, str]) -> SpooledFragment:
        """The fragment with this number, 1 to ``num_fragments``.

        Args:
            tasks: The run's task by the dataset's instruction.

        Raises:
            DatasetError: It cannot be read.
            FragmentRefused: It breaks a rule that the gateway has too, for example an action that is NaN.
        """
        place = self._place(seq)
        first = place.first + (seq - place.first_seq) * self._frames
        end = min(first + self._frames, place.end)
        task = tasks[place.instruction]
        rows = self._step_rows(place, first, end, robot_id, task)
        tables = {"steps": build_table("steps", self.spec, rows)}
        episodes = [self._episode_row(place, task, "opened")] if first == place.first else []
        episodes += [self._episode_row(place, task, "closed")] if end == place.end else []
        if episodes:
            tables["episodes"] = build_table("episodes", self.spec, episodes)
        directory, payload = encode_fragment(tables)
        check_fragment(decode_fragment(directory, payload), self.spec, robot_id, self.boot_id)
        return SpooledFragment(self.boot_id, seq, self.spec.hash, directory, payload)

    def _places(self) -> list[EpisodePlace]:
        places, seq = [], 1
        for index, episode in enumerate(self._dataset.meta.episodes):
            first, end = int(episode["dataset_from_index"]), int(episode["dataset_to_index"])
            if len(episode["tasks"]) != 1:
                raise DatasetError(f"episode {index} has the tasks {episode['tasks']}", rule="one task an episode")
            places.append(EpisodePlace(index, first, end, str(episode["tasks"][0]), seq))
            seq += -(-(end - first) // self._frames)
        if not places:
            raise DatasetError(f"{self.info.root} has no episode", rule="an import brings at least one")
        return places

    def _place(self, seq: int) -> EpisodePlace:
        return self.episodes[bisect.bisect_right(self.episodes, seq, key=lambda place: place.first_seq) - 1]

    def _make_boot_id(self) -> str:
        first = self.episodes[0]
        actions = _stack(self._rows.select_columns([self.info.columns[ACTION]])[first.first : first.end])
        known = [self.spec.to_dict(), dict(self.info.columns), self._success, self._frames, first.instruction]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode() + actions).hexdigest()[:16]

    def _step_rows(self, place: EpisodePlace, first: int, end: int, robot_id: str, task: str) -> list[dict[str, Any]]:
        values = self._values(first, end)
        now_ns, rows = time.time_ns(), []
        for i in range(end - first):
            frame, is_last = first + i - place.first, first + i == place.end - 1
            row = {
                "robot_id": robot_id,
                "boot_id": self.boot_id,
                "episode_id": place.index,
                "frame_index": frame,
                "time_ns": now_ns,  # when it was recorded is not known
                "mono_ns": round(frame / self.spec.control_hz * 1e9),
                "task": task,
                "source": int(Source.DEMO),
                "operator_id": "",
                "intervention": False,
                "chunk_id": -1,
                "chunk_index": -1,
                "next.reward": float(values[REWARD][i]) if REWARD in values else 0.0,
                **self._ends(values, i, is_last),
            }
            for name, column in self.info.columns.items():
                row[name] = encode(self.spec.features[name], values[column][i]) if name != ACTION else values[column][i]
            rows.append(row)
        return rows

    def _ends(self, values: Mapping[str, Any], i: int, is_last: bool) -> dict[str, bool]:
        """Where the dataset does not say: a successful episode has terminated, any other one was cut."""
        truncated = bool(values[TRUNCATED][i]) if TRUNCATED in values else None
        done = bool(values[DONE][i]) if DONE in values else is_last
        if truncated is None:
            truncated = done and DONE not in values and self._success != "all"
        return {"next.terminated": done and not truncated, "next.truncated": truncated}

    def _values(self, first: int, end: int) -> dict[str, Any]:
        """Values of the frames by the dataset's column: arrays of our features' shapes, or numbers."""
        raw: dict[str, Any] = self._rows[first:end]
        taken = set(self.info.videos) & set(self.info.columns.values())
        if taken:
            item = self._dataset[first]
            raw |= {column: item[column][: end - first] for column in taken}
        found: dict[str, Any] = {column: raw[column] for column in self.info.has & raw.keys()}
        for name, column in self.info.columns.items():
            feature, is_image = self.spec.features[name], name in self.info.images
            found[column] = [_pixels(value) if is_image else _numbers(feature, value) for value in raw[column]]
        return found

    def _episode_row(self, place: EpisodePlace, task: str, event: str) -> dict[str, Any]:
        closed = event == "closed"
        return {
            "episode_id": place.index,
            "event": event,
            "time_ns": time.time_ns(),
            "task": task,
            "instruction": place.instruction,
            "seed": -1,
            "reset_state_id": "",
            "group_id": "",
            "outcome": self._outcome(place) if closed else "",
            "judge": JUDGE if closed else "",
            "length": place.length if closed else -1,
            "first_version": -1,
            "last_version": -1,
        }

    def _outcome(self, place: EpisodePlace) -> str:
        if self._success == "column":
            column = self._dataset.hf_dataset.select_columns([SUCCESS])[place.first : place.end][SUCCESS]
            return "success" if any(bool(value) for value in column) else "failure"
        return "success" if self._success == "all" else "unknown"


def frames_per_fragment(features: list[Feature]) -> int:
    """As many frames as ``FRAGMENT_BYTES`` hold before images are encoded; it must never depend on the values."""
    return max(1, min(MAX_FRAMES, FRAGMENT_BYTES // sum(f.size * f.np_dtype.itemsize for f in features)))


def match_tasks(instructions: list[str], catalogue: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """The run's task for each instruction of a dataset: as given, or of the same name or instruction.

    Raises:
        DatasetError: Names what has no task, and the run's tasks.
    """
    by_text = {_plain(str(entry["instruction"])): task for task, entry in catalogue.items()}
    by_text |= {_plain(task): task for task in catalogue}
    found = {text: given.get(text, by_text.get(_plain(text), "")) for text in instructions}
    lost = sorted(text for text, task in found.items() if task not in catalogue)
    unknown = sorted(set(given) - set(instructions))
    both = f"the run's tasks are {sorted(catalogue)}, the dataset's {instructions}"
    if unknown:
        raise DatasetError(f"the dataset has no task {unknown}", rule=both)
    if lost:
        remedy = f"--task-map '{lost[0]}=TASK', or add the task to the run"
        raise DatasetError(f"the dataset's tasks {lost} are not among the run's", rule=both, remedy=remedy)
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _open(info: Info, num_frames: int) -> Any:
    """The dataset; of a column that lies in videos, an item has ``num_frames`` frames from its own on."""
    LeRobotDataset = load_lerobot()
    ahead = {column: [i / info.spec.control_hz for i in range(num_frames)] for column in info.videos}
    try:
        return LeRobotDataset(
            f"local/{info.root.name}", root=info.root, video_backend="pyav", return_uint8=True, delta_timestamps=ahead or None
        )
    except Exception as error:  # whatever the library raises over damaged or missing files
        raise DatasetError(
            f"{info.root} cannot be opened: {error!r}"[:1000], rule="all files that meta/ names are there and whole"
        ) from error


def _pixels(value: Any) -> np.ndarray:
    """A frame as uint8 (H, W, C). LeRobot gives (C, H, W), in [0, 1] where images were stored one by one."""
    array = np.asarray(value)
    if array.dtype != np.uint8:
        array = np.rint(array * 255).astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def _numbers(feature: Feature, value: Any) -> np.ndarray:
    return np.asarray(value).astype(feature.np_dtype).reshape(feature.shape)


def _stack(rows: Mapping[str, Any]) -> bytes:
    return b"".join(np.asarray(value).tobytes() for values in rows.values() for value in values)
