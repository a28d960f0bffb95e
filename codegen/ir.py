"""Helpers that make llvmlite emitters read like the loops they emit; hides pointer casts, blocks
and phi-free loops.

Constants are made once a process: kernels are mostly written in constant vectors, and llvmlite
takes as long to write one as an instruction. Loop variables and accumulators live in entry-block
allocas; LLVM's mem2reg turns them into registers, so emitters never write a phi. Vectors are
`<n x T>`; LLVM splits those wider than the tier's registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from llvmlite import ir

from hmc.codegen.arguments import ARGS
from hmc.codegen.jit import KERNEL_TYPE
from hmc.codegen.spec import KernelSpec

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

Value = Any  # llvmlite values are untyped


class BF16Type(ir.types.Type):  # type: ignore[misc]
    """`bfloat`, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BF16Type)

    def __hash__(self) -> int:
        return hash("bfloat")


BF16 = BF16Type()


@cache
def vec(element: Any, count: int) -> ir.VectorType:
    """`<count x element>`."""
    return ir.VectorType(element, count)


@lru_cache(typed=True)
def const(value: int) -> ir.Constant:
    """An i64 constant."""
    return ir.Constant(I64, value)


def fconst(value: float) -> ir.Constant:
    """An f32 constant."""
    return ir.Constant(F32, value)


def lanes_mask(numbers: Sequence[int]) -> ir.Constant:
    """A shuffle mask."""
    return _lanes_mask(tuple(numbers))


@cache
def _lanes_mask(numbers: tuple[int, ...]) -> ir.Constant:
    return ir.Constant(vec(I32, len(numbers)), [ir.Constant(I32, number) for number in numbers])


@cache
def undefined(element: Any, count: int) -> ir.Constant:
    """The vector that a shuffle with one source, or the first insertion, starts from."""
    return ir.Constant(vec(element, count), ir.Undefined)


@cache
def zeros(element: Any, count: int) -> ir.Constant:
    """A zero vector."""
    return ir.Constant(vec(element, count), None)


