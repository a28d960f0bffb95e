"""The process that renders chat templates (`runtime/tokens/rendering.py` says why there is one).

python -m hmc.runtime.tokens.child SETUP SOCKET
"""

from __future__ import annotations

import queue
import resource
import sys
from functools import lru_cache

import jinja2

from hmc.runtime.children import adopted
from hmc.runtime.tokens.rendering import Ask, Told
from hmc.runtime.tokens.sandbox import described, environment

_MOST_BYTES = 1 << 30
"""The address space of the process; Python takes 50 MB of it."""
_MOST_CHARACTERS = 1 << 25
_TEMPLATES = 8
_HERE = " for these messages"


def main(arguments: list[str]) -> None:
    """Answer every `Ask` with a `Told`, until the parent is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, parent = adopted(arguments)
    asked: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    # The thread that listens ends the process when its parent has gone, whatever a template does.
    parent.listen(asked.put)
    parent.send("ready")
    while True:
        parent.send(_answer(asked.get()))


def _answer(ask: Ask) -> Told:
    try:
        text = _compiled(ask.source, ask.mark).render(ask.names)
    except MemoryError:
        return Told(None, f"the chat template takes more than {_MOST_BYTES >> 20} MiB{_HERE}")
    except Exception as error:  # whatever it is, it comes of the template or of its data
        return Told(None, described(error))
    if len(text) > _MOST_CHARACTERS:
        return Told(
            None, f"the chat template writes more than {_MOST_CHARACTERS} characters{_HERE}"
        )
    return Told(text, "")


@lru_cache(_TEMPLATES)
def _compiled(source: str, mark: str) -> jinja2.Template:
    return environment(mark).from_string(source)


if __name__ == "__main__":
    main(sys.argv[1:])
