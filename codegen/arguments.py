"""How kernels are called: the words of each one's argument block (`ARGS`), and what they mean.

Conventions: activations are row-major, one row a token, `*_stride` in elements; f32 between ops,
bf16 where a matmul reads them; weights are row-major [out, in] exactly as in the checkpoint, any
alignment; FP8 block scales are f32 [ceil(N/128), ceil(K/128)]; ids, positions and block tables are
i32. Pointers are byte addresses, 0 where absent.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

Kind = Literal["ptr", "int", "f32"]


@dataclass(frozen=True)
class Arg:
    """One 64-bit word of an argument block: a byte address, a whole number, or a float's bits (low
    half).
    """

    name: str
    kind: Kind = "int"


def _args(text: str) -> tuple[Arg, ...]:
    """`"x* n eps~"`: `*` marks a pointer, `~` a float, nothing a whole number."""
    kinds: dict[str, Kind] = {"*": "ptr", "~": "f32"}
    return tuple(Arg(word.rstrip("*~"), kinds.get(word[-1], "int")) for word in text.split())


ARGS: dict[str, tuple[Arg, ...]] = {
    # y[t, :] = table[ids[t], :]; params: width. y f32.
    "embed": _args("table* ids* y* y_stride tokens"),
    # y[r, :] = x[rows[r], :] in f32; params: width. Picks the rows whose logits are wanted.
    "gather_rows": _args("x* x_stride rows* y* y_stride tokens"),
    # y[t, g, :] = x[t, g, :] * rsqrt(mean(x^2) + eps) * gamma; params: width (of one group).
    # `weight` = gamma's format.
    "norm": _args("x* x_stride gamma* y* y_stride tokens groups eps~"),
    # h_out = h + d0 (+ d1) (f32); y = norm(h_out); params: width. h_out may be h. d1 = 0 when
    # absent.
    "add_norm": _args(
        "h* h_stride d0* d0_stride d1* d1_stride h_out* h_out_stride gamma* y* y_stride tokens eps~"
    ),
    # y = h + d0 (+ d1), f32; params: width.
    "add": _args("h* h_stride d0* d0_stride d1* d1_stride y* y_stride tokens"),
    # y[t, :] = expr of rows x0[t, :], ... (f32), b0[t, :], ... (bf16) and vectors v0, ..., g0, ...
    # (f32), y in `out`; what the expression does not name is 0. Params, columns of operands:
    # rowwise.py.
    "pointwise": _args(
        "x0* x0_stride x1* x1_stride x2* x2_stride x3* x3_stride x4* x4_stride x5* x5_stride"
        " x6* x6_stride x7* x7_stride b0* b0_stride b1* b1_stride b2* b2_stride b3* b3_stride"
        " b4* b4_stride b5* b5_stride b6* b6_stride b7* b7_stride"
        " v0* v1* v2* v3* v4* v5* v6* v7* g0* g1* g2* g3* y* y_stride tokens"
    ),
    # y[t, n] = sum_k x[t, k] w[n, k] (+ bias[n]); x bf16; params: k, tokens (largest batch). bias
    # f32 or 0.
    "linear": _args("x* x_stride w* scale* bias* y* y_stride rows tokens"),
    # A linear of which a token's best[t] largest results are wanted (kernels/matmul/screen.py).
    # screen: `linear` of the compact copy. screen_tops: tops i32 [tokens, tops_stride] = the best
    # lower bound of every TOP rows, as numbers of the same order; behind them LEAST up to whole
    # vectors. screen_rows: y as `linear` makes it of rows that may be among the best, else -inf;
    # counts i64 [workers, COUNTS] grow by rows computed and blocks read whole; params: k, tokens.
    # screen_copy makes norms f32 [rows] and the compact copy: codes i8 [rows, k], scales bf16
    # [rows, k / group]; params: k, group.
    "screen": _args("x* x_stride w* scale* bias* y* y_stride rows tokens"),
    "screen_tops": _args("x* x_stride y* y_stride norms* tops* tops_stride rows tokens"),
    "screen_rows": _args(
        "x* x_stride w* scale* y* y_stride norms* tops* tops_stride best* counts* rows tokens"
    ),
    "screen_copy": _args("w* codes* scales* norms* rows"),
    # y[t, n] = expr(gate = x . gate[n], up = x . up[n]), y bf16; params: k, tokens, biased (unset:
    # 0; else gate_bias and up_bias f32 [n] are added to the products).
    "gate_up": _args(
        "x* x_stride gate* gate_scale* up* up_scale* y* y_stride rows tokens gate_bias* up_bias*"
    ),
    # Routed experts, first half, for every (token, slot): act[t * top_k + j, n], bf16, UNweighted.
    # table: i64 [experts, 6] = gate, gate_scale, up, up_scale, down, down_scale addresses; gate is
    # read where `expr` names it.
    # ids i32 [tokens, top_k], negative: not computed here, its row of `act` is left as it was;
    # params: k (hidden), n (intermediate), top_k, experts, tokens, biased (unset: 0; else gate_bias
    # and up_bias are f32 [experts, n]); expr as of gate_up, also of weight = routing f32 [tokens,
    # top_k]. teams: i64, where the workers of each NUMA node begin, or 0 (codegen/decode/teams.py).
    "experts_gate_up": _args(
        "x* x_stride ids* table* act* tokens scratch* routing* gate_bias* up_bias* teams*"
    ),
    # Second half: y[t, n] = sum_j routing[t, j] * (act[t * top_k + j, :] . down[ids[t, j]][n, :]),
    # f32, over the slots j with ids[t, j] >= 0. params: k (intermediate), n (hidden), top_k,
    # experts, tokens, biased (unset: 0; else bias f32 [experts, n] is added to the products).
    "experts_down": _args("act* ids* routing* table* y* y_stride tokens scratch* bias*"),
    # In place on x f32 [tokens, heads, head_dim]: optional per-head RMS norm (gamma = 0: none),
    # then rotary on the slice [start, start + dim) of each head; cos, sin f32 [positions, dim / 2];
    # params: heads, head_dim, start, dim, interleaved (0: halves, 1: even/odd pairs). `weight` =
    # gamma's format.
    "rotary": _args("x* x_stride gamma* cos* sin* positions* tokens eps~"),
    # In place on x f32 [tokens, heads, head_dim]: heads of a token at position p times scale[h]
    # log(1 + p) + bias[h], both f32 [heads]; params: heads, head_dim.
    "position_scale": _args("x* x_stride scale* bias* positions* tokens"),
    # Grouped-query attention of `tokens` queries over the paged cache, new k and v appended first.
    # q, k, v f32 rows; k_cache, v_cache bf16 [blocks, kv_heads, block, dim]; tables i32 [sequences,
    # table_stride]; sequence i32 [tokens] = row of `tables`; positions i32 [tokens]; y bf16
    # [tokens, heads * v_dim]. params: heads, kv_heads, head_dim, v_dim, block. Three records:
    # kv_append, (barrier), attention, (barrier), attention_join. scratch:
    # `attention_scratch_bytes(spec, tokens, max_context)` of kernels/attention/attend.py.
    # Position -1: y = 0. Options, as params that are 0 or absent without them: window, how many
    # positions a token sees, its own included; or chunk, positions of a chunk, of which a token
    # sees its own; sinks (1), f32 [heads], more scores whose value is 0; growth_every and
    # growth_from, queries at position p times 1 + growth * log(1 + (p + growth_from) //
    # growth_every); index_topk, for index_heads: chosen i32 [tokens, index_heads * index_topk] are
    # numbers of blocks of index_block positions, ascending, of which a token sees up to its own, in
    # the last of them; what it sees are all where these are no more. expr: what becomes of a scaled
    # `score`.
    "kv_append": _args(
        "k* k_stride v* v_stride k_cache* v_cache* tables* table_stride sequence* positions* tokens"
    ),
    "attention": _args(
        "q* q_stride k_cache* v_cache* tables* table_stride sequence* positions* y* y_stride tokens"
        " scale~ scratch* growth~ chosen* chosen_stride"
    ),
    "attention_join": _args("positions* y* y_stride tokens scratch* sinks*"),
    # The same for many tokens of one sequence (prefill), at positions[0], positions[0] + 1, ...,
    # after kv_append; sequence[0] is its row of `tables`. scratch: `prefill_scratch_bytes(spec)` of
    # kernels/attention/prefill_form.py for every worker.
    "attention_prefill": _args(
        "q* q_stride k_cache* v_cache* tables* table_stride sequence* positions* y* y_stride tokens"
        " scale~ scratch* sinks* growth~ chosen* chosen_stride"
    ),
    # The indexer of block-sparse attention, after index_append: scores f32 [tokens, heads,
    # scores_stride] are the largest q[t, h, :] . k of the positions up to a token's own in each
    # block of index_block, for tokens that see more than index_topk blocks; chosen i32 [tokens,
    # heads * index_topk] the last index_local blocks and the best others, ascending, of equal ones
    # the lower, then -1; or all. scores_stride: `block_stride` of kernels/attention/block_index.py.
    # block_prefill makes both, for tokens of one sequence; scratch: `block_scratch_bytes(spec,
    # max_context)` for every worker. params: heads, dim, block, index_block, index_topk,
    # index_local.
    "block_scores": _args(
        "q* q_stride cache* tables* table_stride sequence* positions* tokens scores* scores_stride"
    ),
    "block_choose": _args("positions* scores* scores_stride chosen* chosen_stride tokens"),
    "block_prefill": _args(
        "q* q_stride cache* tables* table_stride sequence* positions* tokens scratch* scores_stride"
        " chosen* chosen_stride"
    ),
    # Multi-head latent attention, absorbed: q f32 [tokens, heads, nope + rope] (rope part rotated
    # already), latent f32 rows [rank] (normed), k_rope f32 rows [rope] (rotated), cache bf16
    # [blocks, block, rank + rope], kv_b [heads * (nope + v_dim), rank] in `weight` format.
    # mla_absorb: q_latent f32 [tokens, heads, rank] = q_nope . W_UK. mla_append: cache rows.
    # mla_attention: y_latent bf16 [tokens, heads, rank] from q_latent and the rope part of q.
    # mla_up: y bf16 [tokens, heads * v_dim] = W_UV. params: heads, nope, rope (may be 0), v_dim,
    # rank, block, tokens; growth_every and growth_from as of `attention`, and where positions are
    # chosen sinks.
    "mla_absorb": _args("q* q_stride w* scale* q_latent* tokens"),
    "mla_append": _args(
        "latent* latent_stride k_rope* k_rope_stride cache* tables* table_stride sequence*"
        " positions* tokens"
    ),
    "mla_attention": _args(
        "q* q_stride q_latent* cache* tables* table_stride sequence* positions* y_latent*"
        " tokens scale~ scratch* growth~"
    ),
    "mla_attention_join": _args("positions* y_latent* tokens scratch* sinks*"),
    "mla_up": _args("y_latent* w* scale* y* y_stride tokens"),
    # The same for many tokens of one sequence (prefill), keys and values lifted by kv_b, after
    # mla_append; positions and sequence as for attention_prefill, y bf16 [tokens, heads * v_dim];
    # w_scale are the weight's scales. params: heads, nope, rope, v_dim, rank, block. scratch:
    # `prefill_scratch_bytes(spec)` of kernels/attention/prefill_form.py for every worker.
    "mla_prefill": _args(
        "q* q_stride cache* w* w_scale* tables* table_stride sequence* positions* y* y_stride"
        " tokens scale~ scratch* growth~ sinks*"
    ),
    # Linear attention with decay (hmc/ops/recurrent.py): q, k f32 rows [key_heads, key_dim], v
    # [heads, value_dim], decay [heads] or with `channels` [heads, key_dim], beta [heads] with
    # `delta`; state f32 [slots, heads, key_dim, value_dim], in place; sequence i32 [tokens] =
    # slots; y f32 [tokens, heads, value_dim]. params: heads, key_heads, key_dim, value_dim,
    # channels, delta, tiled (unset: 0).
    "linear_attention": _args(
        "q* q_stride k* k_stride v* v_stride decay* decay_stride beta* beta_stride y* y_stride"
        " state* sequence* tokens scale~"
    ),
    # The same for many tokens of one sequence (prefill), whose slot is sequence[0]. scratch:
    # `linear_scratch_bytes(spec)` of kernels/recurrent/linear_form.py for every worker.
    "linear_attention_prefill": _args(
        "q* q_stride k* k_stride v* v_stride decay* decay_stride beta* beta_stride y* y_stride"
        " state* sequence* tokens scale~ scratch*"
    ),
    # Causal convolution, column by column: y[t, c] = expr(x = sum_i weight[i, c] x_(t - taps + 1 +
    # i)[c] (+ bias[c])), the last token's tap being the last; what came before a sequence's tokens
    # is row sequence[t] of the states [taps - 1, width], oldest first, in place. weight f32 [taps,
    # width], bias f32 [width]; params: width, taps, biased (unset: 0).
    "conv": _args("x* x_stride weight* bias* state* sequence* y* y_stride tokens"),
    # The scan of Mamba, column by column: of each element n of the states [states, width] of row
    # sequence[t], in place, s[n] = exp(dt[t] rate[n]) s[n] + dt[t] x[t] b[t, n]; y[t] = sum_n c[t,
    # n] s[n]. rate f32 [states, width], below 0; params: width, states.
    "selective_scan": _args(
        "x* x_stride dt* dt_stride b* b_stride c* c_stride rate* state* sequence* y* y_stride"
        " tokens"
    ),
    # Sparse latent attention. Rows `indexer_k` f32 [dim] are appended to cache bf16 [blocks, block,
    # dim]; scores f32 [tokens, scores_stride] are sum_h weights[t, h] relu(q[t, h, :] . k) of the
    # positions up to a token's own, unless these are no more than index_topk; chosen i32 [tokens,
    # index_topk] the positions with the best ones, ascending, of equal ones the lower, then -1; or
    # all positions. scores_stride: that of kernels/attention/index.py. index_prefill makes both,
    # token by token; scratch: scores of one token for every worker. params: heads, dim, block,
    # index_topk.
    "index_append": _args(
        "indexer_k* indexer_k_stride cache* tables* table_stride sequence* positions* tokens"
    ),
    "index_scores": _args(
        "q* q_stride weights* weights_stride cache* tables* table_stride sequence* positions*"
        " tokens scores* scores_stride"
    ),
    "index_choose": _args("positions* scores* scores_stride chosen* chosen_stride tokens"),
    "index_prefill": _args(
        "q* q_stride weights* weights_stride cache* tables* table_stride sequence* positions*"
        " tokens scratch* scores_stride chosen* chosen_stride"
    ),
    # Of an indexer whose keys are compressed rows of `pool` positions each: pools i32 [tokens,
    # index_topk / pool] are those that index_choose or index_prefill chose, chosen i32 [tokens,
    # index_topk + pool - 1] their positions, then those of the pool that is open at a token's own,
    # then -1. params: index_topk, pool.
    "pool_positions": _args("pools* pools_stride positions* chosen* chosen_stride tokens"),
    # gathered bf16 [tokens, rows, rank + rope], rows: index_topk up to a multiple of block, the
    # cache rows that tokens chose, of a position beyond a token's own that one's; lasts i32
    # [tokens] = rows gathered - 1: what mla_attention reads as a cache and as positions. params:
    # those of mla_attention, index_topk, pool (unset: 1): a token that does not see all chose
    # index_topk less as many as the pool that is open at its own lacks but for the last.
    "mla_gather": _args(
        "cache* tables* table_stride sequence* positions* chosen* chosen_stride gathered* lasts*"
        " tokens"
    ),
    # The tokens of a call of one sequence that see more than index_topk positions, a few at a time
    # by the kernels above; mla_prefill with a size index_topk computes the others. params: those of
    # mla_up and index_topk. scratch: `sparse_scratch_bytes(spec)` of kernels/attention/sparse.py
    # for every worker.
    "sparse_mla_prefill": _args(
        "q* q_stride cache* w* w_scale* tables* table_stride sequence* positions* chosen*"
        " chosen_stride y* y_stride tokens scale~ scratch* sinks*"
    ),
    # Router logits f32 [tokens, experts] (made by `linear`) -> ids i32 [tokens, top_k], routing f32
    # [tokens, top_k]. params: experts, top_k, scoring (kernels/routing/route.py), normalise,
    # groups, top_groups (0: no grouping), group_best (unset: 2), eps and scaled (unset: 0); bias
    # f32 [experts] or 0 is added for choosing only; factor scales the result, and where it is
    # `scaled` scale f32 [experts] too. Ties go to the lower id. Group score = sum of its
    # `group_best` largest biased scores. Weights are divided by their sum + eps (unset: 1e-20).
    "route": _args("logits* logits_stride bias* ids* routing* tokens factor~ scale* eps~ jitter~"),
    # The same, of the experts that row token[t] of table i32 [vocab, top_k] holds. params: experts,
    # top_k, scoring (of all experts), normalise.
    "hash_route": _args("logits* logits_stride token* table* ids* routing* tokens factor~"),
    # Streams of hyper-connections, side by side in rows [n * width] (hmc/ops/hyper.py). params:
    # streams (n), parts, iterations: weights f32 [n], [2 n] or, with iterations, [n (n + 2)] for 1,
    # 2 or 3 parts; base and scale f32.
    "hyper_weights": _args("mixes* mixes_stride base* scale* y* y_stride tokens eps~ magnitude~"),
    # params: width, streams, of these three; of hyper_out parts, 2 or 3.
    "hyper_in": _args("h* h_stride weights* weights_stride y* y_stride tokens"),
    "hyper_out": _args("h* h_stride weights* weights_stride x* x_stride y* y_stride tokens"),
    "hyper_copy": _args("x* x_stride y* y_stride tokens"),
    # Attention over a window and compressed rows (hmc/ops/compressed.py). The last `window` rows of
    # a sequence's keys are in its slot of `window`, bf16 [slots, window, head_dim], position p at
    # place p mod window. params: head_dim, window. window_append: of tokens of as many sequences;
    # window_gather: of one sequence's in order, whose rows before and in the call are gathered too,
    # bf16 [window + tokens, head_dim].
    "window_append": _args("kv* kv_stride window* window_stride sequence* positions* tokens"),
    "window_gather": _args(
        "kv* kv_stride window* window_stride gathered* sequence* positions* tokens"
    ),
    # A row of `width` for every `ratio` tokens. state f32 [slots, 3 or 9, width]: running softmaxes
    # of kv by gate + ape; pooled f32 [tokens, width]: the means of windows that a token ends, which
    # compress_rows norms, turns (their last rope_dim columns) and puts into pages: rows bf16
    # [pages, block / gcd(block, ratio), width]. With `overlap` the first half of kv and gate goes
    # into the row after. lasts i32 [tokens]: the last row that a token sees, -1: none.
    # params: width, ratio, overlap, rope_dim (unset: means are neither normed nor turned), block.
    "compress": _args(
        "kv* kv_stride gate* gate_stride ape* state* state_stride pooled* sequence* positions*"
        " tokens"
    ),
    "compress_rows": _args(
        "pooled* gamma* cos* sin* rows* lasts* tables* table_stride sequence* positions* tokens"
        " eps~"
    ),
    # y f32 [tokens, heads * head_dim]. keys: the slots of windows, or what was gathered of them.
    # scratch: attend_scratch_bytes for every worker, of `most` rows. params: heads, head_dim,
    # window, block; ratio and index_topk (unset: no compressed rows, or all of them).
    **dict.fromkeys(
        ("attend_few", "attend_prefill"),
        _args(
            "q* q_stride keys* keys_stride rows* chosen* tables* table_stride sequence* positions*"
            " sinks* y* y_stride scratch* most tokens scale~"
        ),
    ),
    # Many-token matmul (prefill): y[t, n] = x[t, :] . w[n, :], any number of tokens; x bf16;
    # params: k. gather i32 [tokens] picks rows of x (0: none). scratch: per-worker panels,
    # `panel_scratch_bytes` (panel/tiling.py) says how many.
    "gemm": _args("x* x_stride gather* w* scale* bias* y* y_stride rows tokens scratch*"),
    # ids i32 [tokens, top_k], negative: of no expert here -> slots and offsets of the grouped forms
    # below, slots ascending within an expert; params: top_k, experts.
    "sort_experts": _args("ids* slots* offsets* tokens"),
    # out i32 [tokens, top_k] = ids where mask i32 [experts] is not 0, else -1; params: top_k.
    "resident_ids": _args("ids* mask* out* tokens"),
    # Many-token routed experts, tokens sorted by expert: offsets i32 [experts + 1] into `slots` i32
    # [tokens * top_k] (each = token * top_k + j, sorted by expert). Results as the small forms
    # above.
    "grouped_gate_up": _args(
        "x* x_stride slots* offsets* table* act* scratch* routing* gate_bias* up_bias*"
    ),
    "grouped_down": _args("act* slots* offsets* routing* table* y* y_stride tokens scratch* bias*"),
    # Reads bytes [0, size) of `base` once, each worker its contiguous share: the streaming-read
    # reference. sink i64 [workers] keeps the loads alive. params: streams; tile: prefetch.
    "stream_read": _args("base* size sink*"),
    # Writes `value` (i64) over bytes [0, size) of `base` (size a multiple of 8), each worker its
    # contiguous share.
    "stream_fill": _args("base* size value"),
    # Register-only dot products: rounds of the tier's widest multiply-add. sink f32 [workers].
    "dot_peak": _args("rounds sink*"),
    # found i64 [count]: 1 where one of the E4M3 codes of a span is NaN, else 0; spans: address and
    # bytes, i64 [count, 2].
    "nan_codes": _args("spans* count found*"),
    # Waits until the word at `flag` (32 bits) has reached `epoch`, or the one at `abort` is not 0:
    # then `given_up` is set, and the program ends there. Spins for `spin` ticks, then looks now and
    # then. flag_set lets the word be `epoch`. See kernels/flags.py; only in records of
    # `ProgramBuilder.await_flag` and `set_flag`.
    "flag_wait": _args("given_up flag* epoch abort* spin"),
    "flag_set": _args("flag* epoch"),
    # The native pool itself (codegen/pool/walker.py): the block is the pool's control block, not an
    # argument block.
    "worker_loop": (),
    "pool_call": (),
    "read_tsc": _args("sink*"),
}


def pack(op: str, **values: int | float) -> bytes:
    """The argument block of `op` as bytes; `ValueError` when a field is absent or unknown."""
    names = [arg.name for arg in ARGS[op]]
    if set(names) != set(values):
        odd = sorted(set(names) ^ set(values))
        raise ValueError(f"arguments of kernel {op} do not match its layout: {', '.join(odd)}")
    words = (word(values[arg.name], arg.kind) for arg in ARGS[op])
    return struct.pack(f"<{len(names)}q", *words)


def word(value: int | float, kind: Kind) -> int:
    """`value` as the 64-bit word of an argument."""
    if kind == "f32":
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)
