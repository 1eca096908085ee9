"""Fragments for tests: small episodes whose values say where they belong."""

from __future__ import annotations

import time

import numpy as np

from fleet.robot import Source
from fleet.schema import build_table, encode_fragment
from fleet.spec import Feature, RobotSpec


def make_spec(state_size: int = 3, image: str | None = None, extra: int = 0) -> RobotSpec:
    features = {"action": Feature("float32", (2,)), "observation.state": Feature("float32", (state_size,))}
    if image:
        features["observation.images.top"] = Feature("uint8", (16, 16, 3), codec=image)
    if extra:
        features["extra.ballast"] = Feature("uint8", (extra,))
    return RobotSpec("toy", 50, features)


def step_values(robot: int, episode: int, frame: int) -> np.ndarray:
    return np.array([robot, episode, frame], np.float32)


def make_rows(robot_id, boot_id, episode, first_frame, sources, task="reach", spec=None, chunk_id=-1):
    spec = spec or make_spec()
    number = int("".join(c for c in robot_id if c.isdigit()) or 0)
    rows = []
    for i, source in enumerate(sources):
        frame = first_frame + i
        row = {
            "robot_id": robot_id,
            "boot_id": boot_id,
            "episode_id": episode,
            "frame_index": frame,
            "time_ns": time.time_ns(),
            "mono_ns": frame,
            "task": task,
            "source": int(source),
            "operator_id": "",
            "intervention": source == Source.OPERATOR,
            "chunk_id": chunk_id,
            "chunk_index": 0,
            "next.reward": 0.0,
            "next.terminated": False,
            "next.truncated": False,
            "action": np.array([1000 * episode + frame, number], np.float32),
        }
        for name, feature in spec.observations.items():
            if name == "observation.state":
                row[name] = np.resize(step_values(number, episode, frame), feature.shape)
            elif feature.codec == "raw":
                row[name] = np.full(feature.shape, frame % 256, feature.np_dtype)
            else:
                from fleet.images import encode

                row[name] = encode(feature, np.full(feature.shape, 40 + frame, np.uint8))
        for name, feature in spec.features.items():
            if name.startswith("extra."):
                row[name] = np.random.default_rng(frame).integers(0, 256, feature.shape).astype(feature.dtype)
        rows.append(row)
    return rows


def episode_row(episode, event, task="reach", length=-1, outcome=""):
    return {
        "episode_id": episode,
        "event": event,
        "time_ns": time.time_ns(),
        "task": task,
        "instruction": task,
        "seed": -1,
        "reset_state_id": "",
        "group_id": "",
        "outcome": outcome,
        "judge": "test" if outcome else "",
        "length": length,
        "first_version": -1,
        "last_version": -1,
    }


def chunk_row(episode, chunk_id, version, frame=0):
    return {
        "episode_id": episode,
        "chunk_id": chunk_id,
        "frame_index": frame,
        "policy_version": version,
        "latency_ms": 1.0,
        "horizon": 1,
        "actions_HA": np.zeros(2, np.float32),
        "log_prob_T": [],
    }


def fragment(
    robot_id,
    boot_id,
    episode,
    first_frame,
    sources,
    *,
    opened=False,
    closed=False,
    task="reach",
    spec=None,
    chunk=None,
    chunk_id=-1,
):
    """(directory, payload) of one fragment; ``chunk`` = (chunk_id, version) adds a policy call."""
    spec = spec or make_spec()
    tables = {}
    if sources:
        rows = make_rows(robot_id, boot_id, episode, first_frame, sources, task, spec, chunk[0] if chunk else chunk_id)
        tables["steps"] = build_table("steps", spec, rows)
    if chunk:
        tables["chunks"] = build_table("chunks", spec, [chunk_row(episode, *chunk)])
    episodes = [episode_row(episode, "opened", task)] if opened else []
    if closed:
        episodes.append(episode_row(episode, "closed", task, first_frame + len(sources), "success"))
    if episodes:
        tables["episodes"] = build_table("episodes", spec, episodes)
    return encode_fragment(tables)


def message(robot_id, boot_id, seq, episode, first_frame, sources, *, spec=None, **options):
    """(fields, payload) as a FRAGMENT message has them."""
    spec = spec or make_spec()
    directory, payload = fragment(robot_id, boot_id, episode, first_frame, sources, spec=spec, **options)
    return {"boot_id": boot_id, "seq": seq, "spec_hash": spec.hash, "tables": directory}, payload
