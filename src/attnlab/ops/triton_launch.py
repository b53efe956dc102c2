"""Where kernels written in Triton run, and how they cut their work; shared by the ops that have some.

This module never imports Triton: an op's kernels are imported when its ``triton`` backend is first used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

SHORTEST = 256
"""Tokens of the shortest segment: below it the states between segments move more bytes than the tokens do."""

WIDEST = 128
"""Width of the widest head: a program holds all rows of some columns of its state in registers."""

UNTRIED = "its tests pass in the interpreter and have not passed on a GPU yet; backend='triton' and use_backend('triton') take it"
"""Why "auto" leaves a kernel alone."""

OLDEST = (3, 6)
"""The first version of Triton with which the kernels were compiled."""

_absence: list[str | None] = []


def limits(dtypes: tuple[torch.dtype, ...], max_width: int | None = None) -> Callable[[Tensor], str | None]:
    """The limit of an op whose kernels take these ``dtypes``, and heads of at most ``max_width``."""

    def refusal(sample: Tensor) -> str | None:
        if sample.dtype not in dtypes:
            return f"the kernel takes {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {sample.dtype}"
        if max_width is not None and sample.shape[-1] > max_width:
            return f"the kernel takes heads of width {max_width} at most, got {sample.shape[-1]}"
        return _no_device(sample.device.type, sample.device.index)

    return refusal


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _no_device(kind: str, index: int | None) -> str | None:
    """Why Triton cannot run on a device."""
    if kind == "cuda":
        if torch.version.hip is not None:
            return "the kernels are tested on NVIDIA GPUs alone"
        if torch.cuda.get_device_capability(index) < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 or later"
    elif kind != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {kind}, and Triton needs a GPU, or TRITON_INTERPRET=1 for its interpreter"
    if not _absence:
        try:
            version = import_module("triton").__version__
            old = tuple(map(int, version.split(".")[:2])) < OLDEST
            _absence.append(f"the kernels need Triton {OLDEST[0]}.{OLDEST[1]} or later, got {version}" if old else None)
        except Exception as error:  # a Triton that is installed and broken fails in many ways, and none may reach the user
            _absence.append(f"Triton cannot be imported ({type(error).__name__}: {error})")
    return _absence[0]


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels launched inside run on the GPU that holds ``x``."""
    return torch.cuda.device_of(x)


def dot_precision(x: Tensor) -> str:
    """How kernels multiply rows like ``x``: never in TF32; half precisions go to tensor cores as they are.

    The interpreter would multiply the bits of bfloat16 numbers as integers, so that there they are widened, which changes no
    product.
    """
    return "widened" if x.dtype != torch.float32 and not x.is_cuda else "ieee"


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is neither below ``size`` nor ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def segment_length(x: Tensor, length: int, parallel: int, multiple: int, programs: int = 4, shortest: int = 0) -> int:
    """Tokens of a segment, a ``multiple`` and at least ``shortest`` (0: `SHORTEST`), where ``parallel`` programs run for each.

    Just enough segments for ``programs`` on every multiprocessor of the GPU of ``x``; in the interpreter as many as there can be.
    """
    wanted = length
    if x.is_cuda:
        wanted = programs * torch.cuda.get_device_properties(x.device).multi_processor_count // max(1, parallel)
    tokens = max(shortest or SHORTEST, -(-length // max(1, wanted)))
    return -(-tokens // multiple) * multiple


def segment_room(length: int) -> int:
    """At least the number of segments, whatever the GPU; needs no guard on a symbolic length."""
    return length // SHORTEST + 1


def packed(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``x`` with neighbours in the last axis next to each other, copied only where they aren't."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_heads(like: Tensor, width: int) -> Float[Tensor, "b h n w"]:
    """New (b, h, n, width) in memory ordered (b, n, h, width), so that joining the heads copies nothing."""
    b, h, n = like.shape[:3]
    return like.new_empty(b, n, h, width).transpose(1, 2)
