"""Hand what happens inside a forward pass to whoever listens; nobody listening costs one comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


class Tape:
    """What was recorded: name to the tensors emitted under it, in order.

    A name is the module's path in the recorded model, a slash, and what is emitted: ``blocks.3.mixer/attention``; of a bare
    mixer it is just ``attention``.
    """

    def __init__(self, model: nn.Module, *, only: Sequence[str] | None = None, detach: bool = False) -> None:
        self.only, self.detach = only, detach
        self.items: dict[str, list[Tensor]] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}

    def __getitem__(self, name: str) -> Tensor:
        """The last tensor emitted under ``name``; KeyError lists what there is."""
        if name not in self.items:
            raise KeyError(f"{name!r} was not recorded; there is {sorted(self.items)}")
        return self.items[name][-1]

    def __contains__(self, name: object) -> bool:
        return name in self.items

    def matching(self, suffix: str) -> dict[str, Tensor]:
        """The last tensor of every name that ends with ``suffix``."""
        return {name: tensors[-1] for name, tensors in self.items.items() if name.endswith(suffix)}

    def add(self, module: nn.Module, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Record ``value``; modules outside the recorded model and names that are not wanted are passed over."""
        path = self._paths.get(id(module))
        if path is None or (self.only is not None and name not in self.only):
            return
        if not isinstance(value, Tensor):
            value = value()
        key = f"{path}/{name}" if path else name
        self.items.setdefault(key, []).append(value.detach() if self.detach else value)


_tapes: list[Tape] = []


@contextmanager
def record(model: nn.Module, *, only: Sequence[str] | None = None, detach: bool = False) -> Iterator[Tape]:
    """Collect what the mixers of ``model`` emit while the block runs.

    Args:
        model: a mixer, or any module that holds mixers.
        only: what to keep, without the path ("attention", "router"); None keeps all. Maps are only formed if they are kept.
        detach: drop the autograd history of what is kept.
    """
    tape = Tape(model, only=only, detach=detach)
    _tapes.append(tape)
    try:
        yield tape
    finally:
        _tapes.remove(tape)


def recording() -> bool:
    """Whether anyone listens: ask before computing something only to emit it."""
    return len(_tapes) > 0


def emit(module: nn.Module, name: str, value: Tensor | Callable[[], Tensor]) -> None:
    """Hand ``value``, or what calling it gives, to the open recordings that want it, under the path of ``module``."""
    for tape in _tapes:
        tape.add(module, name, value)
