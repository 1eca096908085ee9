"""The learner of a run, kept running: its ranks are started, watched, and started again from the newest checkpoint.

When a rank is lost, all are started again on the nodes that are left; when nodes have been back for a while, the ranks
write a checkpoint and go on with more of them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleet.errors import FleetError, LearnerError
from learner.cluster.group import RankGroup
from learner.main import LEARNER_TABLES
from learner.placement import Plan
from learner.restarts import RestartRule

log = logging.getLogger("fleet.cluster")
FINAL = ("config", "policy", "run_folder", "spec", "identity")  # starting again cannot help
_PLAN_AGAIN_S = 2.0
_STOP_POLL_S = 0.02


@dataclasses.dataclass
class LearnerStatus:
    """What is known of the learner.

    ``pid``: of rank 0; 0 while it is not running (yet, or again). ``done``: it did its steps, was stopped, or gave up.
    ``restarts``: after failures. ``last_error``: of the newest failure. ``waiting``: what keeps the ranks from starting.
    ``progress``: ``learner.progress.Progress`` of rank 0 as a dict, the newest also across restarts.
    ``ranks``: ``{"rank", "node", "shard", "pid"}`` of each; ``wanted``: ranks there would be with all nodes.
    """

    pid: int = 0
    done: bool = False
    restarts: int = 0
    last_error: str = ""
    waiting: str = ""
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wanted: int = 0


class LearnerHandle:
    """Keeps the ranks of a run going. Start Ray first; ask ``poll`` a few times a second.

    Args:
        tables: ``learner.main.LEARNER_TABLES``, loaded.
        plan: Makes a plan from the nodes that are there now, as ``learner.placement.plan`` does. It is asked before every
            start, and every 2 s while ranks are missing.
        folders: The run's folder on each node, by the node's name; may be filled while this runs.
        grow_after_s: Nodes that are back for so long are used again.
        function: module:function that each rank calls as ``learner.train.train`` is called.
    """

    def __init__(
        self,
        tables: Mapping[str, Any],
        plan: Callable[[], Plan],
        folders: Mapping[str, Path],
        *,
        rule: RestartRule | None = None,
        grow_after_s: float = 10.0,
        function: str = "learner.train:train",
    ) -> None:
        self.status = LearnerStatus()
        self._tables = {name: tables[name] for name in LEARNER_TABLES}
        self._plan, self._folders, self._rule = plan, folders, rule or RestartRule()
        self._function, self._grow_after_s = function, grow_after_s
        self._group: RankGroup | None = None
        self._start_at, self._plan_at = 0.0, 0.0
        self._best = 0  # step at the failures before
        self._better_since: float | None = None
        self._regroup_by: float | None = None

    def poll(self) -> LearnerStatus:
        """The newest status; starts what is due. Never waits for the learner.

        Raises:
            FleetError: The learner cannot run: its own error, or that of a crash loop.
        """
        now = time.monotonic()
        if self.status.done:
            return self.status
        if self._group is None:
            if now >= self._start_at:
                self._start(now)
            return self.status
        group = self._group
        group.poll()
        self._show(group)
        if group.error is not None:
            self._failed(group.error, now)
        elif group.done and self._regroup_by is None:
            self._drop()
            self.status.done = True
        elif group.done or (self._regroup_by is not None and now > self._regroup_by):
            self._drop()  # the next poll starts with more ranks
        elif len(group.plan.slots) < group.plan.wanted and self._regroup_by is None and now >= self._plan_at:
            self._look_for_more(group, now)
        return self.status

    def stop(self, timeout_s: float | None = None) -> LearnerStatus:
        """Lets the ranks write a checkpoint and ends their processes; those that take longer are killed.

        Args:
            timeout_s: Default: ``learner.stop_within_s``.
        """
        group, self.status.done = self._group, True
        if group is None:
            return self.status
        deadline = time.monotonic() + (self._tables["learner"].stop_within_s if timeout_s is None else timeout_s)
        if group.begun:
            group.ask_to_stop()
            while not group.done and group.error is None and time.monotonic() < deadline:
                group.poll()
                time.sleep(_STOP_POLL_S)
            self._show(group)
            if group.error is not None:
                self.status.last_error = str(group.error)
            elif not group.done:
                self.status.last_error = "the learner did not end in time; it goes on from the checkpoint before"
        self._drop()
        return self.status

    def _start(self, now: float) -> None:
        self._start_at = now + _PLAN_AGAIN_S / 2
        try:
            plan = self._plan()
        except FleetError as error:
            self._give_up(error)
        self.status.waiting, self.status.wanted = plan.waiting, plan.wanted
        if plan.slots:
            self._group = RankGroup(self._tables, plan, self._folders, self._function)
            self._regroup_by = self._better_since = None
            self._plan_at = now + _PLAN_AGAIN_S

    def _look_for_more(self, group: RankGroup, now: float) -> None:
        """Asks for a checkpoint and a new start once a better plan has been possible for a while."""
        self._plan_at = now + _PLAN_AGAIN_S
        try:
            plan = self._plan()
        except FleetError as error:
            log.warning("no plan for more ranks: %s", error)
            return
        if not plan.better_than(group.plan):
            self._better_since = None
            return
        if self._better_since is None:
            self._better_since = now
        if now - self._better_since >= self._grow_after_s and group.begun:
            log.info("the learner starts again with %d instead of %d ranks", len(plan.slots), len(group.plan.slots))
            self._regroup_by = now + self._tables["learner"].stop_within_s
            group.ask_to_stop()

    def _show(self, group: RankGroup) -> None:
        # While new ranks begin, the numbers of those before them are shown, and that nobody trains.
        self.status.pid, self.status.waiting = group.pids[0] if group.report else 0, group.waiting
        self.status.progress = group.report or self.status.progress
        self.status.ranks = [
            {"rank": rank, "node": slot.node.name, "shard": slot.shard, "pid": group.pids[rank]}
            for rank, slot in enumerate(group.plan.slots)
        ]

    def _failed(self, error: FleetError, now: float) -> None:
        self._drop()
        if error.code in FINAL:
            self._give_up(error)
        step = self.status.progress.get("step", 0)
        got_further, self._best = step > self._best, max(step, self._best)
        pause_s = self._rule.failed(now, got_further)
        self.status.last_error = str(error)
        if pause_s is None:
            rule = self._rule
            self._give_up(
                LearnerError(
                    f"the learner failed {rule.max_failures} times at or before step {self._best}, last: {error.what}",
                    rule=error.rule or "a learner that cannot run is not started for ever",
                    remedy=error.remedy or "see logs/learner-rank*.log",
                )
            )
        log.warning("the learner failed and is started again in %.1f s: %s", pause_s, error)
        self.status.restarts += 1
        self._start_at = now + (pause_s or 0.0)

    def _give_up(self, error: FleetError) -> None:
        self.status.last_error, self.status.done = str(error), True
        raise error

    def _drop(self) -> None:
        if self._group is not None:
            self._group.kill()
        self._group, self._start_at = None, 0.0
        self._regroup_by = self._better_since = None
        self.status.pid, self.status.ranks = 0, []
