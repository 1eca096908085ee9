"""Which action the policy proposes for a frame: the bookkeeping of chunks, without any I/O.

A chunk of H actions is computed from the observation of one frame. The first ``execute`` of them are used, then a new
chunk is due. While the new one is late, the rest of the old chunk - predictions for just these frames - goes on;
after its end there is nothing to propose, and the loop holds.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PlannedChunk:
    """actions_HA: the chunk. frame_index: the frame of the observation behind it."""

    chunk_id: int
    frame_index: int
    version: int
    actions_HA: np.ndarray


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One action (A,) out of a chunk."""

    action: np.ndarray
    chunk_id: int
    chunk_index: int


class Plan:
    """The chunks of the running episode."""

    def __init__(self, execute: int) -> None:
        self.execute = execute
        self._chunk: PlannedChunk | None = None
        self._requested = -1

    def reset(self) -> None:
        """A new episode: nothing is planned."""
        self._chunk, self._requested = None, -1

    def due(self, frame: int) -> bool:
        """Whether a new chunk must be asked for at this frame. One that does not come is asked for again."""
        last = max(self._answered, self._requested)
        if last >= 0 and frame < last + self.execute:
            return False
        self._requested = frame
        return True

    @property
    def waiting(self) -> bool:
        """Whether a requested chunk has not come."""
        return self._requested > self._answered

    @property
    def _answered(self) -> int:
        return -1 if self._chunk is None else self._chunk.frame_index

    def add(self, chunk: PlannedChunk) -> None:
        """A chunk came. One that is older than what is planned is ignored."""
        if chunk.frame_index > self._answered:
            self._chunk = chunk

    def propose(self, frame: int) -> Proposal | None:
        """The policy's action for this frame, or None."""
        if self._chunk is None:
            return None
        index = frame - self._chunk.frame_index
        if not 0 <= index < len(self._chunk.actions_HA):
            return None
        return Proposal(self._chunk.actions_HA[index], self._chunk.chunk_id, index)
