"""The router: logits to expert ids and their weights, in every form the supported families use.

Candidates are compared as integers whose order is that of the scores (NaN counts as -inf, -0 as 0,
experts taken or ruled out are below everything), so that ties go to the lower id and ids are valid
whatever the logits hold. Weights are not cleaned: a NaN among the logits shows in them.

    scoring 0   score = softmax over all experts (Qwen3-MoE, Mixtral)
    scoring 1   score = sigmoid; with groups, only the best groups' experts (DeepSeek-V3)
    scoring 2   score = logit; the chosen ones go through a softmax (gpt-oss)
    scoring 3   score = logit; the chosen ones go through a sigmoid each (Llama 4)
    scoring 4   score = logit; each slot's weight is its expert's softmax among those that are not
                taken yet and are close to their best: (best - score) / max(|score|, best) is at
                most 2 `jitter` (SparseMixer, arXiv 2409.12136; Phi-3.5-MoE)
    scoring 5   score = sqrt(softplus(logit)) (DeepSeek-V4)

`bias` is added to scores for choosing alone.
"""

from __future__ import annotations

from functools import partial

from hmc.codegen.functions import absolute, maximum, softplus, sqrt
from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const, fconst, lanes_mask, vec
from hmc.codegen.vector import exp, fmax, for_blocks, fsplat, isplat, load_f32, sigmoid

SOFTMAX, SIGMOID, SOFTMAX_CHOSEN, SIGMOID_CHOSEN, SPARSEMIXER, SQRT_SOFTPLUS = range(6)
_NEVER = float("-inf")
_TAKEN = -(2**31)
_LAST = 2**31 - 1


def ordered_key(e: Emitter, value: Value) -> Value:
    """i32 lanes ordered as the f32 lanes of `value` are: NaN as -inf, both zeros equal, all above
    `_TAKEN`.
    """
    b, count = e.b, value.type.count
    never = fsplat(_NEVER, count)
    value = b.select(b.fcmp_unordered("uno", value, value), never, value)
    bits = b.bitcast(b.fadd(value, fsplat(0.0, count)), vec(I32, count))
    return b.xor(bits, b.and_(b.ashr(bits, isplat(31, count)), isplat(_LAST, count)))


def _first(e: Emitter, value: Value, count: int, other: Value) -> Value:
    """The first `count` lanes of `value`, the others of `other`."""
    lanes = value.type.count
    keep = lanes_mask([lane if lane < count else lanes for lane in range(lanes)])
    return e.b.shuffle_vector(value, other, keep)


