"""The prefill process (runtime/prefill/child.py), told of the op first."""

from __future__ import annotations

import sys

from running import registered

from hmc.runtime.prefill.child import main

if __name__ == "__main__":
    with registered():
        sys.exit(main(sys.argv[1:]))
