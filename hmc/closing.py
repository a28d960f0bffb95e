"""`Closing`: what is open until `close`, and may be used in a `with`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Base of everything that holds processes, threads, mappings or memory."""

    @abstractmethod
    def close(self) -> object:
        """Let go of it all; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
