"""Which action the policy proposes for a frame: the bookkeeping of chunks, without any I/O or clock.

A chunk of H actions is computed from the observation of one frame; its action i is meant for i frames later, and is used
then or never. Three ways to go from one chunk to the next (``Chunking.mode``):

    execute    the next chunk is asked for ``execute`` frames after the last one; while it is late, the old one goes on
    ensemble   the same, and what several chunks say of one frame is averaged (temporal ensembling, ACT, arXiv 2304.13705)
    async      the next chunk is asked for so early that it is there when ``execute`` actions of the old one are used: its lead
               is the largest delay of the last chunks. What the old one does meanwhile goes with the request, for policies
               that can continue it (training-time real-time chunking, arXiv 2512.05964)

One request is on its way at a time: a policy that is slower than its chunks are used is asked for what is newest, not for a
queue of what was. After the end of a chunk there is nothing to propose, and the loop holds.

Shape suffixes: H chunk length, A action dims, D actions of a prefix.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from fleet.errors import ConfigError

MODES = ("execute", "ensemble", "async")
NUM_DELAYS = 10  # chunks whose largest delay is the next one's lead
REPEAT_FRAMES = 100  # a request that nobody answered is repeated after so many
MAX_PREFIX = 32  # D at most


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How chunks follow each other.

    Args:
        mode: One of ``MODES``.
        execute: Actions used of each chunk before the next one is due, at least 1.
        ensemble_decay: m of the weights exp(-m i) of "ensemble", i = 0 being the oldest chunk; above 0 the old count more.

    Raises:
        ConfigError: A value is out of its range.
    """

    mode: str = "execute"
    execute: int = 4
    ensemble_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.execute < 1 or not np.isfinite(self.ensemble_decay):
            raise ConfigError(
                f"chunking = {self.mode!r}, execute = {self.execute}, ensemble_decay = {self.ensemble_decay}",
                rule=f"chunking is one of {MODES}, execute at least 1, ensemble_decay finite",
            )


@dataclasses.dataclass(frozen=True)
class PlannedChunk:
    """actions_HA: the chunk; without any action it says that the policy has none. frame_index: of the observation behind it."""

    chunk_id: int
    frame_index: int
    version: int
    actions_HA: np.ndarray


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One action (A,).

    chunk_id: The chunk that it is from; of several, the newest.
    chunk_index: Which of its actions, -1 where it is an average of several chunks: no density of one of them is its own.
    stale: Somebody else has acted since the chunk's observation, for longer than its actions would be used. Shown to an
        operator, not executed.
    """

    action: np.ndarray
    chunk_id: int
    chunk_index: int
    stale: bool = False


class Plan:
    """The chunks of the running episode. Each tick: ``due``, ``add`` what came, ``propose``; ``overruled`` where another acted.

    ``lead``: frames by which "async" asks ahead.
    """

    def __init__(self, chunking: Chunking) -> None:
        self.chunking = chunking
        self._delays: collections.deque[int] = collections.deque(maxlen=NUM_DELAYS)
        self.reset()

    def reset(self) -> None:
        """A new episode: nothing is planned. Delays are of the machine, and stay known."""
        self._chunks: list[PlannedChunk] = []  # oldest first
        self._asked = self._entered = self._overruled = -1
        self._in_flight = False

    @property
    def lead(self) -> int:
        return max(self._delays, default=0) if self.chunking.mode == "async" else 0

    def due(self, frame: int) -> bool:
        """Whether a new chunk must be asked for at this frame."""
        wait = self._asked + REPEAT_FRAMES if self._in_flight else self._next()
        if self._asked >= 0 and frame < wait and not self._handed_back(frame):
            return False
        self._asked, self._in_flight = frame, True
        return True

    def waits(self, frame: int) -> bool:
        """Whether this tick may wait for a chunk: one was asked for in it. Not in "async", which measures how late they are."""
        return self._in_flight and self._asked == frame and self.chunking.mode != "async"

    def prefix(self, frame: int) -> np.ndarray:
        """(D, A): the actions of this frame and the next, as far as they are certain to be executed before a chunk asked for
        now is there. D = 0 where nothing is certain."""
        actions = []
        if self._overruled < frame - 1:  # who acted in the last tick will probably act in this one
            for ahead in range(min(self.lead, MAX_PREFIX)):
                proposal = self.propose(frame + ahead)
                if proposal is None or proposal.stale:
                    break
                actions.append(proposal.action)
        return np.array(actions, np.float32)

    def add(self, chunk: PlannedChunk, frame: int) -> None:
        """A chunk came, in time for ``frame``. One that is older than what is planned is ignored."""
        self._in_flight &= chunk.frame_index < self._asked
        if not len(chunk.actions_HA) or (self._chunks and chunk.frame_index <= self._chunks[-1].frame_index):
            return
        self._delays.append(frame - chunk.frame_index)
        self._entered = frame
        keep = self._chunks if self.chunking.mode == "ensemble" else []
        self._chunks = [old for old in keep if _covers(old, frame) and old.frame_index > self._overruled] + [chunk]

    def overruled(self, frame: int) -> None:
        """Somebody else acted at this frame: chunks of an observation up to here expect another world."""
        self._overruled = frame
        del self._chunks[:-1]

    def propose(self, frame: int) -> Proposal | None:
        """The policy's action for this frame, or None."""
        chunks = [chunk for chunk in self._chunks if _covers(chunk, frame)]
        if not chunks:
            return None
        newest = chunks[-1]
        index = frame - newest.frame_index
        if len(chunks) == 1:
            stale = newest.frame_index <= self._overruled and index >= self.chunking.execute
            return Proposal(newest.actions_HA[index], newest.chunk_id, index, stale)
        actions_CA = np.stack([chunk.actions_HA[frame - chunk.frame_index] for chunk in chunks])
        weights_C = np.exp(-self.chunking.ensemble_decay * np.arange(len(chunks)))
        action = (weights_C @ actions_CA / weights_C.sum()).astype(np.float32)
        return Proposal(action, newest.chunk_id, -1)

    def _next(self) -> int:
        """The frame from which the next chunk is due, when none is on its way."""
        if self.chunking.mode == "async" and self._entered >= self._asked:
            return self._entered + self.chunking.execute - self.lead
        return self._asked + self.chunking.execute

    def _handed_back(self, frame: int) -> bool:
        """Whether the newest request is from before the end of somebody else's acting."""
        return not self._in_flight and self._asked <= self._overruled < frame - 1


def _covers(chunk: PlannedChunk, frame: int) -> bool:
    return 0 <= frame - chunk.frame_index < len(chunk.actions_HA)
