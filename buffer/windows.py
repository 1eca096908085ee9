"""From drawn steps to windows: what is known of them at once, and where the rest is to be read.

Shape suffixes: B batch, H actions in a window, W steps of a walk, N rows to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from buffer.arena import Arena
from buffer.gather import Draw, Read
from buffer.index import StepIndex
from buffer.parts import ABSENT, TERMINATED, TRUNCATED
from buffer.returns import Returns
from buffer.takeovers import takeover_in
from fleet.batch import BatchNeeds
from fleet.errors import SpecError
from fleet.spec import ACTION, Feature, RobotSpec


class WindowMaker:
    """Makes draws of steps of one index.

    Attributes:
        specs: Of the robots whose steps the index has, by hash.
    """

    def __init__(self, index: StepIndex) -> None:
        self._index = index
        self.specs: dict[str, RobotSpec] = {}
        self._features: dict[str, Feature] = {}
        self._returns: dict[float, Returns] = {}

    def add_spec(self, spec_hash: str, spec: RobotSpec) -> None:
        self.specs[spec_hash] = spec
        self._features.clear()

    def make(self, steps_B: np.ndarray, needs: BatchNeeds, step: int, position: int, arenas: tuple[Arena, ...]) -> Draw:
        """The windows at these steps.

        Raises:
            SpecError: Robots of this log do not have the observations that ``needs`` names, or not in one shape.
        """
        index, horizon = self._index, needs.horizon
        back, forward = max(0, -min(needs.offsets)), max(horizon - 1, *needs.offsets)
        walk = index.walk(steps_B, back, forward, needs.within)
        window = slice(back, back + horizon)
        steps_BH, mask_BH = walk.steps_BW[:, window], walk.inside_BW[:, window]
        others = sorted(offset for offset in needs.offsets if offset)
        return Draw(
            needs=needs,
            step=step,
            position=position,
            arenas=arenas,
            facts={
                "inside_at": {offset: walk.inside_BW[:, back + offset].copy() for offset in others},
                "mask_BH": mask_BH.copy(),
                "source_BH": index.source[steps_BH],
                **self._facts(steps_B, needs),
                **self._rewards(steps_BH, mask_BH),
            },
            obs=self._reads(needs.observations, steps_B),
            obs_at={offset: self._reads(needs.observations, walk.steps_BW[:, back + offset]) for offset in others},
            actions=self._reads((ACTION,), steps_BH)[ACTION],
            chunks_N=index.places_of_chunks(np.append(index.chunk[steps_B], index.chunk_row.end - 1)),
        )

    def _rewards(self, steps_BH: np.ndarray, mask_BH: np.ndarray) -> dict[str, np.ndarray]:
        flags_BH = np.where(mask_BH, self._index.flags[steps_BH], 0)
        return {
            "rewards_BH": np.where(mask_BH, self._index.reward[steps_BH], np.float32(0)),
            "terminated_BH": (flags_BH & TERMINATED).astype(bool),
            "truncated_BH": (flags_BH & TRUNCATED).astype(bool),
        }

    def _facts(self, steps_B: np.ndarray, needs: BatchNeeds) -> dict[str, Any]:
        index, episodes = self._index, self._index.episodes
        fragment_B = index.fragment[steps_B]
        episode_B, frame_B = index.episode[fragment_B], index.frame(steps_B)
        returns = self._returns.setdefault(needs.discount, Returns(index, needs.discount))
        return {
            "source_B": index.source[steps_B],
            "task_B": index.task[fragment_B].astype(np.int64),
            "version_B": index.version[steps_B],
            "step_B": steps_B,
            "episode_B": episode_B.astype(np.int64),
            "frame_B": frame_B,
            "steps_to_go_B": np.where(episodes.finished[episode_B], episodes.length[episode_B] - frame_B, -1),
            "outcome_B": episodes.outcome[episode_B],
            "terminated_B": episodes.terminated[episode_B],
            "takeover_in_B": takeover_in(index, steps_B, needs.takeover_within),
            "return_B": returns.of(steps_B),
            "weight_B": np.ones(len(steps_B), np.float32),
            "index_B": np.arange(len(steps_B)),
            "shard_weight": 1.0,
        }

    def _reads(self, names: Sequence[str], steps: np.ndarray) -> dict[str, Read]:
        index, steps_N = self._index, steps.reshape(-1)
        fragment_N = index.fragment[steps_N]
        row_N, arena_N = index.row(steps_N, fragment_N), index.arena[fragment_N]
        reads = {}
        for name in names:
            feature = self.feature(name)
            at_N, offsets_at_N = index.places_of(name, fragment_N)
            if (at_N == ABSENT).any() or (offsets_at_N is None) != (feature.codec == "raw"):
                raise SpecError(f"steps of this log lack {name!r}", rule="fragments have the columns of their spec")
            if offsets_at_N is None:
                at_N = at_N + row_N * (feature.size * feature.np_dtype.itemsize)
            else:
                offsets_at_N = offsets_at_N + 4 * row_N
            reads[name] = Read(feature, name, steps.shape, steps_N, arena_N, at_N, offsets_at_N)
        return reads

    def feature(self, name: str) -> Feature:
        """The feature that all specs of this log agree on."""
        if name in self._features:
            return self._features[name]
        features = {spec.features.get(name) for spec in self.specs.values()}
        kinds = {None if f is None else (f.dtype, f.shape, f.codec) for f in features}
        feature = next(iter(features), None)
        if len(kinds) != 1 or feature is None:
            raise SpecError(
                f"feature {name!r} is {sorted(str(kind) for kind in kinds)} in this log",
                rule="all robots of a batch have the same dtype, shape and codec of what is asked for",
                remedy="ask for features that all robots have, or train robot types in separate runs",
            )
        self._features[name] = feature
        return feature
