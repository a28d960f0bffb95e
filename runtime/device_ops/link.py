"""One rank's side of the collectives between ranks, over torch.distributed: NCCL between GPUs, Gloo
else; hides connecting, unequal rows and time limits.

All ranks call the same collectives in the same order (the steps on "link"). Rows travel as raw
bytes, so every type is served by either transport. A collective that a rank does not come to within
`seconds`, or whose rank is gone, is a `WorkerError`, and `failed` is set: nothing can be sent any
more until the next `connect`.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from hmc.errors import MachineError, WorkerError
from hmc.runtime.device_ops.shares import Share, of_share


class Link:
    """The way to the other ranks; `sent` counts the bytes handed to collectives for them (a gather
    sends a rank's rows to each)."""

    def __init__(self, rank: int, ranks: int, seconds: float) -> None:
        self.rank, self.ranks, self.seconds = rank, ranks, seconds
        self.failed = False
        self.sent = 0
        self._group: Any = None
        self._wire = torch.device("cpu")

    def connect(self, store: Path, device: torch.device) -> None:
        """Meet the others at a file that all know; `device` is where this rank computes.

        Raises `WorkerError` when they do not come, `MachineError` without a transport.
        """
        self.failed = False
        limit = timedelta(seconds=self.seconds)
        try:
            meeting = FileStore(str(store), self.ranks)
            meeting.set_timeout(limit)
            self._group = self._joined(meeting, device, limit)
        except (RuntimeError, ValueError) as error:
            self.failed = True
            raise WorkerError(
                f"rank {self.rank} could not connect to the other ranks: {_first_line(error)}"
            ) from error

    def _joined(self, meeting: Any, device: torch.device, limit: timedelta) -> Any:
        if device.type == "cuda" and distributed.is_nccl_available():
            self._wire = device
            # a rank that does not answer is to end in an error here, not in the end of the process
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            chosen = distributed.ProcessGroupNCCL.Options()
            chosen._timeout = limit
            with torch.cuda.device(device):
                return distributed.ProcessGroupNCCL(meeting, self.rank, self.ranks, chosen)
        if not distributed.is_gloo_available():
            raise MachineError("this PyTorch has no Gloo: several GPUs need one built with it")
        kind: Any = distributed.ProcessGroupGloo  # its stubs leave options out
        options = kind._Options()
        options._timeout = limit
        options._devices = [kind.create_device(hostname="127.0.0.1")]
        return kind(meeting, self.rank, self.ranks, options)

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `part`, by rank, on the wire's device; of the same shape and type on all."""
        sent = part.to(self._wire).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.ranks)]
        self._done("allgather", [[_raw(each) for each in found]], [_raw(sent)])
        self.sent += (self.ranks - 1) * sent.nbytes
        return found

    def partial_sums(self, part: torch.Tensor, tokens: int, rows: slice) -> list[torch.Tensor]:
        """Of partial sums [tokens, width], each other rank's of `rows` of this rank's share, in
        bf16 and by rank (this rank's own: f32 as it is). `rows` are the same on all ranks; the last
        of them may be missing in a share."""
        shares = [Share("rank", rank, self.ranks) for rank in range(self.ranks)]
        kept = of_share(part, shares.pop(self.rank), tokens, rows)
        own = len(kept)
        away = [of_share(part, share, tokens, rows).to(torch.bfloat16) for share in shares]
        sent = torch.cat(away).to(self._wire)
        found = sent.new_empty((self.ranks - 1) * own, part.shape[1])
        outgoing, incoming = [len(each) for each in away], [own] * (self.ranks - 1)
        for counts in (outgoing, incoming):
            counts.insert(self.rank, 0)
        self._done("alltoall_base", _raw(found), _raw(sent), incoming, outgoing)
        self.sent += sent.nbytes
        parts = list(torch.split(found, own)) if own else [found] * (self.ranks - 1)
        parts.insert(self.rank, kept)
        return parts

    def broadcast(self, rows: torch.Tensor) -> torch.Tensor:
        """Rank 0's `rows`, of the same shape and type on all ranks."""
        sent = rows.to(self._wire).contiguous()
        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._done("broadcast", [_raw(sent)], options)
        if self.rank == 0:
            self.sent += (self.ranks - 1) * sent.nbytes
        return sent

    def close(self) -> None:
        """Leave the group; collectives under way end in an error where the transport can."""
        group, self._group = self._group, None
        if group is not None and self._wire.type == "cuda":
            group.abort()

    def _done(self, name: str, *arguments: Any) -> None:
        """Do a collective: on the CPU to its end, on a GPU in the order of its stream."""
        group = self._group
        if group is None or self.failed:
            raise WorkerError(f"rank {self.rank} is not connected to the other ranks")
        try:
            getattr(group, name)(*arguments).wait()
        except RuntimeError as error:
            self.failed = True
            raise WorkerError(
                f"rank {self.rank} got no answer from another rank: {_first_line(error)}"
            ) from error


def _raw(rows: torch.Tensor) -> torch.Tensor:
    """The bytes of contiguous rows, [rows, bytes]."""
    return rows.view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
