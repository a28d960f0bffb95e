"""Steps of attention in decode by FlashInfer's kernels: one query a sequence, over pages of caches
where they lie.

The library plans a call before its steps, on the host, for all layers that attend alike, and keeps
what it planned on the device. What is kept for calls of fixed tensors lies where graphs know it.
Its backends are named here: those that plan anew under graphs, the same with and without them.
Appending to caches, and latent attention's products with kv_b, are hmc's own kernels.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hmc.errors import ExecutionError, MachineError
from hmc.plan import Step
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.gpu.attends import append
from hmc.runtime.device_ops.gpu.dense import weight_of
from hmc.runtime.device_ops.shares import Call, Fixed, Share
from hmc.runtime.device_ops.triton import attention as kernels
from hmc.runtime.memory.kv import KVCache

_KIND = torch.bfloat16
_HOPPER = (9, 0)


@dataclass(frozen=True)
class Pages:
    """The pages of a call's sequences, i32 on the host: those of each follow each other in
    `indices` [pages] from `begins` [sequences + 1] on; `lengths` [sequences] are its tokens, of
    which the last page has `last` [sequences]."""

    begins: Tensor
    indices: Tensor
    lengths: Tensor
    last: Tensor
    page: int

    @staticmethod
    def of(call: Call, share: Share, kv: KVCache) -> Pages:
        """`ExecutionError` where a sequence has several tokens."""
        at = np.concatenate([np.arange(*piece) for piece in share.pieces(call.tokens)])
        rows, lengths = call.tables[at], call.positions[at].astype(np.int32) + 1
        if len(np.unique(rows)) < len(rows):
            raise ExecutionError("FlashInfer attends for one token of each sequence of a call")
        counts = -(-lengths // kv.block)
        indices = [kv.tables[row, :count] for row, count in zip(rows, counts, strict=True)]
        begins, last = np.concatenate(([0], np.cumsum(counts))), lengths - (counts - 1) * kv.block
        every = (begins, np.concatenate(indices), lengths, last)
        found = [torch.from_numpy(each.astype(np.int32)) for each in every]
        return Pages(found[0], found[1], found[2], found[3], kv.block)


@dataclass(frozen=True)
class Grouped:
    """Grouped-query attention as it is planned: keys and values of `head_dim` columns."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    scale: float

    def wrapper(self, space: Tensor, sequences: int, pages: int) -> Any:
        """Of the library, for calls of so many sequences with at most so many pages; 0: any."""
        fixed = {}
        if sequences:
            names = ("indptr", "indices", "last_page_len")
            sizes = (sequences + 1, pages, sequences)
            fixed = {
                f"paged_kv_{name}_buffer": space.new_empty(size, dtype=torch.int32)
                for name, size in zip(names, sizes, strict=True)
            }
        return library().BatchDecodeWithPagedKVCacheWrapper(
            space, "NHD", use_cuda_graph=sequences > 0, use_tensor_cores=True, backend="fa2",
            **fixed,
        )  # fmt: skip

    def plan(self, wrapper: Any, pages: Pages) -> None:
        """Before the steps of a call."""
        wrapper.plan(
            pages.begins, pages.indices, pages.last, self.heads, self.kv_heads, self.head_dim,
            pages.page, window_left=self.window - 1, q_data_type=_KIND, kv_data_type=_KIND,
            sm_scale=self.scale,
        )  # fmt: skip


@dataclass(frozen=True)
class Latent:
    """The same of latent attention between its products with kv_b."""

    heads: int
    rank: int
    rope: int
    scale: float

    def wrapper(self, space: Tensor, sequences: int, pages: int) -> Any:
        """See `Grouped.wrapper`."""
        fixed = {}
        if sequences:
            names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
            sizes = (sequences + 1, sequences + 1, pages, sequences)
            fixed = {
                name: space.new_empty(size, dtype=torch.int32)
                for name, size in zip(names, sizes, strict=True)
            }
        found = library().mla.BatchMLAPagedAttentionWrapper
        return found(space, use_cuda_graph=sequences > 0, backend=_of_latents(space), **fixed)

    def plan(self, wrapper: Any, pages: Pages) -> None:
        """See `Grouped.plan`."""
        queries = torch.arange(len(pages.lengths) + 1, dtype=torch.int32)
        wrapper.plan(
            qo_indptr=queries, kv_indptr=pages.begins, kv_indices=pages.indices,
            kv_len_arr=pages.lengths, num_heads=self.heads, head_dim_ckv=self.rank,
            head_dim_kpe=self.rope, page_size=pages.page, causal=False, sm_scale=self.scale,
            q_data_type=_KIND, kv_data_type=_KIND,
        )  # fmt: skip


