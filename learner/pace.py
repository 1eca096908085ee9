"""What the next update waits for: the one place where the learner is held, and the one line that says by what.

Three things can hold it, never a particular robot: samples per insert (``buffer.rate``), that there is no data of the kind
that the algorithm asks for, and that all of it is older than the algorithm allows (``Filter.max_version_age``). Robots are
never held. Everything here follows from what all ranks know alike, so ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from buffer.rate import RateLimiter, State
from fleet.batch import BatchNeeds
from fleet.errors import NoData

NOBODY = "nobody waits"


class Pace:
    """Holds the learner, and says so.

    Args:
        limiter: Samples per insert.
        write: ``Journal.write``, of one rank only.

    Attributes:
        waiting: What is waited for, in detail; "" where nothing is.
        line: Always one line: who waits for what, or who is ahead.
    """

    def __init__(self, limiter: RateLimiter, write: Callable[..., None]) -> None:
        self._limiter, self._write = limiter, write
        self._lacks_data = False
        self.waiting, self.line = "", NOBODY

    def begin(self) -> None:
        """A phase begins: its rate is counted from here on."""
        self._limiter.begin()

    def inserted(self, num_steps: int) -> None:
        """So many steps came, to all shards together."""
        self._limiter.insert(num_steps)

    def rate_holds(self, num_steps: int, needs: BatchNeeds, step: int) -> bool:
        """Whether the next batch has to wait for new steps.

        Args:
            num_steps: In the buffer.
        """
        why = self._limiter.wait_for(num_steps, needs.batch_size)
        for fields in self._limiter.news():
            self._write("rate", step=step, **fields)
        if why is None:
            return False
        self.waiting = why
        self.line = why.removeprefix("the ")
        if num_steps >= self._limiter.min_size_to_sample:
            missing = needs.batch_size - self._limiter.error_buffer - self._limiter.cursor
            self.line = f"learner waits for robots: {math.ceil(missing / self._limiter.samples_per_insert):,} more steps"
        return True

    def too_old(self, oldest: int, release: int, needs: BatchNeeds) -> bool:
        """Whether a batch has steps that are older than the algorithm allows.

        Args:
            oldest: Releases since its oldest step.
            release: The newest one; 0 where none is out, then the sampler goes by the newest version in the log.
        """
        bound = needs.filter.max_version_age
        return bound is not None and release > 0 and oldest > bound

    def data_is_missing(self, error: NoData, needs: BatchNeeds, release: int, step: int) -> None:
        """No rank has a batch of the kind that is asked for.

        Args:
            error: What the sampler said.
            release: The newest one.
        """
        why = f"the learner waits for data: {error.what}"
        age = needs.filter.max_version_age
        if age is not None:
            why += f"; steps may be at most {age} releases old, the newest release is {release}"
        self.waiting, self.line = why, why.removeprefix("the ")
        if not self._lacks_data:
            self._lacks_data = True
            self._write("waiting", why=why, step=step)

    def goes_on(self, needs: BatchNeeds, *, counted: bool) -> None:
        """A batch is trained on.

        Args:
            counted: Whether the rate limits this phase.
        """
        self._limiter.sample(needs.batch_size)
        self.waiting, self._lacks_data = "", False
        ahead = counted and self._limiter.state is State.ROBOTS_AHEAD
        self.line = f"robots are ahead by {self._limiter.cursor:,.0f} windows; {NOBODY}" if ahead else NOBODY

    def counts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._limiter.counts()

    def load(self, counts: Mapping[str, Any]) -> None:
        """Goes on from ``counts()``."""
        self._limiter.load(counts)
