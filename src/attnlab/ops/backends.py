"""Which implementation of an op runs: ``reference`` (the oracle), ``eager`` (PyTorch, CPU and GPU), ``triton`` (GPU)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnlab.core.errors import BackendUnavailableError, UnknownNameError, nearest

BACKENDS = ("auto", "reference", "eager", "triton")
_OPS: dict[str, Op] = {}
_preferred: list[str] = []


@dataclass(frozen=True)
class Choice:
    """The backend that an op takes for an input, and the reason in words."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Op:
    """The implementations of one operator.

    Args:
        name: the operator's name, as `attnlab.explain_backend` takes it.
        implementations: backend name to a function, or to ``"module:function"`` for one that is imported when first used.
        limits: backend name to a function of the first tensor that returns a reason why it cannot run there, or None.
        untried: backend name to what is not proven of it yet: it runs where it is asked for, and "auto" leaves it alone.
    """

    name: str
    implementations: Mapping[str, Callable[..., Any] | str]
    limits: Mapping[str, Callable[[Tensor], str | None]] = field(default_factory=dict)
    untried: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _OPS[self.name] = self

    def explain(self, backend: str, sample: Tensor) -> Choice:
        """The choice for an input like ``sample``; raises where an explicit ``backend`` cannot be honoured."""
        if backend not in BACKENDS:
            raise UnknownNameError(f"backend: expected one of {BACKENDS}, got {backend!r}{nearest(backend, BACKENDS)}")
        if backend == "auto" and _preferred:
            backend = _preferred[-1]
        if backend != "auto":
            if backend not in self.implementations:
                have = ", ".join(self.implementations)
                raise BackendUnavailableError(f"op {self.name!r} has no backend {backend!r}; it has {have}")
            if (reason := self._refusal(backend, sample)) is not None:
                raise BackendUnavailableError(f"op {self.name!r}, backend {backend!r}: {reason}")
            return Choice(self.name, backend, "asked for")
        if "triton" in self.implementations and sample.is_cuda:
            if (reason := self.untried.get("triton", self._refusal("triton", sample))) is None:
                return Choice(self.name, "triton", "the input is on a GPU and the kernel supports it")
            return Choice(self.name, "eager", f"triton is out: {reason}")
        return Choice(self.name, "eager", f"the fast PyTorch path for {sample.device.type}")

    def __call__(self, backend: str, sample: Tensor) -> Callable[..., Any]:
        """The function that `explain` chooses."""
        found = self.implementations[self.explain(backend, sample).backend]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = getattr(sys.modules[_imported(module)], attribute)
        return found  # type: ignore[return-value]

    def _refusal(self, backend: str, sample: Tensor) -> str | None:
        limit = self.limits.get(backend)
        return limit(sample) if limit is not None else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile traces no import
def _imported(module: str) -> str:
    """Import ``module`` unless that is done, and return its name."""
    return importlib.import_module(module).__name__


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums run: float32 for half precisions, otherwise ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside the block every op called with ``backend="auto"`` takes ``backend``, and raises where it cannot.

    with attnlab.use_backend("reference"):
        expected = mixer(x)
    """
    if backend not in BACKENDS:
        raise UnknownNameError(f"backend: expected one of {BACKENDS}, got {backend!r}{nearest(backend, BACKENDS)}")
    _preferred.append(backend)
    try:
        yield
    finally:
        _preferred.pop()


def explain_backend(op: str, sample: Tensor, backend: str = "auto") -> Choice:
    """Which backend the op called ``op`` takes for an input like ``sample``, and why."""
    if op not in _OPS:
        with suppress(ModuleNotFoundError):
            importlib.import_module(f"attnlab.ops.{op}")
    if op not in _OPS:
        raise UnknownNameError(f"unknown op {op!r}{nearest(op, _OPS) or f'; known: {sorted(_OPS)}'}")
    return _OPS[op].explain(backend, sample)
