"""Files written whole or not at all: beside the target, synced to disk, then renamed over it; and
the kernel's small files, read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hmc.errors import HmcError


def write_beside(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`; readers see the old file or the new one, also after a
    power cut. Raises `OSError`, and leaves nothing behind, where it cannot be written whole.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_file(
    path: str | os.PathLike[str], data: bytes | str, what: str, error: type[HmcError]
) -> None:
    """`write_beside`; `error`, naming `what` it is, where it cannot be written."""
    try:
        write_beside(path, data)
    except OSError as problem:
        reason = problem.strerror or problem
        raise error(f"cannot write {what} to {path}: {reason}") from problem


def text_of(path: Path) -> str:
    """A file of /proc or /sys; "" where there is none: /sys is partial in many containers."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def integer(path: Path) -> int | None:
    """A count that a file of /proc or /sys holds; None where there is none."""
    text = text_of(path)
    return int(text) if text.isdigit() else None
