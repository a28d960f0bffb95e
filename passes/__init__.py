"""The compiler's passes, one a file, in the order of `PIPELINE`; a manager runs and checks them."""

from hmc.passes.canonicalise import Canonicalise
from hmc.passes.context import Context, Options, Pass
from hmc.passes.dual_batch import DualBatch
from hmc.passes.emit import Emit
from hmc.passes.expert_placement import ExpertPlacement
from hmc.passes.fp8_lowering import Fp8Lowering
from hmc.passes.fuse import Fuse
from hmc.passes.manager import run_pipeline
from hmc.passes.memory_ledger import MemoryLedger
from hmc.passes.phase_memory import PhaseMemory
from hmc.passes.stream_load import StreamLoad

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