class _Router:
    """Code for one token; buffers padded to whole vectors live on the worker's stack."""

    def __init__(self, e: Emitter) -> None:
        self.e, spec = e, e.spec
        self.experts, self.top_k = spec["experts"], spec["top_k"]
        self.scoring = spec["scoring"]
        self.groups, self.top_groups = spec.get("groups"), spec.get("top_groups")
        self.scores, self.choice = (e.buffer(F32, self._padded(self.experts)) for _ in range(2))
        self.keys = e.buffer(I32, self._padded(self.experts))
        self.chosen = e.buffer(F32, self._padded(self.top_k))
        groups = self._padded(max(self.groups, 1))
        self.group_scores, self.group_keys = e.buffer(F32, groups), e.buffer(I32, groups)

    def _padded(self, count: int) -> int:
        return -(-count // self.e.lanes) * self.e.lanes

    def emit(self, token: Value) -> None:
        """Code that routes one token."""
        e, b = self.e, self.e.b
        self._score(e.row("logits", token))
        self._add_bias()
        self._rank(self.choice, self.keys, self.experts)
        if self.top_groups:
            self._rule_out_groups()
        if self.scoring == SPARSEMIXER:
            self._begin_left()
        start = b.mul(token, const(self.top_k))
        with e.for_range(0, self.top_k) as slot:
            best = self._take_best(self.keys, self.experts)
            e.store(b.trunc(best, I32), e.arg["ids"], b.add(start, slot))
            mixed = self.scoring == SPARSEMIXER
            weight = self._mixed(best) if mixed else e.load(self.scores, best, F32)
            e.store(weight, self.chosen, slot)
        self._weigh(e.at(e.arg["routing"], start, F32), e.at(e.arg["ids"], start, I32))

    def emit_hashed(self, token: Value) -> None:
        """Code for a token whose experts a table has for its id."""
        e, b = self.e, self.e.b
        self._score(e.row("logits", token))
        start = b.mul(token, const(self.top_k))
        row = b.mul(e.load_int(e.arg["token"], token), const(self.top_k))
        with e.for_range(0, self.top_k) as slot:
            expert = e.load_int(e.arg["table"], b.add(row, slot))
            e.store_int(expert, e.arg["ids"], b.add(start, slot))
            e.store(e.load(self.scores, expert, F32), self.chosen, slot)
        self._weigh(e.at(e.arg["routing"], start, F32), e.at(e.arg["ids"], start, I32))

    # -- scores ------------------------------------------------------------------------------------

    def _score(self, logits: Value) -> None:
        e = self.e
        if self.scoring == SOFTMAX:
            self._softmax(logits, self.scores, self.experts)
            return

        def block(index: Value, count: int) -> None:
            value = load_f32(e, "f32", logits, index, count)
            if self.scoring == SIGMOID:
                value = sigmoid(e, value)
            elif self.scoring == SQRT_SOFTPLUS:
                value = sqrt(e, softplus(e, value))
            e.store(value, self.scores, index)

        for_blocks(e, self.experts, e.lanes, block)

    def _softmax(self, source: Value, target: Value, width: int) -> None:
        """target[:] = softmax of source[:]; `target` holds whole vectors and may be `source`."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        top = e.local(vec(F32, lanes), fsplat(_NEVER, lanes))
        total = e.local(vec(F32, lanes), e.zeros(F32, lanes))

        def highest(index: Value, count: int) -> None:
            value = load_f32(e, "f32", source, index, count)
            value = _first(e, value, count, fsplat(_NEVER, lanes))
            b.store(fmax(e, value, b.load(top)), top)

        def raise_(index: Value, count: int) -> None:
            value = exp(e, b.fsub(load_f32(e, "f32", source, index, count), peak))
            value = _first(e, value, count, fsplat(0.0, lanes))
            b.store(b.fadd(b.load(total), value), total)
            e.store(value, target, index)

        def divide(index: Value, count: int) -> None:
            e.store(b.fdiv(load_f32(e, "f32", target, index, lanes), divisor), target, index)

        for_blocks(e, width, lanes, highest)
        peak = e.splat(e.reduce(b.load(top), partial(fmax, e)), lanes)
        for_blocks(e, width, lanes, raise_)
        divisor = e.splat(e.reduce_add(b.load(total)), lanes)
        for_blocks(e, width, lanes, divide)

    def _add_bias(self) -> None:
        """choice = scores (+ bias)."""
        e, b, bias = self.e, self.e.b, self.e.arg["bias"]

        def choose(with_bias: bool, index: Value, count: int) -> None:
            value = e.load_vec(self.scores, index, F32, e.lanes, align=4)
            if with_bias:
                value = b.fadd(value, load_f32(e, "f32", bias, index, count))
            e.store(value, self.choice, index)

        absent = b.icmp_unsigned("==", b.ptrtoint(bias, I64), const(0))
        with b.if_else(absent) as branches:
            for with_bias, branch in enumerate(branches):
                with branch:
                    for_blocks(e, self.experts, e.lanes, partial(choose, bool(with_bias)))

    # -- choosing ----------------------------------------------------------------------------------

    def _rank(self, values: Value, keys: Value, width: int) -> None:
        """keys[:] = ordered keys of values[:], lowest in the padding."""
        e, lanes = self.e, self.e.lanes

        def block(index: Value, count: int) -> None:
            key = ordered_key(e, e.load_vec(values, index, F32, lanes, align=4))
            e.store(_first(e, key, count, isplat(_TAKEN, lanes)), keys, index)

        for_blocks(e, width, lanes, block)

    def _take_best(self, keys: Value, count: int) -> Value:
        """Index (i64) of the largest key, the lowest of equals; the key is lowered to `_TAKEN`."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        words, numbers = vec(I32, lanes), lanes_mask(list(range(lanes)))
        reduce = f"llvm.vector.reduce.{{}}.v{lanes}i32".format
        top = e.local(words, isplat(_TAKEN, lanes))
        where = e.local(words, numbers)
        with e.for_range(0, self._padded(count), lanes) as index:
            key, old = e.load_vec(keys, index, I32, lanes, align=4), b.load(top)
            more = b.icmp_signed(">", key, old)
            place = b.add(e.splat(b.trunc(index, I32), lanes), numbers)
            b.store(b.select(more, key, old), top)
            b.store(b.select(more, place, b.load(where)), where)
        best = e.call(reduce("smax"), I32, b.load(top))
        equal = b.icmp_signed("==", b.load(top), e.splat(best, lanes))
        places = b.select(equal, b.load(where), isplat(_LAST, lanes))
        first = b.sext(e.call(reduce("smin"), I32, places), I64)
        e.store(I32(_TAKEN), keys, first)
        return first

    def _rule_out_groups(self) -> None:
        """Lower the keys of all groups but the best: a group is worth the sum of its two largest
        biased scores, or the largest one.
        """
        e, b = self.e, self.e.b
        size = self.experts // self.groups
        with e.for_range(0, self.groups) as group:
            first, second = e.local(F32, fconst(_NEVER)), e.local(F32, fconst(_NEVER))
            start = b.mul(group, const(size))
            with e.for_range(start, b.add(start, const(size))) as expert:
                value, top = e.load(self.choice, expert, F32), b.load(first)
                more = b.fcmp_ordered(">", value, top)
                lower = b.select(more, top, value)
                runner = b.load(second)
                b.store(b.select(b.fcmp_ordered(">", lower, runner), lower, runner), second)
                b.store(b.select(more, value, top), first)
            worth = b.load(first)
            if self.e.spec.get("group_best", 2) > 1:
                worth = b.fadd(worth, b.load(second))
            e.store(worth, self.group_scores, group)
        self._rank(self.group_scores, self.group_keys, self.groups)
        with e.for_range(0, min(self.top_groups, self.groups)):
            self._take_best(self.group_keys, self.groups)
        # The groups that were taken stay; the others go.
        with e.for_range(0, self.groups) as group:
            out = b.icmp_signed("!=", e.load(self.group_keys, group, I32), I32(_TAKEN))
            with b.if_then(out):
                start = b.mul(group, const(size))
                with e.for_range(start, b.add(start, const(size))) as expert:
                    e.store(I32(_TAKEN), self.keys, expert)

    # -- weights -----------------------------------------------------------------------------------

    def _begin_left(self) -> None:
        """choice = scores, -inf in the padding: what `_mixed` takes from."""
        e, lanes = self.e, self.e.lanes

        def block(index: Value, count: int) -> None:
            value = e.load_vec(self.scores, index, F32, lanes, align=4)
            e.store(_first(e, value, count, fsplat(_NEVER, lanes)), self.choice, index)

        for_blocks(e, self.experts, lanes, block)

    def _mixed(self, best: Value) -> Value:
        """Weight of the expert `best` among those left, which it leaves."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        never = fsplat(_NEVER, lanes)
        top = e.local(vec(F32, lanes), never)
        total = e.local(vec(F32, lanes), e.zeros(F32, lanes))
        with e.for_range(0, self._padded(self.experts), lanes) as index:
            value = e.load_vec(self.choice, index, F32, lanes, align=4)
            b.store(fmax(e, value, b.load(top)), top)
        peak = e.reduce(b.load(top), partial(fmax, e))
        peaks, most = e.splat(peak, lanes), e.splat(b.fmul(e.arg["jitter"], fconst(2.0)), lanes)
        with e.for_range(0, self._padded(self.experts), lanes) as index:
            value = e.load_vec(self.choice, index, F32, lanes, align=4)
            below = b.fsub(peaks, value)
            far = b.fcmp_ordered(">", b.fdiv(below, maximum(e, absolute(e, value), peaks)), most)
            out = b.or_(far, b.fcmp_ordered("==", value, never))
            share = b.select(out, fsplat(0.0, lanes), exp(e, b.fneg(below)))
            b.store(b.fadd(b.load(total), share), total)
        own = exp(e, b.fsub(e.splat(e.load(self.choice, best, F32), lanes), peaks))
        e.store(fconst(_NEVER), self.choice, best)
        share = b.fdiv(own, e.splat(e.reduce_add(b.load(total)), lanes))
        return b.extract_element(share, I32(0))

    def _weigh(self, routing: Value, ids: Value) -> None:
        """routing[:] = the chosen scores, through softmax, sigmoid or normalised as asked, times
        factor and the scales of experts."""
        e, b = self.e, self.e.b
        if self.scoring == SOFTMAX_CHOSEN:
            self._softmax(self.chosen, self.chosen, self.top_k)
        if self.scoring == SIGMOID_CHOSEN:
            with e.for_range(0, self._padded(self.top_k), e.lanes) as index:
                value = e.load_vec(self.chosen, index, F32, e.lanes, align=4)
                e.store(sigmoid(e, value), self.chosen, index)
        divisor = e.local(F32, fconst(1.0))
        if self.e.spec.get("normalise"):
            given = self.e.spec.get("eps")
            b.store(e.arg["eps"] if given else fconst(1e-20), divisor)
            with e.for_range(0, self.top_k) as slot:
                b.store(b.fadd(b.load(divisor), e.load(self.chosen, slot, F32)), divisor)
        with e.for_range(0, self.top_k) as slot:
            weight = b.fdiv(e.load(self.chosen, slot, F32), b.load(divisor))
            weight = b.fmul(weight, e.arg["factor"])
            if self.e.spec.get("scaled"):
                expert = e.load_int(ids, slot)
                weight = b.fmul(weight, e.load(e.arg["scale"], expert, F32))
            e.store(weight, routing, slot)


def emit_route(e: Emitter) -> None:
    """`route`: split by token."""
    router = _Router(e)
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        router.emit(token)


def emit_hash_route(e: Emitter) -> None:
    """`hash_route`: split by token."""
    router = _Router(e)
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        router.emit_hashed(token)
