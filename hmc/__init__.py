"""hmc, the hybrid MoE compiler: a checkpoint becomes an inspectable plan, and the plan writes
tokens.

    plan = hmc.compile("model/")
    save_plan(plan, "plan.hmp")                       # hmc.load_plan("plan.hmp")
    with hmc.Engine(plan) as engine:
        print(engine.generate("In the beginning", max_new_tokens=40).text)

Names are loaded on first use, so that `import hmc` costs nothing and never loads torch by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hmc.version import VERSION as __version__

if TYPE_CHECKING:
    from hmc.compiler import compile
    from hmc.plan import Plan, load_plan, save_plan
    from hmc.runtime.engine import Engine

__all__ = ["Engine", "Plan", "__version__", "compile", "load_plan", "save_plan"]

_HOMES = {
    "compile": "hmc.compiler",
    "Engine": "hmc.runtime.engine",
    "Plan": "hmc.plan",
    "load_plan": "hmc.plan",
    "save_plan": "hmc.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hmc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
