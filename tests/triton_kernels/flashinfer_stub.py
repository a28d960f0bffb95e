"""FlashInfer's wrappers for attention in decode with the arguments that they have in 0.5.0, 0.6.18
and 0.7.4: what they take is checked, and computed by PyTorch from what lies in their buffers. A
captured `run` knows buffers alone, and so does this one of a wrapper for graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

WRAPPERS: list[Any] = []
_WORKSPACE = 128 << 20


class _Wrapper:
    def __init__(self, workspace: Tensor, graph: bool, buffers: dict[str, Tensor | None]) -> None:
        assert workspace.dtype == torch.uint8 and workspace.numel() >= _WORKSPACE
        assert workspace.data_ptr() % 16 == 0 and not workspace.any()
        given = [each for each in buffers.values() if each is not None]
        assert len(given) == (len(buffers) if graph else 0)
        assert all(each.dtype == torch.int32 and each.device == workspace.device for each in given)
        self.graph, self.device, self.ran = graph, workspace.device, 0
        self.buffers: dict[str, Tensor] = {k: v for k, v in buffers.items() if v is not None}
        WRAPPERS.append(self)

    def _keep(self, **given: Tensor) -> None:
        for name, values in given.items():
            assert values.dtype == torch.int32 and values.device.type == "cpu" and values.dim() == 1
            if not self.graph:
                self.buffers[name] = values.clone()
            elif name.endswith("indices"):
                assert len(values) <= len(self.buffers[name])
                self.buffers[name][: len(values)] = values
            else:
                assert len(values) == len(self.buffers[name]), "the batch of a graph is fixed"
                self.buffers[name].copy_(values)

    def _rows(self, cache: Tensor, indptr: Tensor, indices: Tensor, i: int, length: int) -> Tensor:
        """Rows of a sequence, of pages [n, page, ...]."""
        pages = indices[int(indptr[i]) : int(indptr[i + 1])].long()
        assert len(pages) == -(-length // cache.shape[1])
        return cache[pages].flatten(0, 1)[:length].double()


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        assert kv_layout == "NHD" and backend == "fa2"
        super().__init__(
            float_workspace_buffer,
            use_cuda_graph,
            {
                "indptr": paged_kv_indptr_buffer,
                "indices": paged_kv_indices_buffer,
                "last": paged_kv_last_page_len_buffer,
            },
        )

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, window_left: int = -1,
        q_data_type: Any = "float16", kv_data_type: Any = None, sm_scale: float | None = None,
    ) -> None:  # fmt: skip
        assert num_qo_heads % num_kv_heads == 0
        assert q_data_type == kv_data_type == torch.bfloat16
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        self._keep(indptr=indptr, indices=indices, last=last_page_len)
        self.planned = (num_qo_heads, num_kv_heads, head_dim, page_size, window_left, sm_scale)

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None
    ) -> Tensor:
        heads, kv_heads, dim, page, window, scale = self.planned
        keys, values = paged_kv_cache
        begins, indices, last = (self.buffers[name] for name in ("indptr", "indices", "last"))
        assert q.shape == (len(last), heads, dim) and q.dtype == torch.bfloat16
        assert q.is_contiguous()
        for cache in (keys, values):
            assert cache.shape[1:] == (page, kv_heads, dim) and cache.dtype == torch.bfloat16
            assert cache.stride(3) == 1 and cache.data_ptr() % 16 == 0
        found = torch.empty_like(q) if out is None else out
        for i in range(len(last)):
            length = (int(begins[i + 1] - begins[i]) - 1) * page + int(last[i])
            key, value = (self._rows(each, begins, indices, i, length) for each in (keys, values))
            first = 0 if window < 0 else max(0, length - 1 - window)
            query = q[i].double().view(kv_heads, -1, dim)
            scores = torch.einsum("kgd,skd->kgs", query, key[first:]) * scale
            mixed = torch.einsum("kgs,skd->kgd", scores.softmax(-1), value[first:])
            found[i] = mixed.flatten(0, 1).to(torch.bfloat16)
        self.ran += 1
        return found


class BatchMLAPagedAttentionWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer: Tensor, use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None, kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None, kv_len_arr: Tensor | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        assert backend == "fa2"
        buffers = {"queries": qo_indptr, "indptr": kv_indptr, "indices": kv_indices,
                   "lengths": kv_len_arr}  # fmt: skip
        super().__init__(float_workspace_buffer, use_cuda_graph, buffers)

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor,
        num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool,
        sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:  # fmt: skip
        assert q_data_type == kv_data_type == torch.bfloat16
        assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1))
        self._keep(queries=qo_indptr, indptr=kv_indptr, indices=kv_indices, lengths=kv_len_arr)
        self.planned = (num_heads, head_dim_ckv, head_dim_kpe, page_size, sm_scale)

    def run(
        self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        heads, rank, rope, page, scale = self.planned
        names = ("indptr", "indices", "lengths")
        begins, indices, lengths = (self.buffers[name] for name in names)
        for query, cache, width in ((q_nope, ckv_cache, rank), (q_pe, kpe_cache, rope)):
            assert query.shape == (len(lengths), heads, width) and query.dtype == torch.bfloat16
            assert cache.shape[1:] == (page, width) and cache.dtype == torch.bfloat16
            assert query.stride(2) == cache.stride(2) == 1
            assert query.data_ptr() % 16 == cache.data_ptr() % 16 == 0
        found = q_nope.new_empty(q_nope.shape) if out is None else out
        assert found.shape == q_nope.shape and found.dtype == torch.bfloat16
        for i, length in enumerate(lengths.tolist()):
            latent, turned = (
                self._rows(each, begins, indices, i, length) for each in (ckv_cache, kpe_cache)
            )
            scores = q_nope[i].double() @ latent.t() + q_pe[i].double() @ turned.t()
            found[i] = ((scores * scale).softmax(-1) @ latent).to(torch.bfloat16)
        self.ran += 1
        return found


MODULE = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=BatchMLAPagedAttentionWrapper),
)
