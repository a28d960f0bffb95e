"""Kernels of AVX-512 tiers on a CPU without them: the same IR, with the instructions that have no
generic form done lane by lane, and LLVM cuts wide vectors into what there is.

What it shows is that a kernel's arithmetic, order of lanes and addresses are right; not its speed,
and not LLVM's choice of instructions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from hmc.codegen.isa import TIERS, cpu_flags
from hmc.codegen.jit import Jit, Kernel, optimised, target_machine
from hmc.codegen.spec import KernelSpec

EMULATING = os.environ.get("HMC_TEST_EMULATE") == "1"
"""Whether tests of tiers that this CPU lacks run all the same; they take minutes."""

_INTRINSIC = re.compile(r'@"(llvm\.x86\.avx512[a-z0-9]*\.[a-z0-9.]+)"')
_ROUNDED = re.compile(r"fptrunc <(\d+) x float> (\S+) to <\1 x i16>")
_HELD = re.compile(r'call (<\d+ x i32>) asm +"", "=v,0"\(<\d+ x i32> (\S+)\)')
"""`Emitter.another` of a vector, which here need not fit a register."""
_DECLARED = re.compile(r'^declare .*@"llvm\.x86\.avx512.*$', re.MULTILINE)


def new_jit(emitters: dict[str, Callable[[KernelSpec], str]]) -> Jit:
    """A `Jit`, or one that emulates."""
    return EmulatedJit(emitters) if EMULATING else Jit(emitters)


class EmulatedJit(Jit):
    """Builds every kernel for this machine's AVX2."""

    def get(self, spec: KernelSpec) -> Kernel:
        """The kernel of `spec`, whatever its tier."""
        if TIERS[spec.isa].flags <= cpu_flags():
            return super().get(spec)
        if spec not in self._kernels:
            isa = TIERS["avx2"]
            module = optimised(emulated(self.ir_text(spec)), isa)
            code = bytes(target_machine(isa).emit_object(module))
            self._kernels[spec] = Kernel(spec, self._load(spec.symbol, code))
        return self._kernels[spec]


def emulated(text: str) -> str:
    """IR `text` with AVX-512's own intrinsics replaced by functions; `KeyError` for one that has no
    replacement here.
    """
    text = text.replace("bfloat", "i16")  # or LLVM moves them about by calls of a library
    names = set(_INTRINSIC.findall(text))
    text = _DECLARED.sub("", text)
    text = _INTRINSIC.sub(lambda match: f'@"emulated.{match[1]}"', text)
    text = _HELD.sub(r"bitcast \1 \2 to \1", text)
    rounded = set(_ROUNDED.findall(text))
    text = _ROUNDED.sub(r'call <\1 x i16> @"emulated.bf16.\1"(<\1 x float> \2)', text)
    functions = [_DEFINITIONS[name](f"emulated.{name}") for name in sorted(names)]
    lanes = sorted({int(count) for count, _ in rounded})
    functions += [_to_bf16(f"emulated.bf16.{count}", count) for count in lanes]
    return "\n".join([text, *functions])


def _lane_by_lane(
    name: str, result: tuple[int, str], parameters: str, prologue: str, body: str
) -> str:
    """`define result @name(parameters)`; `body` computes `%value` of lane `%i` (i64)."""
    count, kind = result
    vector = f"<{count} x {kind}>"
    return f"""
define internal {vector} @"{name}"({parameters}) noinline {{
entry:
  %out = alloca {vector}, align 64
{prologue}
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
{body}
  %place = getelementptr {kind}, ptr %out, i64 %i
  store {kind} %value, ptr %place
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, {count}
  br i1 %more, label %loop, label %done
done:
  %all = load {vector}, ptr %out, align 64
  ret {vector} %all
}}
"""


def _kept(name: str, count: int, kind: str) -> str:
    """Parameter `%name` in memory at `%name.at`."""
    vector = f"<{count} x {kind}>"
    return (
        f"  %{name}.at = alloca {vector}, align 64\n"
        f"  store {vector} %{name}, ptr %{name}.at, align 64"
    )


def _lane(value: str, of: str, kind: str, index: str) -> str:
    return (
        f"  %{value}.p = getelementptr {kind}, ptr %{of}.at, i64 %{index}\n"
        f"  %{value} = load {kind}, ptr %{value}.p"
    )


def _permute(lanes: int, kind: str, index: str) -> Callable[[str], str]:
    """vpermw, vpermps: element `index` of the table, by the lowest bits of it."""

    def define(name: str) -> str:
        body = [
            _lane("code", "index", index, "i"),
            f"  %low = and {index} %code, {lanes - 1}",
            f"  %at = zext {index} %low to i64",
            _lane("value", "table", kind, "at"),
        ]
        prologue = [_kept("table", lanes, kind), _kept("index", lanes, index)]
        parameters = f"<{lanes} x {kind}> %table, <{lanes} x {index}> %index"
        return _lane_by_lane(name, (lanes, kind), parameters, "\n".join(prologue), "\n".join(body))

    return define


