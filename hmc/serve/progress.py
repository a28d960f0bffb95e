"""How loading a plan goes on, in lines for the operator."""

from __future__ import annotations

import time

from hmc.serve.log import say

_SECONDS = 1.0
_SHARES = 10


class Progress:
    """Told what is done of how much; says a line for every tenth of a step, none in the first
    second and at most one a second.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._what, self._done, self._total = "", 0, 1
        self._tenth = 0
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total`, in any unit, of the step `what`."""
        if what != self._what:
            self._tenth = 0
        self._what, self._done, self._total = what, done, max(total, 1)
        tenth, now = int(_SHARES * self.share), time.monotonic()
        if tenth > self._tenth and now - self._said >= _SECONDS:
            self._tenth, self._said = tenth, now
            say(self.told)

    @property
    def share(self) -> float:
        """What is done of the step under way, 0..1."""
        return min(1.0, self._done / self._total)

    @property
    def told(self) -> str:
        """It in words."""
        step = f": {self._what} {self.share:.0%}" if self._what else ""
        return f"{self._name} is loading{step}"
