"""Gradients of parameters, summed over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnlab.ops.backends import accumulate_dtype
from attnlab.parallel.layout import compare
from attnlab.parallel.processes import ProcessRanks
from attnlab.parallel.ranks import Traffic


@torch.no_grad()
def reduce_gradients(module: nn.Module, group: dist.ProcessGroup | None = None, *, traffic: Traffic | None = None) -> None:
    """Replace every parameter's gradient by the sum of all ranks', so that they are those of the whole sequence.

    To be called after backward and before the optimiser's step, on every rank. A parameter that no rank has a gradient for
    keeps None; half precisions are added up in float32.

    Args:
        module: what was run, in pieces.
        group: of torch.distributed; None is all processes.
        traffic: counts what is sent, if given.

    Raises:
        RuntimeError: without a process group.
        ValueError: on every rank alike, if the parameters' shapes or dtypes differ between ranks.
    """
    ranks = ProcessRanks(group, traffic=traffic)
    named = dict(module.named_parameters())
    compare(ranks, {"parameters": "\n".join(f"{name}: {tuple(p.shape)} {p.dtype}" for name, p in named.items())})
    have = torch.tensor([parameter.grad is not None for parameter in named.values()], dtype=torch.bool)
    anywhere = torch.stack([flags for (flags,) in ranks.gather("header", [have]).pieces]).any(0).tolist()
    wanted = [parameter for parameter, some in zip(named.values(), anywhere, strict=True) if some]
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in wanted:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for dtype, parameters in by_dtype.items():
        flat = torch.cat([_gradient(parameter).to(accumulate_dtype(dtype)).reshape(-1) for parameter in parameters])
        ranks.count("gradients", flat.numel() * flat.element_size() * 2 * (ranks.size - 1) // ranks.size)
        dist.all_reduce(flat, group=group)
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.reshape(parameter.shape).to(dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
