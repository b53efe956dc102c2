"""The processes that train one model together: each has a part of every batch, all have the same parameters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.core.optional import optional
from attnlab.tasks.contract import IGNORE, Batch

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16}


def make_accelerator(**options: Any) -> Any:
    """An `accelerate.Accelerator`, which joins the processes that torchrun or ``accelerate launch`` has started.

    Args:
        **options: of Accelerator.

    Raises:
        MissingPackageError: accelerate is not installed.
    """
    return optional("accelerate", "accelerate", "training in several processes").Accelerator(**options)


class Processes:
    """This process and those beside it.

    Args:
        accelerator: an `accelerate.Accelerator`; None is this process alone, for which nothing else is installed.

    Raises:
        ValueError: for mixed precision other than bfloat16's, which would need the loss to be scaled.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.size: int = 1 if accelerator is None else accelerator.num_processes
        chosen = "no" if accelerator is None else str(accelerator.mixed_precision)
        if chosen not in AUTOCAST:
            raise ValueError(f"accelerator: expected mixed_precision to be one of {sorted(AUTOCAST)}, got {chosen!r}")
        self.autocast = AUTOCAST[chosen]

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def place(self, model: nn.Module) -> None:
        """Put ``model`` where this process computes, with the main process's parameters and buffers."""
        if self._accelerator is not None:
            model.to(self._accelerator.device)
        self._broadcast(model.state_dict().values())

    def pieces(self, batch: Batch, count: int) -> list[Batch]:
        """This process's examples of a batch that all have drawn, in ``count`` pieces, as even as they can be."""
        own = cut(batch, self.size)[self.rank]
        return [piece for piece in cut(own, count) if len(piece)]

    @torch.no_grad()
    def add_up(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Replace gradients by their sums over the processes; the sum of ``loss``.

        A parameter that no process has a gradient for keeps None, so that the optimiser leaves it alone. Half precisions are
        added in float32.
        """
        if self.size == 1:
            return loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        have = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.float64, device=loss.device)
        head = self._sum(torch.cat((loss.double().reshape(1), have)))
        present = [p for p, count in zip(trained, head[1:].tolist(), strict=True) if count]
        for dtype in dict.fromkeys(parameter.dtype for parameter in present):
            same = [parameter for parameter in present if parameter.dtype == dtype]
            flat = self._sum(torch.cat([_as_reals(parameter) for parameter in same]))
            sizes = [parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in same]
            for parameter, total in zip(same, flat.split(sizes), strict=True):
                wide = torch.view_as_complex(total.reshape(-1, 2)) if parameter.is_complex() else total
                parameter.grad = wide.reshape(parameter.shape).to(dtype)
        return head[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the main one's buffers: running means and the like, which differ with the examples seen."""
        if self.size > 1:
            kept = model.state_dict()
            self._broadcast(kept[name] for name, _ in model.named_buffers() if name in kept)

    def main_says(self, flag: bool) -> bool:
        """The main process's ``flag``, on all."""
        if self.size == 1:
            return flag
        own = torch.tensor(float(flag and self.main), device=self._accelerator.device)
        return bool(self._sum(own).item())

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in their order; it may be anything that pickle takes."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            self._accelerator.wait_for_everyone()

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._accelerator.reduce(tensor, reduction="sum")

    @torch.no_grad()
    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        if self.size == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            flat.copy_(broadcast(flat.detach().clone(memory_format=torch.contiguous_format)))


def cut(batch: Batch, count: int) -> list[Batch]:
    """A batch in ``count`` pieces of its examples in order, whose sizes differ by one at most."""
    if count == 1:
        return [batch]
    edges = [len(batch) * number // count for number in range(count + 1)]
    return [batch.each(lambda value, rows=slice(a, b): value[rows]) for a, b in pairwise(edges)]  # type: ignore[misc]


def targets_in(batch: Batch) -> int:
    """Targets that take part in the loss: what its mean is over."""
    targets = batch.targets
    takes_part = ~targets.isnan() if targets.is_floating_point() else targets != IGNORE
    return int(takes_part.sum())


def _as_reals(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return (gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient).reshape(-1)