def _shuffle_bytes(name: str) -> str:
    """vpshufb: byte `index & 15` of the table's same 128 bits; 0 where the upper bit is set."""
    body = [
        _lane("code", "index", "i8", "i"),
        "  %low = and i8 %code, 15",
        "  %in = zext i8 %low to i64",
        "  %group = and i64 %i, 48",
        "  %at = or i64 %group, %in",
        _lane("found", "table", "i8", "at"),
        "  %none = icmp slt i8 %code, 0",
        "  %value = select i1 %none, i8 0, i8 %found",
    ]
    prologue = [_kept("table", 64, "i8"), _kept("index", 64, "i8")]
    parameters = "<64 x i8> %table, <64 x i8> %index"
    return _lane_by_lane(name, (64, "i8"), parameters, "\n".join(prologue), "\n".join(body))


def _permute_two(lanes: int, kind: str) -> Callable[[str], str]:
    """vpermi2b, vpermi2w: element `index` of two tables in a row, by its lowest bits."""

    def define(name: str) -> str:
        prologue = [
            _kept("index", lanes, kind),
            f"  %table.at = alloca <{2 * lanes} x {kind}>, align 64",
            f"  store <{lanes} x {kind}> %first, ptr %table.at, align 64",
            "  %second.at = getelementptr i8, ptr %table.at, i64 64",
            f"  store <{lanes} x {kind}> %second, ptr %second.at, align 64",
        ]
        body = [
            _lane("code", "index", kind, "i"),
            f"  %low = and {kind} %code, {2 * lanes - 1}",
            f"  %at = zext {kind} %low to i64",
            _lane("value", "table", kind, "at"),
        ]
        vector = f"<{lanes} x {kind}>"
        parameters = f"{vector} %first, {vector} %index, {vector} %second"
        return _lane_by_lane(name, (lanes, kind), parameters, "\n".join(prologue), "\n".join(body))

    return define


def _dot_pairs(lanes: int) -> Callable[[str], str]:
    """vdpbf16ps: the odd product is added first; subnormal inputs and results count as zero (only
    inputs here: results that small would not be seen).
    """

    def define(name: str) -> str:
        prologue = [
            _kept("total", lanes, "float"),
            _kept("left", 2 * lanes, "i16"),
            _kept("right", 2 * lanes, "i16"),
        ]
        body = ["  %even = shl i64 %i, 1", "  %odd = or i64 %even, 1"]
        body.append(_lane("sum0", "total", "float", "i"))
        for step, (place, before) in enumerate((("odd", "sum0"), ("even", "sum1"))):
            for side in ("left", "right"):
                value = f"{side}.{place}"
                body += [
                    _lane(f"{value}.bits", side, "i16", place),
                    f"  %{value}.wide = zext i16 %{value}.bits to i32",
                    f"  %{value}.up = shl i32 %{value}.wide, 16",
                    f"  %{value}.exponent = and i32 %{value}.up, 2139095040",
                    f"  %{value}.tiny = icmp eq i32 %{value}.exponent, 0",
                    f"  %{value}.kept = select i1 %{value}.tiny, i32 0, i32 %{value}.up",
                    f"  %{value} = bitcast i32 %{value}.kept to float",
                ]
            after = "value" if step else "sum1"
            body.append(
                f"  %{after} = call float @llvm.fma.f32(float %left.{place},"
                f" float %right.{place}, float %{before})"
            )
        parameters = (
            f"<{lanes} x float> %total, <{2 * lanes} x i16> %left, <{2 * lanes} x i16> %right"
        )
        return _lane_by_lane(
            name, (lanes, "float"), parameters, "\n".join(prologue), "\n".join(body)
        )

    return define


def _to_bf16(name: str, lanes: int) -> str:
    """vcvtneps2bf16: to nearest even, finite inputs."""
    words, bits = f"<{lanes} x i16>", f"<{lanes} x i32>"
    return f"""
define internal {words} @"{name}"(<{lanes} x float> %value) noinline {{
  %bits = bitcast <{lanes} x float> %value to {bits}
  %up = lshr {bits} %bits, {_splat(16, lanes)}
  %odd = and {bits} %up, {_splat(1, lanes)}
  %half = add {bits} %bits, {_splat(0x7FFF, lanes)}
  %sum = add {bits} %half, %odd
  %top = lshr {bits} %sum, {_splat(16, lanes)}
  %word = trunc {bits} %top to {words}
  ret {words} %word
}}
"""


