"""Whether a step hangs."""

from __future__ import annotations


class StepWatch:
    """Told the age of the step under way every `period` seconds or so. It counts only time in which
    it was told: a process that was stopped (SIGSTOP, a suspended machine) does not hang.
    """

    def __init__(self, limit: float, period: float) -> None:
        self._limit, self._most = limit, 2 * period
        self._age = self._seen = 0.0
        self._last: float | None = None

    def hangs(self, age: float, now: float) -> bool:
        """Whether the step that is `age` seconds old has run for longer than the limit; `now` in
        seconds, by the same clock.
        """
        passed = 0.0 if self._last is None else now - self._last
        same = age >= self._age > 0
        self._seen = self._seen + min(passed, self._most) if same else min(age, self._most)
        self._age, self._last = age, now
        return min(age, self._seen) > self._limit
