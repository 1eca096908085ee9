"""Runs and LeRobot datasets for these tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from buffer.log import Log
from buffer.reader import LogReader
from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder
from fleet.schema import build_table, decode_fragment, encode_fragment

ROOT = Path(__file__).parents[2]
TASKS = {"reach": "Reach the target.", "push": "push the block"}
FPS = 20
IMAGE = (32, 48, 3)


def make_run(path: Path) -> RunFolder:
    """A run that was served once and is not now."""
    run = RunFolder.create(path)
    (run.registry / "socket").write_text(str(run.registry / "no.sock"))  # the registry is a view: nothing waits for it
    run.config.write_text((ROOT / "examples" / "toy.yaml").read_text())
    create_run_keys(run.keys)
    tasks = {task: {"instruction": text, "embedding": [0.0]} for task, text in TASKS.items()}
    (run.path / "tasks.json").write_text(json.dumps(tasks))
    return run


def picture(episode: int, frame: int) -> np.ndarray:
    """A smooth picture that differs from frame to frame."""
    rows, columns = np.mgrid[0 : IMAGE[0], 0 : IMAGE[1]]
    values = np.stack([rows * 4, columns * 4, np.full_like(rows, (30 * episode + frame) % 200)], -1)
    return values.astype(np.uint8)


def frame_values(episode: int, frame: int, last: bool) -> dict[str, np.ndarray]:
    return {
        "observation.state": np.array([episode, frame, 0.5 * frame], np.float32),
        "observation.gripper": np.array([frame % 2 == 0], bool),
        "observation.images.top": picture(episode, frame),
        "action": np.array([np.sin(frame), episode], np.float32),
        "next.reward": np.array([0.25 * frame], np.float32),
        "next.done": np.array([last]),
        "next.success": np.array([last and episode % 2 == 0]),
    }


def make_dataset(
    root: Path, lengths: list[int], *, video: bool = False, more: dict | None = None, start: int = 0, shift: float = 0.0
) -> Path:
    """A dataset of the two tasks in turn, written by lerobot itself; ``start`` > 0 adds episodes to one that exists, ``shift``
    is added to all actions."""
    from buffer.format_lerobot import load_lerobot

    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        "observation.gripper": {"dtype": "bool", "shape": (1,), "names": None},
        "observation.images.top": {
            "dtype": "video" if video else "image",
            "shape": IMAGE,
            "names": ["height", "width", "channels"],
        },
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    more = more or {}
    features |= {name: feature for name, (feature, _) in more.items()}
    cls = load_lerobot()
    if start:
        dataset = cls.resume(f"local/{root.name}", root=root, video_backend="pyav")
    else:
        dataset = cls.create(
            f"local/{root.name}",
            fps=FPS,
            features=features,
            root=root,
            robot_type="toy_arm",
            use_videos=video,
            video_backend="pyav",
        )
    texts = list(TASKS.values())
    for episode, length in enumerate(lengths, start):
        for frame in range(length):
            extra = {name: value for name, (_, value) in more.items()}
            values = frame_values(episode, frame, frame == length - 1)
            values["action"] += np.float32(shift)
            dataset.add_frame({**values, **extra, "task": texts[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


def open_dataset(root: Path):
    from buffer.format_lerobot import load_lerobot

    return load_lerobot()(f"local/{root.name}", root=root, video_backend="pyav")


def stored_steps(run: RunFolder) -> list[tuple[str, str, int, int]]:
    """(robot, boot, episode, frame) of every step in the log, in its order."""
    reader, found = LogReader(run.buffer), []
    for record in reader.poll():
        steps = decode_fragment(record.tables, record.payload).tables.get("steps")
        if steps is not None:
            rows = zip(steps["episode_id"].to_pylist(), steps["frame_index"].to_pylist(), strict=True)
            found += [(record.robot_id, record.boot_id, episode, frame) for episode, frame in rows]
    reader.close()
    return found


def write_log(folder: Path, spec, fragments) -> None:
    """A log of (robot_id, boot_id, tables), each with rows by table name."""
    log, seqs = Log(folder), {}
    log.add_spec(spec)
    for robot, boot, rows in fragments:
        directory, payload = encode_fragment({name: build_table(name, spec, table) for name, table in rows.items()})
        seqs[robot, boot] = seqs.get((robot, boot), 0) + 1
        log.append(robot, boot, seqs[robot, boot], spec.hash, directory, payload)
    log.commit()
    log.close()
