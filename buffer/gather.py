"""From a draw to a batch: copies rows out of the mapped segments into the caller's arrays.

A draw holds all that is needed: numbers, offsets, and the arenas that these count in. So batches may be gathered in
other threads while the sampler goes on.

Shape suffixes: B batch, H actions in a window, A action dims, N rows to read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from buffer.arena import LARGE_ROW, Arena, Residency, copy_rows, take
from buffer.team import Task, Team
from fleet.batch import BatchNeeds, Windows
from fleet.errors import ImageError, StorageError
from fleet.images import decode
from fleet.spec import Feature

Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]
"""(name, shape, dtype) -> a C contiguous array to fill. Names: "actions", "<feature>", "<feature>@<offset>"."""


class ImageCache(Protocol):
    """Decoded images: ``buffer.image_cache.ImageCache``."""

    def rows(
        self, column: str, keys: np.ndarray, out: np.ndarray, decode_missing: Callable[[int, np.ndarray], bool]
    ) -> None: ...

    def cached(self, keys: np.ndarray, columns: tuple[str, ...] | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Read:
    """Rows of one feature.

    Attributes:
        steps_N: Numbers of the steps. shape: of what is read, without the feature's own.
        arena_N: Indices into the draw's arenas.
        at_N: Byte offset of the row; for an encoded feature, where the fragment's encoded bytes start.
        offsets_at_N: For an encoded feature: byte offset of the row's pair of int32 offsets.
    """

    feature: Feature
    column: str
    shape: tuple[int, ...]
    steps_N: np.ndarray
    arena_N: np.ndarray
    at_N: np.ndarray
    offsets_at_N: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which windows a batch is made of. Light: a few arrays of numbers.

    Attributes:
        needs, step: As they were asked for.
        position: Of the log when it was drawn.
        facts: Fields of Windows that are known without reading the segments.
        obs, obs_at, actions: What is to be read.
        chunks_N: (arena, offset, length, row) of the policy call behind each step, and of the newest one of the log as an
            example (N = B + 1); arena -1 for none.
        wider: A rank's few rows, and behind them others of the same batch, which take their places where too many of them
            have images that cannot be decoded; None where there are rows enough, or no images.
    """

    needs: BatchNeeds
    step: int
    position: int
    arenas: tuple[Arena, ...]
    facts: dict[str, Any]
    obs: dict[str, Read]
    obs_at: dict[int, dict[str, Read]]
    actions: Read
    chunks_N: np.ndarray
    wider: Draw | None = None