def _of_latents(space: Tensor) -> str:
    """The backend of latent attention for the GPU that `space` is on."""
    of_hopper = space.is_cuda and torch.cuda.get_device_capability(space.device) == _HOPPER
    return "fa3" if of_hopper else "fa2"


class Paged:
    """What is planned for the calls of a phase, for all its steps that attend alike."""

    def __init__(self, kind: Grouped | Latent, share: Share, kv: KVCache, space: Tensor) -> None:
        """`space` is u8, what the library works in."""
        self.wrapper: Any = None
        """The library's, of the latest call."""
        self._kind, self._share, self._kv, self._space = kind, share, kv, space
        self._any: Any = None
        self._fixed: WeakKeyDictionary[Fixed, Any] = WeakKeyDictionary()

    def plan(self, call: Call, fixed: Fixed | None) -> None:
        """Before the steps of a call. `ExecutionError` with what the library says."""
        if not call.count(self._share):
            return
        pages = Pages.of(call, self._share, self._kv)
        try:
            self.wrapper = self._wrapper(len(pages.lengths), fixed)
            self._kind.plan(self.wrapper, pages)
        except Exception as error:  # of building its kernels, too
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ExecutionError(f"FlashInfer cannot plan attention: {told}") from error
        if self._space.is_cuda:  # the streams of steps do not wait for what it copies
            torch.cuda.current_stream(self._space.device).synchronize()

    def _wrapper(self, sequences: int, fixed: Fixed | None) -> Any:
        if fixed is None:
            self._any = self._any or self._kind.wrapper(self._space, 0, 0)
            return self._any
        if fixed not in self._fixed:
            pages = sequences * -(-fixed.longest // self._kv.block)
            self._fixed[fixed] = self._kind.wrapper(self._space, sequences, pages)
        return self._fixed[fixed]


def library() -> Any:
    """FlashInfer; `MachineError` where it is not installed."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise MachineError(
            "the plan attends by FlashInfer in decode, which is not installed: pip install"
            " 'hmc[flashinfer]', or compile it with --attention triton"
        ) from error


def attention(bound: Bound, step: Step) -> Work:
    """Grouped-query attention: query head h reads key head h // (heads / kv_heads)."""
    q, k, v = (bound.tensor(step.inputs[role]) for role in ("q", "k", "v"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, kv_heads, head_dim = ints(step, "heads", "kv_heads", "head_dim")
    kind = Grouped(
        heads, kv_heads, head_dim, int(step.attrs.get("window", 0)), float(step.attrs["scale"])
    )
    planned = _planned(bound, step, kind)
    caches = tuple(bound.cache(step.layer, name) for name in ("k", "v"))
    paged = tuple(each.view(-1, bound.kv.block, kv_heads, head_dim) for each in caches)

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, (k, v), caches)
        query = q[: rows.count].view(-1, heads, head_dim).to(_KIND)
        y[: rows.count] = planned.wrapper.run(query, paged).view(rows.count, -1)

    return work


def mla(bound: Bound, step: Step) -> Work:
    """Latent attention, kv_b absorbed into query and result."""
    q, latent, k_rope = (bound.tensor(step.inputs[role]) for role in ("q", "latent", "k_rope"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, nope, rope, v_dim, rank = ints(step, "heads", "nope", "rope", "v_dim", "rank")
    planned = _planned(bound, step, Latent(heads, rank, rope, float(step.attrs["scale"])))
    kv_b, cache = weight_of(bound.matrix(step, "kv_b")), bound.cache(step.layer, "latent")
    caches = cache[:, :rank], cache[:, rank:]
    paged = cache.view(-1, bound.kv.block, rank + rope)

    def attends(wide: Tensor, mixed: Tensor) -> None:
        query = wide.view(-1, heads, rank + rope)
        planned.wrapper.run(
            q_nope=query[..., :rank], q_pe=query[..., rank:], ckv_cache=paged[..., :rank],
            kpe_cache=paged[..., rank:], out=mixed.view(-1, heads, rank),
        )  # fmt: skip

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, (latent, k_rope), caches)
        kernels.latent(
            q[: rows.count], kv_b, y[: rows.count], attends,
            heads=heads, nope=nope, rope=rope, v_dim=v_dim,
        )  # fmt: skip

    return work


def _planned(bound: Bound, step: Step, kind: Grouped | Latent) -> Paged:
    library()
    share = bound.share(step)
    return bound.planned((kind, share), Paged(kind, share, bound.kv, bound.workspace(step).paged))
