"""When what failed is started again."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class RestartRule:
    """When something that failed is started again. No I/O: times in, pauses out.

    Args:
        max_failures, window_s: So many failures within so many seconds, none of which got any further than the one before,
            are a crash loop. The window has room for slow starts: a large policy is loaded for a minute before it fails.
        first_s, longest_s: The pause doubles from the one to the other, and starts over after a window without failure.
    """

    max_failures: int = 5
    window_s: float = 600.0
    first_s: float = 0.5
    longest_s: float = 10.0
    _failures: collections.deque[float] = dataclasses.field(default_factory=collections.deque)

    def failed(self, now_s: float, got_further: bool = False) -> float | None:
        """The pause in seconds before the next start; None when there is to be none."""
        if got_further:
            self._failures.clear()
        self._failures.append(now_s)
        while self._failures[0] <= now_s - self.window_s:
            self._failures.popleft()
        if len(self._failures) >= self.max_failures:
            return None
        return float(min(self.first_s * 2 ** (len(self._failures) - 1), self.longest_s))