def _two_to_bf16(name: str) -> str:
    """vcvtne2ps2bf16: the second operand is the lower half."""
    one = f"{name}.one"
    return f"""{_to_bf16(one, 16)}
define internal <32 x i16> @"{name}"(<16 x float> %high, <16 x float> %low) noinline {{
  %l = call <16 x i16> @"{one}"(<16 x float> %low)
  %h = call <16 x i16> @"{one}"(<16 x float> %high)
  %all = shufflevector <16 x i16> %l, <16 x i16> %h, <32 x i32> <{_counted(32)}>
  ret <32 x i16> %all
}}
"""


def _splat(number: int, lanes: int) -> str:
    return f"<{', '.join([f'i32 {number}'] * lanes)}>"


def _multiply_words(name: str) -> str:
    """vpmaddwd: two products of neighbouring words, added."""
    halves = [_counted(32, parity, 2) for parity in (0, 1)]
    parts = []
    for side in ("left", "right"):
        for parity, order in enumerate(halves):
            value = f"{side}{parity}"
            parts += [
                f"  %{value}.w = shufflevector <32 x i16> %{side}, <32 x i16> %{side},"
                f" <16 x i32> <{order}>",
                f"  %{value} = sext <16 x i16> %{value}.w to <16 x i32>",
            ]
    products = "\n".join(parts)
    return f"""
define internal <16 x i32> @"{name}"(<32 x i16> %left, <32 x i16> %right) noinline {{
{products}
  %even = mul <16 x i32> %left0, %right0
  %odd = mul <16 x i32> %left1, %right1
  %sum = add <16 x i32> %even, %odd
  ret <16 x i32> %sum
}}
"""


def _add_words(name: str) -> str:
    """vpdpwssd."""
    words = f"{name}.words"
    return f"""{_multiply_words(words)}
define internal <16 x i32> @"{name}"(<16 x i32> %total, <16 x i32> %l, <16 x i32> %r) noinline {{
  %left = bitcast <16 x i32> %l to <32 x i16>
  %right = bitcast <16 x i32> %r to <32 x i16>
  %sum = call <16 x i32> @"{words}"(<32 x i16> %left, <32 x i16> %right)
  %all = add <16 x i32> %total, %sum
  ret <16 x i32> %all
}}
"""


def _add_bytes(name: str) -> str:
    """vpdpbusd: four products of bytes, the left ones without a sign."""
    parts, total = [], "total"
    for byte in range(4):
        up = _splat(24 - 8 * byte, 16)
        parts += [
            f"  %l{byte}.up = shl <16 x i32> %left, {up}",
            f"  %l{byte} = lshr <16 x i32> %l{byte}.up, {_splat(24, 16)}",
            f"  %r{byte}.up = shl <16 x i32> %right, {up}",
            f"  %r{byte} = ashr <16 x i32> %r{byte}.up, {_splat(24, 16)}",
            f"  %p{byte} = mul <16 x i32> %l{byte}, %r{byte}",
            f"  %t{byte} = add <16 x i32> %{total}, %p{byte}",
        ]
        total = f"t{byte}"
    body = "\n".join(parts)
    return f"""
define internal <16 x i32> @"{name}"(<16 x i32> %total, <16 x i32> %left, <16 x i32> %right)
noinline {{
{body}
  ret <16 x i32> %{total}
}}
"""


def _counted(stop: int, start: int = 0, step: int = 1) -> str:
    return ", ".join(f"i32 {number}" for number in range(start, stop, step))


_DEFINITIONS = {
    "llvm.x86.avx512.permvar.hi.512": _permute(32, "i16", "i16"),
    "llvm.x86.avx512.permvar.qi.512": _permute(64, "i8", "i8"),
    "llvm.x86.avx512.permvar.sf.512": _permute(16, "float", "i32"),
    "llvm.x86.avx512.pshuf.b.512": _shuffle_bytes,
    "llvm.x86.avx512.vpermi2var.qi.512": _permute_two(64, "i8"),
    "llvm.x86.avx512.vpermi2var.hi.512": _permute_two(32, "i16"),
    "llvm.x86.avx512.pmaddw.d.512": _multiply_words,
    "llvm.x86.avx512.vpdpwssd.512": _add_words,
    "llvm.x86.avx512.vpdpbusd.512": _add_bytes,
    "llvm.x86.avx512bf16.cvtne2ps2bf16.512": _two_to_bf16,
    "llvm.x86.avx512bf16.dpbf16ps.128": _dot_pairs(4),
    "llvm.x86.avx512bf16.dpbf16ps.256": _dot_pairs(8),
    "llvm.x86.avx512bf16.dpbf16ps.512": _dot_pairs(16),
}
