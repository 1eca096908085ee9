"""Flow control of the learner in two numbers: updates for each new step of data, and slack."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Pace:
    """Holds the learner back when it runs ahead of the data.

    Args:
        max_updates_per_step: Updates allowed for each step that came since the online part of the run began; 0: no limit.
        slack: Updates that it may be ahead, so that robots that come and go do not make it stutter.
    """

    max_updates_per_step: float
    slack: int
    first_update: int = 0
    first_num_steps: int = 0

    def begin(self, update: int, num_steps: int) -> None:
        """The online part begins at this update, with this many steps in the buffer."""
        self.first_update, self.first_num_steps = update, num_steps

    def waits_for(self, update: int, num_steps: int) -> str | None:
        """What the next update has to wait for, in words; None when it may be done."""
        if self.max_updates_per_step <= 0:
            return None
        new_steps = max(num_steps - self.first_num_steps, 0)
        allowed = int(self.max_updates_per_step * new_steps) + self.slack
        if update - self.first_update < allowed:
            return None
        return (
            f"the learner waits for robots: update {update} needs more than the {new_steps} new steps in the buffer "
            f"(max_updates_per_step {self.max_updates_per_step:g}, slack {self.slack})"
        )
