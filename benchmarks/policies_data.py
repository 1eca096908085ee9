"""Demonstrations for the benchmark of policies, in a run folder's log as robots and a gateway would have left them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from actors.fragments import FragmentBuilder, encode_rows
from actors.operators.experts import MetaWorldExpert
from actors.records import RecordKind, pack_text, step_dtype
from actors.robots.metaworld import MetaWorldRobot
from benchmarks.buffer_report import say
from buffer import sidecar
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.manifest import live_segments
from fleet.files import Files
from fleet.identity import create_run_keys
from fleet.robot import Source
from fleet.runfolder import RunFolder
from fleet.seeds import training_seed
from fleet.spec import RobotSpec
from infra.run_config import RunConfig, write_catalogue

MT10 = {
    "reach-v3": "reach the target",
    "push-v3": "push the puck to the goal",
    "pick-place-v3": "pick up the puck and place it at the goal",
    "door-open-v3": "open the door",
    "drawer-open-v3": "open the drawer",
    "drawer-close-v3": "shut the drawer",
    "button-press-topdown-v3": "press the button from above",
    "peg-insert-side-v3": "put the peg into the hole",
    "window-open-v3": "slide the window open",
    "window-close-v3": "slide the window shut",
}
MAX_STEPS = 200
ROBOT_ID, BOOT_ID, FRAGMENT_STEPS = "demonstrator", "0" * 16, 20
MOST_TRIES = 4  # episodes for each demonstration that is wanted: experts fail now and then


def make_demonstrations(
    folder: Path, tasks: dict[str, str], num_each: int, images: int = 0, camera: str = "corner2"
) -> RunFolder:
    """A run folder whose log holds ``num_each`` successful demonstrations a task; one that is there already is taken.

    Args:
        tasks: Instruction by name.
        images: Side of the camera's images; 0: none.
    """
    if (folder / "whole").exists():
        return RunFolder.open(folder)
    shutil.rmtree(folder, ignore_errors=True)
    run = RunFolder.create(folder)
    create_run_keys(run.keys)
    settings = {"max_steps": MAX_STEPS, "images": images, "camera": camera}
    tables = {"run": {"tasks": tasks}, "robot": {"adapter": "metaworld", "settings": settings}, "actor": {"execute": 4}}
    run.config.write_text(yaml.safe_dump(tables))
    write_catalogue(run, RunConfig(tasks))
    _fill_log(run, MetaWorldRobot(**settings), tasks, num_each)
    (folder / "whole").touch()
    return run


def run_beside(demonstrations: RunFolder, folder: Path) -> RunFolder:
    """A new run folder that trains on the log of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    run = RunFolder.create(folder)
    create_run_keys(run.keys)
    for name in ("run.yaml", "tasks.json"):
        shutil.copy(demonstrations.path / name, run.path / name)
    run.buffer.rmdir()
    run.buffer.symlink_to(demonstrations.buffer, target_is_directory=True)
    return run


def tasks_of(run: RunFolder) -> dict[str, np.ndarray]:
    """Instruction embedding by task."""
    catalogue = json.loads((run.path / "tasks.json").read_text())
    return {task: np.asarray(entry["embedding"], np.float32) for task, entry in catalogue.items()}


def _fill_log(run: RunFolder, robot: MetaWorldRobot, tasks: dict[str, str], num_each: int) -> None:
    log = Log(run.buffer)
    ingest = Ingest(log)
    seq = ingest.admit(ROBOT_ID, BOOT_ID, robot.spec)
    builder = FragmentBuilder(robot.spec, ROBOT_ID, BOOT_ID, tasks)
    for records in _episodes(robot, tasks, num_each):
        for number, record in enumerate(records):
            builder.add(record)
            whole = record["kind"] == RecordKind.RESULT and number % (2 * FRAGMENT_STEPS) == 0
            rows = builder.cut() if whole or record["kind"] == RecordKind.CLOSE else None
            if rows is not None:
                seq += 1
                directory, payload = encode_rows(robot.spec, rows)
                fields = {"boot_id": BOOT_ID, "seq": seq, "spec_hash": robot.spec.hash, "tables": directory}
                ingest.offer(ROBOT_ID, fields, payload)
        ingest.commit()
    log.close()
    robot.close()
    for name in live_segments(run.buffer):
        if not name.index_path.exists():
            sidecar.write(Files(), run.buffer, name)


def _episodes(robot: MetaWorldRobot, tasks: dict[str, str], num_each: int) -> Iterator[list[Any]]:
    """The control process's records of each successful demonstration."""
    expert, episode = MetaWorldExpert(), 0
    for task in tasks:
        kept = tries = 0
        while kept < num_each:
            if tries == MOST_TRIES * num_each:
                raise RuntimeError(f"the expert of {task} succeeded {kept} times in {tries}")
            seed = training_seed(0, f"demonstrations/{task}", tries)
            records, success = _episode(robot, expert, task, seed, episode)
            tries += 1
            if success:
                kept, episode = kept + 1, episode + 1
                yield records
        say(f"{task}: {kept} demonstrations of {tries} tries")


def _episode(robot: MetaWorldRobot, expert: MetaWorldExpert, task: str, seed: int, episode: int) -> tuple[list[Any], bool]:
    obs = robot.reset(task, seed)
    expert.reset(task)
    records = [_record(robot.spec, RecordKind.OPEN, episode, text=pack_text(task=task, seed=seed))]
    for frame in range(MAX_STEPS):
        records.append(_record(robot.spec, RecordKind.OBSERVE, episode, frame_index=frame, **obs))
        feedback = robot.send(expert.action(obs))
        records.append(
            _record(
                robot.spec,
                RecordKind.RESULT,
                episode,
                frame_index=frame,
                action=feedback.action,
                reward=feedback.reward,
                terminated=feedback.terminated,
                truncated=feedback.truncated,
                text=pack_text(operator="expert"),
            )
        )
        if feedback.terminated or feedback.truncated:
            break
        obs = robot.observe()
    success = bool(feedback.success)
    outcome = "success" if success else "failure"
    records.append(_record(robot.spec, RecordKind.CLOSE, episode, text=pack_text(outcome=outcome, judge="robot", length=-1)))
    return records, success


def _record(spec: RobotSpec, kind: RecordKind, episode: int, **fields: Any) -> Any:
    record = np.zeros((), step_dtype(spec))
    common = {"kind": kind, "episode_id": episode, "source": Source.DEMO, "chunk_id": -1, "chunk_index": -1}
    for name, value in {**common, "time_ns": time.time_ns(), "mono_ns": time.monotonic_ns(), **fields}.items():
        record[name] = value
    return record[()]
