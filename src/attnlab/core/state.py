"""The state of a streaming mixer: named tensors whose first dimension is the batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class _Room:
    """Memory behind a tensor that grows: ``buffer`` holds it and more, of which ``filled`` along ``dim`` is spoken for."""

    buffer: Tensor
    filled: int

    @classmethod
    def around(cls, tensor: Tensor, dim: int, size: int) -> _Room:
        """A copy of ``tensor`` with room for ``size`` along ``dim`` and a quarter more."""
        shape = list(tensor.shape)
        shape[dim] = size + size // 4 + 64
        buffer = tensor.new_empty(shape)
        buffer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        return cls(buffer, tensor.shape[dim])


class State(Mapping[str, Tensor]):
    """Immutable mapping of names to tensors of shape (batch, ...).

    Everything that a mixer carries from one piece of a sequence to the next is in here, so that saving, moving and
    re-ordering need no knowledge of the mechanism.

    Args:
        tensors: names to tensors; all have the same first dimension.

    Raises:
        ValueError: if the batch sizes differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"state: expected one batch size in every tensor, got {sizes}")
        self._tensors = dict(tensors)
        self._rooms: dict[str, _Room] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"State({inside})"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """A copy on ``device``; ``dtype`` applies to floating-point tensors alone."""
        return State(
            {
                name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                for name, tensor in self._tensors.items()
            }
        )

    def detach(self) -> State:
        """The same values without their history, for truncated back-propagation."""
        return State({name: tensor.detach() for name, tensor in self._tensors.items()})

    def select(self, indices: Int[Tensor, "k"]) -> State:
        """The examples at ``indices`` of the batch, repeats allowed: re-ordering for beam search."""
        return State({name: tensor.index_select(0, indices) for name, tensor in self._tensors.items()})

    def replace(self, **tensors: Tensor) -> State:
        """A state with these tensors in place of those of the same names, and the others as they are."""
        after = State({**self._tensors, **tensors})
        after._rooms = {name: room for name, room in self._rooms.items() if name not in tensors}
        return after

    def grow(self, dim: int, **pieces: Tensor) -> State:
        """A state with ``pieces`` appended to the tensors of the same names along ``dim``; this one stays valid.

        Without gradients the tensors grow into spare memory behind them, so that a token costs a token's copy. A state that
        grows a second time, as in a beam, finds that memory taken and is copied.
        """
        after = self.replace()
        for name, piece in pieces.items():
            old = self._tensors[name]
            if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (old.requires_grad or piece.requires_grad)):
                after._tensors[name] = torch.cat((old, piece), dim=dim)
                after._rooms.pop(name, None)
                continue
            have, size = old.shape[dim], old.shape[dim] + piece.shape[dim]
            room = self._rooms.get(name)
            if room is None or room.filled != have or room.buffer.shape[dim] < size:
                room = _Room.around(old, dim, size)
            room.buffer.narrow(dim, have, piece.shape[dim]).copy_(piece)
            room.filled = size
            after._tensors[name], after._rooms[name] = room.buffer.narrow(dim, 0, size), room
        return after

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix + name``, to be put into a larger state."""
        return {prefix + name: tensor for name, tensor in self._tensors.items()}

    def part(self, prefix: str) -> State:
        """The tensors whose names begin with ``prefix``, without it: the inverse of `prefixed`."""
        return State({name[len(prefix) :]: t for name, t in self._tensors.items() if name.startswith(prefix)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        save_file({name: tensor.detach().contiguous() for name, tensor in self._tensors.items()}, os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> State:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        return cls(load_file(os.fspath(path), device=device))


@dataclass(frozen=True)
class Before:
    """What a piece of a sequence must know of the tokens before it, apart from what the mixer remembers of them.

    Args:
        tokens: the last w tokens (b, w, dim), as many as the mixer's ``lookback``; zeros where there are none.
        mask: which of these are real (b, w).
        count: how many tokens there are before the piece (b,).
        real: how many of them are real (b,).
    """

    tokens: Float[Tensor, "b w c"]
    mask: Bool[Tensor, "b w"]
    count: Int[Tensor, "b"]
    real: Int[Tensor, "b"]