def gather(
    draw: Draw, out: Allocate, cache: ImageCache | None, residency: Residency, team: Team
) -> tuple[Windows, dict[int, str]]:
    """Reads what a draw names.

    Returns:
        The windows; and of those with an image that cannot be decoded, which is black here, the place in the batch and why.

    Raises:
        StorageError: The disk cannot be read.
    """
    reader = _Reader(draw.arenas, out, cache, residency, [], {})
    windows = Windows(
        obs={name: reader.read(name, read) for name, read in draw.obs.items()},
        obs_at={
            offset: {name: reader.read(f"{name}@{offset}", read) for name, read in reads.items()}
            for offset, reads in draw.obs_at.items()
        },
        actions_BHA=reader.read("actions", draw.actions),
        replay=_replay(draw) if draw.needs.replay else {},
        **draw.facts,
    )
    team.share(reader.images)
    return windows, reader.undecodable


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads small rows at once; of images it notes what is to be done, so that a team shares all of a batch's."""

    arenas: tuple[Arena, ...]
    allocate: Allocate
    cache: ImageCache | None
    residency: Residency
    images: list[Task]
    undecodable: dict[int, str]

    def read(self, name: str, read: Read) -> np.ndarray:
        feature = read.feature
        array = self.allocate(name, (*read.shape, *feature.shape), feature.np_dtype)
        if not array.flags.c_contiguous:
            raise ValueError(f"the array for {name!r} is not C contiguous")
        rows = array.reshape(-1, *feature.shape)
        if read.offsets_at_N is None:
            stored = np.dtype(np.uint8) if feature.dtype == "bool" else feature.np_dtype
            flat = rows.reshape(len(rows), feature.size).view(stored)
            if feature.size * stored.itemsize >= LARGE_ROW:
                copy = partial(copy_rows, self.arenas, read.arena_N, read.at_N, flat, self.residency.fits)
                self.images.append((len(rows), copy))
            else:
                self.residency.touched(take(self.arenas, read.arena_N, read.at_N, flat), self.arenas)
        elif self.cache is None:
            self.images.append((len(rows), partial(_decode_rows, self._decoder(read), rows)))
        else:
            self.cache.rows(read.column, read.steps_N, rows, self._decoder(read))
        return array

    def _decoder(self, read: Read) -> Callable[[int, np.ndarray], bool]:
        assert read.offsets_at_N is not None
        pair_N2 = np.empty((len(read.steps_N), 2), np.int32)
        self.residency.touched(take(self.arenas, read.arena_N, read.offsets_at_N, pair_N2), self.arenas)
        starts = read.at_N[:, None] + pair_N2

        def decode_row(i: int, row: np.ndarray) -> bool:
            arena = self.arenas[read.arena_N[i]]
            try:
                row[:] = decode(read.feature, arena.read(int(starts[i, 0]), int(starts[i, 1])))
            except ImageError as error:  # a camera that sends such frames must not end the learner of all robots
                self.undecodable[i] = f"{read.column} at byte {starts[i, 0]} of {arena.path}: {error.what}"
                row[:] = 0
                return False
            return True

        return decode_row


def _decode_rows(decode_row: Callable[[int, np.ndarray], bool], rows: np.ndarray, first: int, end: int) -> None:
    for i in range(first, end):
        decode_row(i, rows[i])


def _replay(draw: Draw) -> dict[str, np.ndarray]:
    """Columns of the policy calls behind the steps, zeros where there is none."""
    opened: dict[tuple[int, int], pa.RecordBatch] = {}
    values: dict[str, list[np.ndarray | None]] = {name: [] for name in draw.needs.replay}
    for arena, at, length, row in draw.chunks_N.tolist():
        if arena >= 0 and (arena, at) not in opened:
            opened[arena, at] = _open(draw.arenas[arena], at, length)
        chunks = opened.get((arena, at))
        for name, column in values.items():
            column.append(None if chunks is None or name not in chunks.schema.names else _plain(chunks.column(name)[row]))
    return {name: _padded(column[:-1], column[-1]) for name, column in values.items()}


def _open(arena: Arena, at: int, length: int) -> pa.RecordBatch:
    try:
        with pa.ipc.open_stream(pa.py_buffer(arena.read(at, at + length))) as stream:
            batch = stream.read_next_batch()
        batch.validate(full=True)
    except (pa.ArrowException, StopIteration, OSError) as error:
        raise StorageError(f"chunks at byte {at} of {arena.path}: {error!r}", rule="what was accepted can be read") from None
    return batch


def _plain(value: pa.Scalar) -> np.ndarray:
    if isinstance(value, pa.ListScalar | pa.FixedSizeListScalar | pa.LargeListScalar):
        values: np.ndarray = value.values.to_numpy(zero_copy_only=False)
        return values
    return np.asarray(value.as_py())


def _padded(values: list[np.ndarray | None], example: np.ndarray | None) -> np.ndarray:
    """(B, ...), shorter lists padded with zeros, zeros for None; ``example`` tells the form where all are None."""
    there = [value for value in values if value is not None]
    if not there:
        there = [np.zeros(0, np.float32) if example is None else example[:0] if example.ndim else example]
    out = np.zeros((len(values), *np.max([v.shape for v in there], axis=0).astype(int)), np.result_type(*there))
    for i, value in enumerate(values):
        if value is not None:
            place: tuple[slice, ...] = (slice(i, i + 1), *(slice(n) for n in value.shape))
            out[place] = value
    return out
