import numpy as np
import pytest

from hmc.bench.bandwidth import SWEEP, StreamingRead, Variant, dot_peak
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.kernels.probes.stream import PAGES, SPLIT
from hmc.runtime.host.pool import Pool

SOME = (Variant(1, 0, SPLIT, False), Variant(2, 4096, PAGES, True), Variant(8, 512, SPLIT, True))


def test_the_sweep_covers_what_matters() -> None:
    assert len(set(SWEEP)) == len(SWEEP)
    assert {variant.streams for variant in SWEEP} == {1, 2, 4, 8}
    assert {variant.order for variant in SWEEP} == {SPLIT, PAGES}
    assert {variant.huge for variant in SWEEP} == {False, True}
    assert {0, 16384} <= {variant.prefetch for variant in SWEEP}
    assert str(SOME[1]) == "2 streams, prefetch 4096, pages, 2 MiB pages"


def test_rates_of_every_variant() -> None:
    jit, isa = Jit(EMITTERS), best_isa()
    with Pool(jit, isa, 2) as pool:
        rates = StreamingRead(pool, jit, isa, (4 << 20) + 64).sweep(SOME, repetitions=3)
        assert rates.keys() == set(SOME)
        assert all(rate > 1e6 for rate in rates.values())


def test_the_reference_reads_the_bytes_it_is_given() -> None:
    jit, isa = Jit(EMITTERS), best_isa()
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    with Pool(jit, isa, 2) as pool:
        reader = StreamingRead(pool, jit, isa, 1 << 20)
        for variant in SOME:
            assert reader.once_over(variant, data.ctypes.data, data.size) > 1e6
            assert np.bitwise_xor.reduce(reader.sinks) == np.bitwise_xor.reduce(data.view(np.int64))
            assert reader.once(variant) > 1e6
            assert np.bitwise_xor.reduce(reader.sinks) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_dot_peak_is_a_plausible_rate(threads: int) -> None:
    jit, isa = Jit(EMITTERS), best_isa()
    with Pool(jit, isa, threads) as pool:
        assert 1e9 < dot_peak(pool, jit, isa, repetitions=3) < 1e13
