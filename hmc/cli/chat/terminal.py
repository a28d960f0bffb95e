"""A line typed at a terminal: editing, history, completion and pastes of several lines, by readline
where Python has it, else bare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hmc.cli.chat.history import History

try:
    import readline
except ImportError:  # a Python built without it
    readline = None  # type: ignore[assignment]

Complete = Callable[[str], Sequence[str]]
"""What a line so far may go on as: whole last words."""


class InterruptedLine(Exception):
    """Ctrl-C while a line was typed; `empty` says that nothing stood there."""

    def __init__(self, empty: bool) -> None:
        super().__init__("interrupted")
        self.empty = empty


class Terminal:
    """Lines from the terminal that standard input and output are."""

    def __init__(self, history: History, complete: Complete, told: Callable[[str], None]) -> None:
        """`told` hears, once, that the history cannot be kept."""
        self._history: History | None = history
        self._told = told
        self._complete = complete
        self._matches: list[str] = []
        if readline is None:
            return
        bare = "libedit" in (readline.__doc__ or "")
        for setting in ("bind ^I rl_complete",) if bare else _SETTINGS:
            readline.parse_and_bind(setting)
        readline.set_auto_history(False)
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._completion)
        try:
            earlier = history.read()
        except OSError as error:
            self._forgo(error)
            return
        for text in earlier:
            readline.add_history(text)

    def line(self, prompt: str) -> str:
        """The next line; `EOFError` for Ctrl-D, `InterruptedLine` for Ctrl-C."""
        try:
            return input(prompt)
        except KeyboardInterrupt:
            print()
            raise InterruptedLine(not (readline and readline.get_line_buffer().strip())) from None

    def remember(self, text: str) -> None:
        """Put a message at the end of the history."""
        if readline is not None:
            readline.add_history(text)
        if self._history is None:
            return
        try:
            self._history.add(text)
        except OSError as error:
            self._forgo(error)

    def _forgo(self, error: OSError) -> None:
        self._history = None
        self._told(f"the history is not kept: {error}")

    def _completion(self, word: str, number: int) -> str | None:
        if number == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            self._matches = list(self._complete(line))
        return self._matches[number] if number < len(self._matches) else None


_SETTINGS = ("tab: complete", "set enable-bracketed-paste on", "set bell-style none")
