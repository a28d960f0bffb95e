"""One check in a process with played GPUs: `python -m gpu.fake.child CHECK FILE` writes what it
found into the file, as JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from gpu.fake import checks, hooks, log


def main(name: str, target: Path) -> None:
    """Do a check. What it raises is one more statement that does not hold."""
    hooks.install()
    log.keep()
    found = []
    try:
        for statement in checks.CHECKS[name]():
            found.append(statement)
    except Exception as error:
        traceback.print_exc()
        text = f"{name}: it ends without an exception"
        found.append(checks.Statement(text, False, str(log.counts()), (checks.told(error),)))
    target.write_text(json.dumps([asdict(each) for each in found]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of what went wrong may wait for ever
