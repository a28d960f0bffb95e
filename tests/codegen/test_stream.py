import re

import numpy as np
import pytest
from kernel_meanings import dot_peak, stream_fill, stream_read

from hmc.codegen.arguments import pack
from hmc.codegen.isa import TIERS, cpu_flags
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.kernels.probes.peak import dot_peak_flops
from hmc.codegen.kernels.probes.stream import PAGES, SPLIT
from hmc.codegen.spec import KernelSpec

JIT = Jit(EMITTERS)
HERE = [name for name, tier in TIERS.items() if tier.flags <= cpu_flags()]


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("order", [SPLIT, PAGES])
def test_every_byte_is_read_once(isa: str, streams: int, order: int) -> None:
    tile = {"order": order, "prefetch": 4096 if streams == 2 else 0}
    kernel = JIT.get(KernelSpec.of("stream_read", isa, streams=streams, tile=tile))
    rng = np.random.default_rng(streams)
    for size in (0, 1, 63, 4095, 4096, 4097, 12345, 17 * 4096 + 3):
        data = rng.integers(0, 256, size + 3, np.uint8)[3:]
        for workers in (1, 3):
            sink = np.full(workers + 1, 99, np.int64)
            args = pack("stream_read", base=data.ctypes.data, size=size, sink=sink.ctypes.data)
            for worker in range(workers):
                kernel(args, worker, workers)
            assert np.bitwise_xor.reduce(sink[:-1]) == stream_read(data)
            assert sink[-1] == 99


@pytest.mark.parametrize("isa", HERE)
def test_fill_writes_every_word(isa: str) -> None:
    kernel = JIT.get(KernelSpec.of("stream_fill", isa))
    for size in (0, 8, 72, 4096, 3 * 4096 + 8):
        memory = np.full(size // 8 + 2, 5, np.int64)
        args = pack("stream_fill", base=memory.ctypes.data + 8, size=size, value=-7)
        for worker in range(3):
            kernel(args, worker, 3)
        expected = stream_fill(size, -7)
        np.testing.assert_array_equal(memory[1:-1], expected)
        assert (memory[0], memory[-1]) == (5, 5)


@pytest.mark.parametrize("isa", HERE)
def test_peak_really_does_its_rounds(isa: str) -> None:
    kernel = JIT.get(KernelSpec.of("dot_peak", isa))
    sink = np.zeros(3, np.float32)
    for rounds in (0, 1, 7):
        for worker in range(3):
            kernel(pack("dot_peak", rounds=rounds, sink=sink.ctypes.data), worker, 3)
            assert sink[worker] == dot_peak(kernel.spec, rounds, worker)


@pytest.mark.parametrize(
    ("isa", "instruction", "register"),
    [("avx512_bf16", "vdpbf16ps", "zmm"), ("avx512", "vfmadd", "zmm"), ("avx2", "vfmadd", "ymm")],
)
def test_peak_stays_in_registers(isa: str, instruction: str, register: str) -> None:
    spec = KernelSpec.of("dot_peak", isa)
    lines = [line.strip() for line in JIT.assembly(spec).splitlines()]
    adds = [line for line in lines if line.startswith(instruction) and register in line]
    assert not [line for line in adds if "(" in line]
    lanes, pairs = TIERS[isa].lanes, 2 if isa == "avx512_bf16" else 1
    assert len(adds) * lanes * 2 * pairs == dot_peak_flops(spec)
    accumulators = {line.rsplit(", ", 1)[1] for line in adds}
    assert len(accumulators) >= 10


def test_the_read_loop_is_loads_and_prefetches() -> None:
    spec = KernelSpec.of("stream_read", "avx512_bf16", streams=8, tile={"prefetch": 8192})
    text = JIT.assembly(spec)
    assert len(re.findall(r"\tv\w+\t.*\(%r\w+,%r\w+\), .*%zmm", text)) >= 8 * 4
    assert "prefetchnta" in text
    assert not re.search(r"\(%rsp.*%zmm", text), "an accumulator is spilled"
    plain = JIT.assembly(KernelSpec.of("stream_read", "avx512_bf16", streams=8))
    assert "prefetch" not in plain