class Emitter:
    """One kernel function under construction: `e.b` is the llvmlite builder, `e.arg["x"]` the
    loaded arguments.

    `ptr` arguments arrive as i8*, `int` as i64, `f32` as float; `e.lanes` f32 are a vector of the
    tier. `e.worker`, `e.workers` and `e.span` are i64: the call does the shares of workers `worker`
    to `worker + span - 1`. Only kernels whose records are cut in pieces see a span other than 1,
    and those use `split`.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.tier = spec.tier
        self.lanes = self.tier.lanes
        self.module = ir.Module(name=spec.symbol)
        self._open(KERNEL_TYPE, spec.symbol)
        block, self.worker, self.workers, self.span = self.function.args
        self.arg: dict[str, Value] = {}
        for index, arg in enumerate(ARGS[spec.op]):
            word = self.b.load(self.b.gep(block, [const(index)]), name=arg.name)
            if arg.kind == "ptr":
                word = self.b.inttoptr(word, I8.as_pointer())
            elif arg.kind == "f32":
                word = self.b.bitcast(self.b.trunc(word, I32), F32)
            self.arg[arg.name] = word

    def finish(self) -> str:
        """Close the function and return the module's IR text."""
        self._close()
        return str(self.module)

    def _open(self, kind: ir.FunctionType, name: str) -> None:
        """Begin a function: locals go to its first block, code to those after it."""
        self.function = ir.Function(self.module, kind, name=name)
        self.function.attributes.add("nounwind")
        self._entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.function.append_basic_block("body"))

    def _close(self) -> None:
        self.b.ret_void()
        ir.IRBuilder(self._entry).branch(self.function.blocks[1])

    @contextmanager
    def subroutine(self, name: str, *kinds: Any) -> Iterator[tuple[Value, ...]]:
        """Emit `void name(kinds...)`, private to the module and never inlined; yields its
        parameters.

        Inside, `e.b`, `e.local` and the loops build the subroutine; `e.arg`, `e.worker` and
        `e.workers` belong to the kernel and must not be used. `run` calls it.
        """
        outer = self.function, self._entry, self.b
        self._open(ir.FunctionType(ir.VoidType(), list(kinds)), name)
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        yield tuple(self.function.args)
        self._close()
        self.function, self._entry, self.b = outer

    def run(self, name: str, *values: Value) -> None:
        """Call a subroutine."""
        self.b.call(self.module.globals[name], values)

    @contextmanager
    def given(self, **values: Value) -> Iterator[None]:
        """Within it arguments are `values` instead."""
        outer = self.arg
        self.arg = outer | values
        yield
        self.arg = outer

    @contextmanager
    def alone(self, **values: Value) -> Iterator[None]:
        """Within it the code of another kernel may be emitted, which this worker computes alone,
        with these arguments.
        """
        outer = self.worker, self.workers, self.span
        self.worker, self.workers, self.span = const(0), const(1), const(1)
        with self.given(**values):
            yield
        self.worker, self.workers, self.span = outer

    # -- control flow ------------------------------------------------------------------------------

    def local(self, kind: Any, initial: Value | None = None, count: int = 1) -> Value:
        """A stack slot (an array of `count`) in the entry block, promoted to a register where
        possible.
        """
        slot = ir.IRBuilder(self._entry).alloca(kind, const(count) if count != 1 else None)
        if initial is not None:
            self.b.store(initial, slot)
        return slot

    def buffer(self, kind: Any, count: int) -> Value:
        """A stack array on a cache line boundary."""
        slot = self.local(kind, count=count)
        slot.align = 64
        return slot

    def load_int(self, base: Value, index: Value, align: int = 1) -> Value:
        """Element `index` of an array of i32 at `base`, as i64."""
        return self.b.sext(self.load(base, index, I32, align), I64)

    def store_int(self, value: Value, base: Value, index: Value, align: int = 1) -> None:
        """Store an i64 as element `index` of an array of i32 at `base`."""
        self.store(self.b.trunc(value, I32), base, index, align)

    @contextmanager
    def for_range(self, start: Value, stop: Value, step: int | Value = 1) -> Iterator[Value]:
        """`for i in range(start, stop, step)` over i64; yields i. `step` must be positive."""
        step = const(step) if isinstance(step, int) else step
        start = const(start) if isinstance(start, int) else start
        stop = const(stop) if isinstance(stop, int) else stop
        slot = self.local(I64, start)
        head = self.function.append_basic_block("loop")
        body = self.function.append_basic_block("loop.body")
        done = self.function.append_basic_block("loop.done")
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.load(slot)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, done)
        self.b.position_at_end(body)
        yield index
        self.b.store(self.b.add(index, step), slot)
        self.b.branch(head)
        self.b.position_at_end(done)

    @contextmanager
    def forever(self) -> Iterator[ir.Block]:
        """A loop that ends by `leave_if`; yields the block behind it."""
        head, done = (self.b.append_basic_block(f"forever.{name}") for name in ("head", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        yield done
        self.b.branch(head)
        self.b.position_at_end(done)

    def leave_if(self, condition: Value, block: ir.Block) -> None:
        """Go on in `block` if the i1 `condition` holds, else here."""
        here = self.b.append_basic_block("here")
        self.b.cbranch(condition, block, here)
        self.b.position_at_end(here)

    def in_vectors(self, count: Value, width: int) -> Iterator[tuple[Value, int]]:
        """Cover `count` items by vectors of `width` and then one by one: yields (index, width) and
        (index, 1).

        For use in a plain `for`: its body is emitted twice, once inside each of the two loops.
        """
        whole = self.b.sub(count, self.b.and_(count, const(width - 1)))
        with self.for_range(0, whole, width) as index:
            yield index, width
        with self.for_range(whole, count) as index:
            yield index, 1

    def split(self, total: Value, multiple: int = 1) -> tuple[Value, Value]:
        """This call's share [start, stop) of `total` items, in whole groups of `multiple` (the
        last may be ragged).
        """
        b = self.b
        groups = b.sdiv(b.add(total, const(multiple - 1)), const(multiple))
        first = b.sdiv(b.mul(groups, self.worker), self.workers)
        last = b.sdiv(b.mul(groups, b.add(self.worker, self.span)), self.workers)
        return (
            self.minimum(b.mul(first, const(multiple)), total),
            self.minimum(b.mul(last, const(multiple)), total),
        )

    def minimum(self, left: Value, right: Value) -> Value:
        """Signed minimum of two i64."""
        return self.b.select(self.b.icmp_signed("<", left, right), left, right)

    def maximum(self, left: Value, right: Value) -> Value:
        """Signed maximum of two i64."""
        return self.b.select(self.b.icmp_signed("<", left, right), right, left)

    def positive(self, value: Value) -> Value:
        """An i64, 0 where it is negative."""
        return self.b.select(self.b.icmp_signed("<", value, const(0)), const(0), value)

    # -- memory ------------------------------------------------------------------------------------

    def at(self, base: Value, index: Value, element: Any) -> Value:
        """Pointer to element `index` (i64) of an array of `element` at the i8* `base`."""
        return self.b.gep(self.b.bitcast(base, element.as_pointer()), [index])

    def row(
        self,
        name: str,
        number: Value,
        part: Value = None,
        width: int = 0,
        element: Any = F32,
    ) -> Value:
        """Pointer to row `number` of argument `name`, whose rows are `<name>_stride` apart; to its
        `part` of `width` elements.
        """
        index = self.b.mul(number, self.arg[f"{name}_stride"])
        if part is not None:
            index = self.b.add(index, self.b.mul(part, const(width)))
        return self.at(self.arg[name], index, element)

    def offset(self, base: Value, count: Value) -> Value:
        """`base` (i8*) moved by `count` bytes."""
        return self.b.gep(base, [count])

    def load(self, base: Value, index: Value, element: Any, align: int = 1) -> Value:
        """Element `index` of an array of scalars at `base`."""
        return self.b.load(self.at(base, index, element), align=align)

    def load_vec(
        self, base: Value, index: Value, element: Any, count: int, align: int = 1
    ) -> Value:
        """`count` elements from element `index` on, as a vector; any alignment by default."""
        pointer = self.b.bitcast(self.at(base, index, element), vec(element, count).as_pointer())
        return self.b.load(pointer, align=align)

    def load_some(self, base: Value, index: Value, element: Any, count: int) -> Value:
        """A vector of `count` elements, or the one as a scalar."""
        one = count == 1
        return (
            self.load(base, index, element) if one else self.load_vec(base, index, element, count)
        )

    def store(self, value: Value, base: Value, index: Value, align: int = 1) -> None:
        """Store a scalar or a vector at element `index` (counted in scalars)."""
        kind = value.type
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        pointer = self.b.bitcast(self.at(base, index, element), kind.as_pointer())
        self.b.store(value, pointer, align=align)

    def another(self, value: Value) -> Value:
        """`value` (i64, or a vector that fits a register), which LLVM does not know to be the same.

        What is loaded with an index is loaded anew then, and not kept (in registers that are not
        there, so on the stack) from before; whole sums stay in the order they are written in.
        """
        register = "v" if isinstance(value.type, ir.VectorType) else "r"
        kind = ir.FunctionType(value.type, [value.type])
        return self.b.asm(kind, "", f"={register},0", [value], side_effect=False)

    def prefetch(self, pointer: Value, locality: int = 0) -> None:
        """Fetch the cache line at `pointer` for reading; locality 0 (streamed) to 3 (kept)."""
        how = [ir.Constant(I32, value) for value in (0, locality, 1)]
        pointer = self.b.bitcast(pointer, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *how)

    # -- values ------------------------------------------------------------------------------------

    def call(self, name: str, result: Any, *values: Value) -> Value:
        """Call an LLVM intrinsic by its full name, which is declared once a module."""
        kind = ir.FunctionType(result, [value.type for value in values])
        known = self.module.globals.get(name) or ir.Function(self.module, kind, name=name)
        return self.b.call(known, values)

    def system_call(self, number: int, *words: Value) -> Value:
        """Call Linux with up to four i64 words; i64."""
        places = ("{rax}", "{rdi}", "{rsi}", "{rdx}", "{r10}")[: 1 + len(words)]
        registers = ",".join(["={rax}", *places, "~{rcx}", "~{r11}", "~{memory}"])
        kind = ir.FunctionType(I64, [I64] * len(places))
        return self.b.asm(kind, "syscall", registers, [const(number), *words], side_effect=True)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, fused, on f32 scalars or vectors."""
        kind = x.type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{suffix}", kind, x, y, z)

    def splat(self, value: Value, count: int) -> Value:
        """A vector with `value` in every lane."""
        empty = undefined(value.type, count)
        one = self.b.insert_element(empty, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, empty, lanes_mask([0] * count))

    def zeros(self, element: Any, count: int) -> ir.Constant:
        """A zero vector."""
        return zeros(element, count)

    def reduce_add(self, vector: Value) -> Value:
        """Sum of f32 lanes."""
        return self.reduce(vector, self.b.fadd)

    def reduce(self, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes in one by halving: a fixed order, the same in every tier of equal width."""
        b = self.b
        while vector.type.count > 1:
            half = vector.type.count // 2
            undef = undefined(vector.type.element, vector.type.count)
            masks = [lanes_mask(lanes) for lanes in (range(half), range(half, 2 * half))]
            vector = combine(*(b.shuffle_vector(vector, undef, mask) for mask in masks))
        return b.extract_element(vector, ir.Constant(I32, 0))

    def bf16_to_f32(self, value: Value) -> Value:
        """bf16 bits (i16 scalar or vector) to f32, exactly."""
        wide = self.b.zext(value, _like(value, I32))
        return self.b.bitcast(self.b.shl(wide, _word(value, 16)), _like(value, F32))

    def f32_to_bf16(self, value: Value) -> Value:
        """f32 (scalar or vector) to bf16 bits as i16, to nearest even; finite inputs."""
        b = self.b
        bits = b.bitcast(value, _like(value, I32))
        odd = b.and_(b.lshr(bits, _word(value, 16)), _word(value, 1))
        rounded = b.add(b.add(bits, _word(value, 0x7FFF)), odd)
        return b.trunc(b.lshr(rounded, _word(value, 16)), _like(value, I16))


def _like(value: Value, element: Any) -> Any:
    """`element`, in as many lanes as `value` has."""
    kind = value.type
    return vec(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _word(value: Value, number: int) -> ir.Constant:
    """An i32 constant, in as many lanes as `value` has."""
    kind = value.type
    return _words(number, kind.count if isinstance(kind, ir.VectorType) else 0)


@cache
def _words(number: int, count: int) -> ir.Constant:
    one = ir.Constant(I32, number)
    return ir.Constant(vec(I32, count), [one] * count) if count else one
