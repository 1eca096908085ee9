"""Where a rank's rows come from: polls its shard, draws, tells the other ranks, and waits until all may go on.

    windows = supply.next(needs, step, limited=True, stop=stop, idle=idle)      # None: a rank was told to stop
    supply.feed_back(needs, windows, losses)

All ranks call these together and in step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from buffer.mixture import loss_table
from fleet.batch import BatchNeeds, Windows
from fleet.errors import NoData
from fleet.robot import Source
from learner.agree import load_sampler, sampler_states
from learner.exchange import Facts, Known, exchange
from learner.feed import Feed, no_rows
from learner.pace import Pace
from learner.ranks import Ranks

POLL_S = 0.1  # between two looks at the log
WAIT_S = 0.02  # between two looks while there is nothing to do


class BatchSource(Protocol):
    """Where batches come from: ``buffer.prefetch.Prefetcher``, or ``buffer.sampler.Sampler`` itself."""

    def poll(self) -> int: ...

    def num_steps(self, source: Source | None = None) -> int: ...

    def counts(self) -> np.ndarray:
        """Steps that can be drawn by source and task: (sources, tasks)."""
        ...

    def balance(self, counts_SKT: np.ndarray) -> None:
        """What all shards have, where there are several: (shards, sources, tasks)."""
        ...

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        """This rank's rows. Its arrays may be overwritten from the next call on."""
        ...

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None:
        """Losses of these rows for priorities, and ``buffer.mixture.loss_table`` of all ranks for adaptive mixtures."""
        ...

    def state(self) -> dict[str, Any]:
        """What draws depend on beside (seed, step, position), and up to where ``poll`` has told what came: plain data and
        numpy arrays."""
        ...

    def reads(self, state: Mapping[str, Any]) -> bool:
        """Whether a ``state`` is of the log that this reads."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Returns how many steps came since ``state`` was asked for, whatever retention took meanwhile; ``poll`` returns
        those that come from now on."""
        ...


class Supply:
    """The rows of one rank.

    Args:
        source: Reads the rank's shard.
        release: The newest release that this rank knows of; the first rank's counts.
        timed: ``Budget.timed``.

    Attributes:
        known: What all ranks knew at the last exchange.
    """

    def __init__(
        self,
        source: BatchSource,
        feed: Feed,
        ranks: Ranks,
        pace: Pace,
        release: Callable[[], int],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._source, self._feed, self._ranks, self._pace = source, feed, ranks, pace
        self._release, self._timed = release, timed
        self._polled, self._num_new = 0.0, 0
        self._counts_KT = source.counts()
        self._windows: Windows | None = None
        self._lack: NoData | None = None
        self._borrowed = False
        self._spare: tuple[BatchNeeds, Windows] | None = None  # of another rank
        self.known: Known

    def next(
        self, needs: BatchNeeds, step: int, *, limited: bool, stop: Callable[[], bool], idle: Callable[[], None]
    ) -> Windows | None:
        """Waits until the update of a step may be done, and returns this rank's rows; None when a rank was told to stop.

        Args:
            limited: Whether this phase has to keep the rate of samples per insert.
            idle: Called again and again while it waits.
        """
        while True:
            with self._timed("poll"):
                self.poll()
            held = limited and self._pace.rate_holds(self.known.num_steps, needs, step)
            self._draw(None if held else needs, step)
            known = self.exchange(stop=stop(), needs=needs)
            if known.stop:
                return None
            if known.with_batch and self._pace.too_old(known.oldest, known.release, needs):
                continue  # a release came since they were drawn
            if known.with_batch and not held:
                self._borrow(needs)
                self._pace.goes_on(needs, counted=limited)
                return self._windows
            if self._lack is not None and not held:
                self._pace.data_is_missing(self._lack, needs, known.release, step)
            idle()
            with self._timed("wait"):
                time.sleep(WAIT_S)

    def exchange(self, *, stop: bool = False, needs: BatchNeeds | None = None) -> Known:
        """Tells the other ranks what this one knows, and takes in what they say."""
        facts = Facts(self._counts_KT, stop, self._windows is not None, release=self._release(), new_steps=self._num_new)
        if self._windows is None:
            facts.wants_loan = self._spare is None or self._spare[0] != needs
        else:
            facts.versions = self._windows.version_B[self._windows.version_B >= 0]
        self._num_new = 0
        with self._timed("exchange"):
            known = self.known = exchange(self._ranks, facts)
        self._pace.inserted(known.new_steps)
        if len(known.counts_SKT) > 1:
            self._source.balance(known.counts_SKT)
        return known

    def feed_back(self, windows: Windows, loss_B: np.ndarray) -> None:
        """Gives the source the losses of its rows, and of all ranks by task and source."""
        if self._borrowed:  # steps of another shard
            windows, loss_B = no_rows(windows), loss_B[:0]
        table = loss_table(windows, loss_B, self._counts_KT.shape[1])
        self._source.feed_back(windows, loss_B, self._ranks.gather(table).sum(0))

    def states(self) -> dict[str, Any]:
        """For a checkpoint, by number of the shard; on the first rank. What came since the last exchange is new to whoever
        loads them."""
        return sampler_states(self._ranks, self._source)

    def load(self, states: Mapping[str, Any]) -> list[str]:
        """Takes what ``states`` returned; what came since is inserted. Returns the shards that nobody reads any more."""
        num_new, nobodys = load_sampler(self._ranks, self._source, states)
        self._pace.inserted(num_new)
        return nobodys

    def poll(self, force: bool = False) -> None:
        """Looks at the log, if it is time to."""
        now = time.monotonic()
        if force or now - self._polled >= POLL_S:
            self._polled = now
            self._num_new += self._source.poll()
            self._counts_KT = self._source.counts()

    def _draw(self, needs: BatchNeeds | None, step: int) -> None:
        """This rank's rows of the next batch, if it is time for one and there is data of the kind that is asked for."""
        self._windows, self._borrowed = None, False
        if needs is None:
            return
        try:
            with self._timed("sample"):
                self._feed.wait()
                windows = self._source.batch(needs, step, self.known.release or -1)
            self._windows = windows if len(windows.step_B) else None  # fewer rows than ranks
        except NoData as error:
            self._lack = error

    def _borrow(self, needs: BatchNeeds) -> None:
        """A rank that has nothing to draw takes part with the rows of another one, which count nothing: an empty shard must
        not hold the others. They are kept for the next time."""
        if self.known.wants_loan:
            lent = self._feed.lend(self._ranks, self._windows, self.known.with_batch[0])
            if self._windows is None:
                self._spare = (needs, dataclasses.replace(lent, shard_weight=0.0))
        if self._windows is None and self._spare is not None:
            self._windows, self._borrowed = self._spare[1], True
