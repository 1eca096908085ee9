"""A scripted operator that takes over by a rule a person beside the robot could apply.

It watches one robot and compares what the policy is about to do with what it would do itself. When the two differ
by more than ``gate_distance`` on average over ``window`` ticks, it takes over ``reaction_s`` later; meanwhile the policy goes
on acting. It never sees a reward or whether the episode will succeed. What it models: being late, a bounded working time,
unsteady hands. What it leaves out: watching several robots at once, and being wrong about the task.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from actors.operators.experts import Expert, make_expert
from fleet.errors import RobotError
from fleet.robot import Observation, Takeover

MODES = ("gate", "demonstrate", "off")
KEEPS = ("episode", "steps")


class ScriptedOperator:
    """Implements ``fleet.robot.Operator``.

    Args:
        expert: A key of ``actors.operators.experts.EXPERTS``, "module:Class", or an expert.
        operator_id: Who is recorded as acting.
        control_hz: Rate of the control loop; turns ``reaction_s`` into ticks.
        mode: "gate": the rule above. "demonstrate": acts from the first tick of each episode. "off": never acts.
        window: Ticks over which the distance is averaged. A tick without a proposal does not count.
        gate_distance: L2 distance between the two actions, in the action's units, above which it takes over.
        reaction_s: Time in seconds from noticing to acting. Once it has noticed it will act, even if the policy recovers.
        keep: "episode": keeps control to the episode's end. "steps": hands back after ``keep_steps`` and watches again.
        keep_steps: Ticks of control for keep="steps".
        budget_steps: Steps that it can act in all, over all episodes; then the robot goes on alone. None: no limit.
        task_budget_steps: Steps that it can act in each task, so that one long task does not take all of its time.
        action_noise: Standard deviation of Gaussian noise on its own actions, in the action's units.
        seed: Of that noise.
    """

    def __init__(
        self,
        *,
        expert: str | Expert,
        operator_id: str = "scripted",
        control_hz: float = 20.0,
        mode: str = "gate",
        window: int = 5,
        gate_distance: float = 0.5,
        reaction_s: float = 0.0,
        keep: str = "episode",
        keep_steps: int = 30,
        budget_steps: int | None = None,
        task_budget_steps: int | None = None,
        action_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if mode not in MODES or keep not in KEEPS:
            raise RobotError(f"operator has mode {mode!r}, keep {keep!r}", rule=f"mode in {MODES}, keep in {KEEPS}")
        budgets = [budget for budget in (budget_steps, task_budget_steps) if budget is not None]
        if window < 1 or keep_steps < 1 or any(budget < 0 for budget in budgets):
            raise RobotError(
                f"operator has window {window}, keep_steps {keep_steps}, budgets {budgets}",
                rule="window and keep_steps at least 1, budgets at least 0 or none",
            )
        if not (control_hz > 0 and gate_distance >= 0 and reaction_s >= 0 and action_noise >= 0):
            raise RobotError(
                f"operator has control_hz {control_hz}, gate_distance {gate_distance}, "
                f"reaction_s {reaction_s}, noise {action_noise}",
                rule="control_hz above 0, the others not negative",
            )
        self._expert = make_expert(expert) if isinstance(expert, str) else expert
        self._operator_id, self._mode = operator_id, mode
        self._gate_distance = gate_distance
        self._reaction_ticks = round(reaction_s * control_hz)
        self._keep_ticks = keep_steps if keep == "steps" else None
        self._budget_steps, self._task_budget_steps, self._action_noise = budget_steps, task_budget_steps, action_noise
        self._rng = np.random.default_rng(seed)
        self._distances: deque[float] = deque(maxlen=window)
        self._wait_ticks: int | None = None  # ticks until it acts, None while it only watches
        self._held_ticks: int | None = None  # ticks that it has been in control, None while it is not
        self._task = ""
        self._task_steps: Counter[str] = Counter()
        self.num_steps = 0  # acted in all
        self.num_takeovers = 0

    def reset(self, task: str, seed: int | None) -> None:
        self._expert.reset(task)
        self._task = task
        self._watch()

    def poll(self, obs: Observation, proposed: np.ndarray | None) -> Takeover | None:
        if self._mode == "off" or self._spent:
            return None
        action = self._expert.action(obs)
        if self._held_ticks is not None and self._held_ticks == self._keep_ticks:
            self._watch()
        if self._held_ticks is None and not self._starts(action, proposed):
            return None
        if self._held_ticks is None:
            self._held_ticks = 0
            self.num_takeovers += 1
        self._held_ticks += 1
        self.num_steps += 1
        self._task_steps[self._task] += 1
        if self._action_noise:
            action = action + self._rng.normal(0.0, self._action_noise, action.shape).astype(np.float32)
        return Takeover(action, self._operator_id)

    @property
    def _spent(self) -> bool:
        """Whether its time is up, in all or for this task."""
        in_all = self._budget_steps is not None and self.num_steps >= self._budget_steps
        return in_all or (self._task_budget_steps is not None and self._task_steps[self._task] >= self._task_budget_steps)

    def _watch(self) -> None:
        self._distances.clear()
        self._wait_ticks = self._held_ticks = None

    def _starts(self, action: np.ndarray, proposed: np.ndarray | None) -> bool:
        """Whether it takes control at this tick."""
        if self._mode == "demonstrate":
            return True
        if self._wait_ticks is None:
            if proposed is not None:
                self._distances.append(float(np.linalg.norm(action - proposed)))
            full = len(self._distances) == self._distances.maxlen
            if not full or sum(self._distances) / len(self._distances) <= self._gate_distance:
                return False
            self._wait_ticks = self._reaction_ticks
        self._wait_ticks -= 1
        return self._wait_ticks < 0
