"""The compiler's passes, one a file, in two pipelines; a manager runs and checks them.

`GRAPH` rewrites the traced graph of blocks, `emit` makes a plan of it, `PLAN` rewrites that. Each
pass takes what those before it made; records.py has what the stages hand each other.
"""

from hmc.passes.emit.dual_batch import DualBatch
from hmc.passes.graph.canonicalise import Canonicalise
from hmc.passes.graph.fuse import Fuse
from hmc.passes.graph.lower import Lower
from hmc.passes.place.decode_attention import DecodeAttention
from hmc.passes.place.expert_placement import ExpertPlacement
from hmc.passes.place.lm_head import LmHead
from hmc.passes.place.memory import Memory
from hmc.passes.records import GraphPass, PlanPass
from hmc.passes.stream.load import StreamLoad

GRAPH: tuple[GraphPass, ...] = (Canonicalise(), Fuse(), Lower())
PLAN: tuple[PlanPass, ...] = (
    ExpertPlacement(),
    DualBatch(),
    StreamLoad(),
    DecodeAttention(),
    LmHead(),
    Memory(),
)

__all__ = ["GRAPH", "PLAN"]
