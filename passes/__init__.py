"""The compiler's passes, one a file, in the order of `PIPELINE`; a manager runs and checks them."""

from hmc.passes.context import Context, Options, Pass
from hmc.passes.emit.dual_batch import DualBatch
from hmc.passes.emit.emit import Emit
from hmc.passes.emit.phase_memory import PhaseMemory
from hmc.passes.graph.canonicalise import Canonicalise
from hmc.passes.graph.fuse import Fuse
from hmc.passes.graph.lower import Fp8Lowering
from hmc.passes.manager import run_pipeline
from hmc.passes.place.expert_placement import ExpertPlacement
from hmc.passes.place.memory_ledger import MemoryLedger
from hmc.passes.stream.load import StreamLoad

PIPELINE: tuple[Pass, ...] = (
    Canonicalise(),
    Fuse(),
    Fp8Lowering(),
    ExpertPlacement(),
    MemoryLedger(),
    Emit(),
    DualBatch(),
    StreamLoad(),
    PhaseMemory(),
)

__all__ = ["PIPELINE", "Context", "Options", "Pass", "run_pipeline"]
