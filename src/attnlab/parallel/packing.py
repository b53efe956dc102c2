"""Tensors of any dtypes as one message of bytes, and back: collectives only carry, so that no dtype needs their support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

_ALIGNMENT = 16  # a message may be seen as any dtype from a multiple of its size on


class Kind(NamedTuple):
    """What must be known of a tensor to read it from bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        """That of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Its bytes, without what aligns the next one."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Its bytes in a message."""
        return -(-self.bytes // _ALIGNMENT) * _ALIGNMENT


def message_size(kinds: Sequence[Kind]) -> int:
    """Bytes of a message."""
    return sum(kind.room for kind in kinds)


def pack(tensors: Sequence[Tensor], device: torch.device) -> UInt8[Tensor, " s"]:
    """One message on ``device``, without history."""
    message = torch.zeros(message_size([Kind.of(tensor) for tensor in tensors]), dtype=torch.uint8, device=device)
    start = 0
    for tensor in tensors:
        kind = Kind.of(tensor)
        if kind.bytes:
            message[start : start + kind.bytes] = tensor.detach().resolve_conj().reshape(-1).view(torch.uint8).to(device)
        start += kind.room
    return message


def unpack(message: UInt8[Tensor, " s"], kinds: Sequence[Kind], device: torch.device) -> list[Tensor]:
    """The tensors of a message, on ``device``."""
    tensors, start = [], 0
    for kind in kinds:
        raw = message[start : start + kind.bytes].to(device)
        tensors.append(raw.clone().view(kind.dtype).reshape(kind.shape) if kind.bytes else _nothing(kind, device))
        start += kind.room
    return tensors


def _nothing(kind: Kind, device: torch.device) -> Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device=device)
