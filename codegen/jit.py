"""From IR to a callable address: LLVM through llvmlite, with objects kept on disk (cache.py); hides
engines and target machines.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import binding, ir

from hmc import env
from hmc.codegen import cache
from hmc.codegen.checks import check_spec
from hmc.codegen.isa import Isa, require
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError

KERNEL_TYPE = ir.FunctionType(ir.VoidType(), [ir.IntType(64).as_pointer(), *[ir.IntType(64)] * 3])
"""`void kernel(i64* args, i64 worker, i64 workers, i64 span)`: the shares of workers `worker` to
`worker + span - 1` of `workers`."""

_DEFINITION = re.compile(r"^(define [^{\n]*)", re.MULTILINE)

_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 3)


@dataclass(frozen=True)
class Kernel:
    """A kernel that is in memory: `address` goes into program records."""

    spec: KernelSpec
    address: int

    def __call__(self, args: bytes, worker: int = 0, workers: int = 1, span: int = 1) -> None:
        """Run in the calling thread (the GIL is released); for tests and probes."""
        buffer = ctypes.create_string_buffer(args, len(args))
        _PROTOTYPE(self.address)(ctypes.addressof(buffer), worker, workers, span)


class Jit:
    """Builds kernels from an emitter table; one per process is enough (`emit` maps op to `spec ->
    IR text`).
    """

    def __init__(self, emitters: dict[str, Callable[[KernelSpec], str]]) -> None:
        self._emitters = emitters
        self._kernels: dict[KernelSpec, Kernel] = {}
        self._lock = threading.Lock()
        self._engine = _make_engine()

    def get(self, spec: KernelSpec) -> Kernel:
        """The kernel of `spec`, built or taken from the cache; `KernelError` when it cannot be
        built.

        Raises `MachineError` when this machine lacks the tier.
        """
        with self._lock:
            if spec not in self._kernels:
                require(spec.isa)
                self._kernels[spec] = Kernel(spec, self._load(spec.symbol, self.object_code(spec)))
            return self._kernels[spec]

    def ir_text(self, spec: KernelSpec) -> str:
        """LLVM IR of `spec`, before optimisation; `KernelError` for a spec without a kernel."""
        check_spec(spec)
        with env.uncollected():
            return self._emitters[spec.op](spec)

    def assembly(self, spec: KernelSpec) -> str:
        """Assembly of `spec` for the CPU its tier names: the same on every machine."""
        isa = spec.tier
        module = optimised(self.ir_text(spec), isa)
        return str(target_machine(isa).emit_assembly(module))

    def object_code(self, spec: KernelSpec) -> bytes:
        """Relocatable object of `spec`, from the disk cache when it is there."""
        isa = spec.tier
        if (kept := cache.load(spec)) is not None:
            return kept
        text = self.ir_text(spec)
        try:
            module = optimised(text, isa)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise KernelError(f"LLVM refuses kernel {spec.symbol}: {first}") from error
        code = bytes(target_machine(isa).emit_object(module))
        if env.debug_level() >= 5:
            env.debug(5, text)
        if env.debug_level() >= 6 or env.dump_dir() is not None:
            assembly = str(target_machine(isa).emit_assembly(module))
            env.debug(6, assembly)
            env.dump(f"kernels/{spec.symbol}.ll", text)
            env.dump(f"kernels/{spec.symbol}.s", assembly)
        cache.store(spec, code)
        return code

    def _load(self, symbol: str, code: bytes) -> int:
        self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        address = int(self._engine.get_function_address(symbol))
        if address == 0:
            raise KernelError(f"kernel {symbol} is not in its object: delete the cache folder")
        return address


@functools.cache
def _initialise() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()  # the pool's system calls are inline assembly


@functools.cache
def target_machine(isa: Isa) -> binding.TargetMachine:
    """Plain x86-64 with the features of `isa` and no others."""
    _initialise()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    return target.create_target_machine(
        cpu="x86-64", features=isa.features, opt=3, reloc="pic", codemodel="small"
    )


def _make_engine() -> binding.ExecutionEngine:
    _initialise()
    module = binding.parse_assembly("")
    machine = binding.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(
        opt=3, reloc="pic", codemodel="small", jit=True
    )
    return binding.create_mcjit_compiler(module, machine)


def optimised(text: str, isa: Isa) -> binding.ModuleRef:
    """The module of IR `text`, optimised for `isa`; `RuntimeError` where LLVM refuses it."""
    _initialise()
    machine = target_machine(isa)
    module = binding.parse_assembly(_DEFINITION.sub(rf'\1 "tune-cpu"="{isa.tune}"', text))
    module.triple = "x86_64-unknown-linux-gnu"
    module.data_layout = str(machine.target_data)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module
