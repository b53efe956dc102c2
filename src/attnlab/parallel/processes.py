"""Ranks that are processes of torch.distributed, and how they begin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab.parallel.packing import Kind, message_size, pack, unpack
from attnlab.parallel.ranks import Gathered, Ranks, Traffic

_HOW = (
    "start the script by `torchrun --nproc-per-node=4 script.py` and call attnlab.parallel.start() in it; "
    "attnlab.parallel.simulate does the same in one process"
)


def start(backend: str | None = None, *, timeout: float | int = 60.0) -> None:
    """Join the processes that torchrun started: `torch.distributed.init_process_group` with a timeout of a minute, not of many.

    Args:
        backend: "gloo" or "nccl"; by default "nccl" where there is CUDA.
        timeout: seconds after which a collective that some rank does not take part in raises on the others. A rank that ends
            is noticed at once.

    Raises:
        RuntimeError: outside torchrun, or if it is called twice.
        ValueError: for a timeout that is not positive.
    """
    if timeout <= 0:
        raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
    _demand_distributed()
    if dist.is_initialized():
        raise RuntimeError("start: expected no process group yet, got one; torch.distributed.destroy_process_group() ends it")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(f"start: expected to run under torchrun, got no {', '.join(missing)} in the environment; {_HOW}")
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(chosen, timeout=timedelta(seconds=timeout))


class ProcessRanks(Ranks):
    """The processes of a group.

    Args:
        group: of torch.distributed; None is all processes.
        size: how many ranks are expected; None takes as many as there are.
        traffic: where to count, or None.

    Raises:
        RuntimeError: if there is no process group.
        ValueError: if this process is not in the group, or the group is of another size.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, size: int | None = None, traffic: Traffic | None = None
    ) -> None:
        _demand_distributed()
        if not dist.is_initialized():
            raise RuntimeError(f"group: expected an initialised process group, got none; {_HOW}")
        self.group = group
        self._rank, have = dist.get_rank(group), dist.get_world_size(group)
        if self._rank < 0:
            raise ValueError(f"group: expected one that this process is in, got one without global rank {dist.get_rank()}")
        if size is not None and size != have:
            raise ValueError(f"size: expected {size} ranks, got a group of {have}; start with torchrun --nproc-per-node={size}")
        super().__init__(have, traffic)
        self.device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    @property
    def rank(self) -> int:
        """Which of the group this process is."""
        return self._rank

    def gather(self, what: str, tensors: Sequence[Tensor], *, uneven: bool = False, gradient: bool = False) -> Gathered:
        """See `Ranks`; a message is padded to the longest."""
        kinds = self._kinds(tensors) if uneven else [[Kind.of(tensor) for tensor in tensors]] * self.size
        if not gradient:
            return Gathered(self.carry(what, tensors, kinds))
        # Without something that needs a gradient a rank would not take part in backward, and the others would wait.
        anchor = torch.zeros((), requires_grad=True)
        token, *flat = _Gather.apply(self, what, kinds, anchor, *tensors)
        count = len(tensors)
        return Gathered([flat[rank * count : (rank + 1) * count] for rank in range(self.size)], token)

    def tie(self, x: Tensor, token: Tensor | None) -> Tensor:
        """See `Ranks`."""
        return x if token is None else _Tie.apply(x, token)

    def carry(self, what: str, tensors: Sequence[Tensor], kinds: Sequence[Sequence[Kind]]) -> list[list[Tensor]]:
        """All ranks' tensors, without gradients; ``kinds`` are those of every rank."""
        message, device = pack(tensors, self.device), _device(tensors)
        longest = max(map(message_size, kinds))
        self.count(what, longest * (self.size - 1))
        message = torch.nn.functional.pad(message, (0, longest - len(message)))
        messages = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(messages, message, group=self.group)
        return [unpack(one, own, device) for one, own in zip(messages, kinds, strict=True)]

    def hand_back(self, what: str, tensors: Sequence[Sequence[Tensor]], kinds: Sequence[Kind]) -> list[list[Tensor]]:
        """Give each rank the tensors at its place, and take what each has for this one, which are of ``kinds``."""
        device = _device([tensor for each in tensors for tensor in each])
        outgoing = [pack(each, self.device) for each in tensors]
        self.count(what, sum(map(len, outgoing)) - len(outgoing[self.rank]))
        size = message_size(kinds)
        incoming = torch.empty(size * self.size, dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(incoming, torch.cat(outgoing), [size] * self.size, list(map(len, outgoing)), group=self.group)
        return [unpack(one, kinds, device) for one in (incoming.split(size) if size else [incoming] * self.size)]

    def _kinds(self, tensors: Sequence[Tensor]) -> list[list[Kind]]:
        """Those of every rank: numbers of dimensions and dtypes agree, shapes are exchanged."""
        shapes = torch.tensor([side for tensor in tensors for side in tensor.shape], dtype=torch.int64)
        kinds = []
        for (sides,) in self.carry("shapes", [shapes], [[Kind.of(shapes)]] * self.size):
            rest = sides.tolist()
            own = []
            for tensor in tensors:
                shape, rest = rest[: tensor.dim()], rest[tensor.dim() :]
                own.append(Kind(tuple(shape), tensor.dtype))
            kinds.append(own)
        return kinds


class _Gather(torch.autograd.Function):
    """All ranks' tensors in one all-gather; backward hands every rank the gradients of what it gave, in one all-to-all."""

    @staticmethod
    def forward(
        ctx: Any, ranks: ProcessRanks, what: str, kinds: Sequence[Sequence[Kind]], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.what, ctx.kinds = ranks, what, kinds
        flat = [tensor for piece in ranks.carry(what, tensors, kinds) for tensor in piece]
        ctx.mark_non_differentiable(*(tensor for tensor in flat if not _differentiable(tensor.dtype)))
        return anchor.clone(), *flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks, count = ctx.ranks, len(ctx.kinds[0])
        wanted = [index for index, kind in enumerate(ctx.kinds[0]) if _differentiable(kind.dtype)]
        each = [[grads[rank * count + index] for index in wanted] for rank in range(ranks.size)]
        own = [ctx.kinds[ranks.rank][index] for index in wanted]
        received = ranks.hand_back(f"{ctx.what} backward", each, own)
        sums: list[Tensor | None] = [None] * count
        for place, index in enumerate(wanted):
            parts = torch.stack([piece[place] for piece in received])
            sums[index] = parts.sum(0, dtype=_wide(parts.dtype)).to(parts.dtype)
        return None, None, None, None, *sums


class _Tie(torch.autograd.Function):
    """The first tensor as it is; backward also visits the token's collective, with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros(())


def _demand_distributed() -> None:
    if not dist.is_available():
        raise RuntimeError("group: expected a torch with torch.distributed, got one built without; simulate needs none")


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
