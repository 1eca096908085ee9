"""A batch cut into the minibatches that a part asks for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from algorithms.base import Batch, Part
from fleet.errors import LearnerError
from learner.engine import take_rows


def minibatches(batch: Batch, part: Part) -> Iterator[tuple[Tensor, Batch]]:
    """Rows of this rank by number of their minibatch, and the minibatch; see ``Part``. Every rank yields as many.

    Raises:
        LearnerError: A minibatch has no row on this rank.
    """
    if part.minibatches == 1:
        yield torch.arange(len(batch.step_B)), batch
        return
    number_B = batch.index_B % part.minibatches
    for number in range(part.minibatches - part.updates if part.updates else 0, part.minibatches):
        rows_N = torch.nonzero(number_B == number)[:, 0]
        if len(rows_N) == 0:
            raise LearnerError(
                f"a batch with {len(batch.step_B)} rows on this rank is cut into {part.minibatches} minibatches",
                rule="each minibatch has a row on every rank",
                remedy="a larger batch_size, fewer updates a step, or fewer ranks",
            )
        yield rows_N.cpu(), take_rows(batch, rows_N)
