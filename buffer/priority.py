"""Scores of steps, given by the learner: prioritized experience replay (arXiv 1511.05952).

    P(i) = p_i ** alpha / sum_k p_k ** alpha                     (eq. 1), within each leaf of ``buffer.draw``
    w_i  = (N P(i)) ** -beta / max_j w_j                         (section 3.4), j over the batch

Draws are made by rejection: a proposal is kept with the chance ``p_i ** alpha / max_k p_k ** alpha``, which must be one
(never above 1) and must not decay to nothing when scores fall. So the maximum is exact at any time: the number of steps
that have it is counted, and when the last of these gets a lower score, the maximum is looked for again. Only steps that
may be drawn count, since no other ever gets a lower score. A step that has the maximum is drawn about B / (N a) times a
batch, where a is the mean chance to be kept, and looking costs N: together B / a, as much as the proposals themselves.

Differs from the paper: a new step gets the highest score that a step has now, not the highest that one ever had; a step
with score 0 is not drawn any more, where the paper adds a constant (the caller may). Weights correct for the scores
within a leaf, not for the shares of leaves, which are asked for on purpose.

Shape suffix: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from buffer.columns import Column
from fleet.batch import Priority
from fleet.errors import LearnerError

_NEVER = -1.0  # stands for the score of a step that is not drawn


class Scores:
    """Scores by step number.

    Args:
        first: The number of the first step.
    """

    def __init__(self, priority: Priority, first: int = 0) -> None:
        self.priority = priority
        self._values = Column(np.float64, first=first)  # score ** alpha
        self._highest, self._num_highest = 1.0, 0

    @property
    def end(self) -> int:
        """The number of the next step."""
        return self._values.end

    def grow(self, drawn: np.ndarray) -> None:
        """There are more steps, (N,) bool: whether each may be drawn. Then it gets the highest score that there is, the
        first ones 1."""
        if self._highest == 0 and drawn.any():  # all others have 0, and a new step must be able to be drawn
            self._highest, self._num_highest = 1.0, 0
        self._values.extend(np.where(drawn, self._highest, _NEVER), len(drawn))
        self._num_highest += int(drawn.sum())

    def set(self, steps: np.ndarray, scores: np.ndarray) -> None:
        """Gives steps (B,) their scores (B,), at least 0. Of a step that is named twice the last score counts.

        Raises:
            LearnerError: A score is negative or not finite, or there is no such step. Nothing is changed then.
        """
        steps, scores = np.asarray(steps, np.int64), np.asarray(scores, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            values = scores**self.priority.alpha
        wrong = ~((scores >= 0) & np.isfinite(scores) & np.isfinite(values))
        if wrong.any():
            raise LearnerError(
                f"the score of step {steps[wrong][0]} is {scores[wrong][0]}",
                rule=f"scores, and their power of alpha = {self.priority.alpha:g}, are finite and at least 0",
                remedy="give the loss or the absolute TD error",
            )
        first, end = self._values.first, self.end
        if len(steps) and (steps.min() < first or steps.max() >= end):
            raise LearnerError(
                f"scores are given to steps {steps.min()} to {steps.max()}", rule=f"there are steps {first} to {end - 1}"
            )
        _, last = np.unique(steps[::-1], return_index=True)
        self._replace(steps[::-1][last], values[::-1][last])

    def drop(self, steps: np.ndarray) -> None:
        """These steps are gone: what they scored does not count for the others any more."""
        steps = np.unique(np.asarray(steps, np.int64))
        self._replace(steps, np.zeros(len(steps)))

    def move(self, steps: np.ndarray) -> None:
        """Distinct steps get new numbers, counting up from the end of all numbers so far."""
        values = self._values[steps]
        self._values.extend(values, len(values))
        self._num_highest += int((values == self._highest).sum())
        self.drop(steps)

    def release(self, first: int) -> None:
        """Lets go of all steps before ``first``."""
        if first > self._values.first:
            self.drop(np.arange(self._values.first, min(first, self.end)))
            self._values.release(first)

    def accept(self, steps: np.ndarray) -> np.ndarray:
        """The chance to keep each step when it is proposed, in [0, 1] and in proportion to score ** alpha.

        When all scores are 0, all steps are alike.
        """
        if self._highest == 0:
            return np.ones(len(steps))
        kept: np.ndarray = np.maximum(self._values[steps], 0) / self._highest
        return kept

    def weights(self, steps_B: np.ndarray) -> np.ndarray:
        """Importance weights of the steps of a batch (B,), float32; the largest is 1."""
        chance_B = self.accept(steps_B)
        if not len(chance_B) or chance_B.min() <= 0:  # not drawn by these scores: they changed since
            chance_B = np.maximum(chance_B, np.finfo(np.float64).tiny)
        weight_B: np.ndarray = (chance_B.min(initial=1.0) / chance_B) ** self.priority.beta
        return weight_B.astype(np.float32)

    def state(self) -> dict[str, Any]:
        """What ``load_state`` takes, a copy: ``first``, and the values from there on, below 0 where a step is not drawn."""
        return {"first": self._values.first, "values": self._values.view.copy()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state`` returned. Steps are numbered as they were then."""
        values = np.asarray(state["values"], np.float64)
        self._values = Column(np.float64, first=state["first"])
        self._values.extend(values, len(values))
        self._highest, self._num_highest = 1.0, 0
        self._find_highest()

    def _replace(self, steps: np.ndarray, values: np.ndarray) -> None:
        """New values of distinct steps."""
        if not len(steps):
            return
        self._num_highest -= int((self._values[steps] == self._highest).sum())
        self._values[steps] = values
        top = float(values.max())
        if top > self._highest:
            self._highest, self._num_highest = top, 0
        self._num_highest += int((values == self._highest).sum())
        if self._num_highest == 0:
            self._find_highest()

    def _find_highest(self) -> None:
        values = self._values.view
        if len(values):
            self._highest = max(float(values.max()), 0.0)
            self._num_highest = int((values == self._highest).sum())
