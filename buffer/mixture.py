"""SOP's mixture (arXiv 2601.03044): how much of a task's part of the batch is online data, from the losses of both sides.

    w_on = exp(a l_on) / (exp(a l_on) + exp(l_off)),  clipped to [low, high]

where l_on and l_off are means of the last ``window`` mean losses of each side. A sample's loss counts for the side that
the sample comes from, and for no other: one loss of the whole batch for both sides would fix the share.

Differs from the paper, which does not say how losses are scaled: both are divided by the mean of their absolute values,
so that alpha means the same for a loss of 1e-3 as for one of 10. Two equal losses become 1 and 1, one of 0 becomes 0
beside 2. ``share_of`` is the formula alone.

Where several ranks make a batch, each one makes the ``loss_table`` of its own rows, and the tables are added up: then all
ranks have the mean losses of the whole batch, and the same shares.

Shape suffixes: B batch, T tasks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np

from fleet.batch import Adaptive, Windows
from fleet.errors import LearnerError
from fleet.robot import Source

_Side = tuple[int, bool]  # task, whether online


def share_of(online_loss: float, offline_loss: float, adaptive: Adaptive) -> float:
    """The online share for two losses, as they are."""
    difference = adaptive.alpha * online_loss - offline_loss
    share = 1 / (1 + math.exp(-max(-500.0, min(difference, 500.0))))
    return min(max(share, adaptive.low), adaptive.high)


def loss_table(windows: Windows, loss_B: np.ndarray, num_tasks: int) -> np.ndarray:
    """Losses of windows by task and source: (num_tasks, sources, 2) float64, their sum and how many they are, both times
    the shard's weight: so means are those of the steps of all shards, however unevenly these are filled.

    Raises:
        LearnerError: A loss is not finite.
    """
    loss_B = np.asarray(loss_B, np.float64)
    if not np.isfinite(loss_B).all():
        wrong = int(np.flatnonzero(~np.isfinite(loss_B))[0])
        raise LearnerError(f"the loss of sample {windows.index_B[wrong]} of a batch is not finite", rule="losses are finite")
    cell_B = windows.task_B * len(Source) + windows.source_B
    columns = [np.bincount(cell_B, each_B, num_tasks * len(Source)) for each_B in (loss_B, np.ones(len(loss_B)))]
    return np.stack(columns, 1).reshape(num_tasks, len(Source), 2) * windows.shard_weight


class OnlineShare:
    """Mean losses by task and side, and the share that follows from them."""

    def __init__(self, adaptive: Adaptive) -> None:
        self.adaptive = adaptive
        self._losses: dict[_Side, deque[float]] = {}

    def add(self, table: np.ndarray) -> None:
        """Takes the losses of a batch: their mean by task and side is one entry of that side's window.

        Samples of sources that are on neither side do not count.

        Args:
            table: ``loss_table``, or the sum of those of all ranks.

        Raises:
            LearnerError: A sum is not finite. Nothing is changed then.
        """
        if not np.isfinite(table).all():
            raise LearnerError("a sum of losses is not finite", rule="an adaptive mixture is made from finite losses")
        for online, sources in ((True, self.adaptive.online), (False, self.adaptive.offline)):
            sums_T2 = table[:, [int(source) for source in sources]].sum(1)
            for task in np.flatnonzero(sums_T2[:, 1]).tolist():
                side = self._losses.setdefault((task, online), deque(maxlen=self.adaptive.window))
                side.append(float(sums_T2[task, 0] / sums_T2[task, 1]))

    def share(self, task: int) -> float:
        """The online part of what is drawn for a task; one half before both sides have a loss."""
        online, offline = self._losses.get((task, True)), self._losses.get((task, False))
        if not online or not offline:
            return 0.5
        online_loss, offline_loss = math.fsum(online) / len(online), math.fsum(offline) / len(offline)
        scale = (abs(online_loss) + abs(offline_loss)) / 2
        return share_of(online_loss / scale, offline_loss / scale, self.adaptive) if scale > 0 else 0.5

    def state(self) -> dict[str, np.ndarray]:
        """What ``load_state`` takes: the losses of all windows, oldest first, with task and side."""
        rows = [(task, online, loss) for (task, online), losses in sorted(self._losses.items()) for loss in losses]
        return {
            "task": np.array([task for task, _, _ in rows], np.int64),
            "online": np.array([online for _, online, _ in rows], bool),
            "loss": np.array([loss for _, _, loss in rows], np.float64),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes what ``state`` returned."""
        self._losses = {}
        rows = zip(state["task"].tolist(), state["online"].tolist(), state["loss"].tolist(), strict=True)
        for task, online, loss in rows:
            self._losses.setdefault((task, bool(online)), deque(maxlen=self.adaptive.window)).append(loss)
