"""Batches of which a test says only what matters to it."""

import dataclasses

import numpy as np
import torch

from algorithms.base import Batch


def make_batch(obs, actions_BHA, *, mask_BH=None, **fields):
    """A batch in which nothing is masked, rewarded, ended or known of the episode, except for what ``fields`` say."""
    shape = actions_BHA.shape[:2]
    missing = torch.full(shape[:1], -1)
    given = {
        "obs_at": {},
        "inside_at": {},
        "rewards_BH": torch.zeros(shape),
        "terminated_BH": torch.zeros(shape, dtype=torch.bool),
        "truncated_BH": torch.zeros(shape, dtype=torch.bool),
        "mask_BH": torch.ones(shape, dtype=torch.bool) if mask_BH is None else mask_BH,
        "source_B": torch.zeros(shape[0], dtype=torch.uint8),
        "task_B": torch.zeros(shape[0], dtype=torch.long),
        "terminated_B": torch.zeros(shape[0], dtype=torch.bool),
        "return_B": torch.full(shape[:1], np.nan),
        "weight_B": torch.ones(shape[0]),
        "replay": {},
        "index_B": torch.arange(shape[0]),
        "shard_weight": 1.0,
    }
    if "source_BH" not in fields:
        given["source_BH"] = fields.get("source_B", given["source_B"])[:, None].expand(shape)
    unknown = ("version_B", "step_B", "episode_B", "frame_B", "steps_to_go_B", "outcome_B", "takeover_in_B")
    return Batch(obs=obs, actions_BHA=actions_BHA, **{**given, **dict.fromkeys(unknown, missing), **fields})


def take_rows(batch, rows):
    """Some rows of a batch, a range or a list: what one of several ranks makes."""
    index = torch.as_tensor(list(rows))

    def cut(value):
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value[index]

    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{n: cut(v) for n, v in fields.items() if isinstance(v, (dict, torch.Tensor))})
