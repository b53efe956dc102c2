"""What ranks tell each other before anything else: how long their pieces are, and whether they mean the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attnlab.parallel.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """How a sequence is spread.

    Args:
        rank: whose piece is meant.
        lengths: tokens of every rank's piece.
        real: (ranks, b), real tokens of each; None where no rank has a mask.
        gradient: whether any rank differentiates.
    """

    rank: int
    lengths: tuple[int, ...]
    real: Int[Tensor, "w b"] | None
    gradient: bool

    @property
    def start(self) -> int:
        """Tokens before the piece."""
        return sum(self.lengths[: self.rank])

    def real_before(self, batch: int, device: torch.device) -> Int[Tensor, " b"]:
        """Real tokens before the piece."""
        if self.real is None:
            return torch.full((batch,), self.start, device=device)
        return self.real[: self.rank].sum(0)

    def mask_of(self, mask: Bool[Tensor, "b n"] | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """The piece's mask: one is made where only other ranks gave some."""
        return torch.ones(shape, dtype=torch.bool, device=device) if mask is None and self.real is not None else mask


def find_layout(
    ranks: Ranks,
    x: Tensor,
    mask: Bool[Tensor, "b n"] | None,
    module: nn.Module,
    problem: Exception | None = None,
    options: str = "",
) -> Layout:
    """The layout of this call, after all ranks have compared what they were given.

    Args:
        ranks: all of them.
        x: the piece, (b, n, ...).
        mask: its mask.
        module: what is to run, for its parameters.
        problem: what is wrong with this rank's input, or None.
        options: what must be the same beside, in lines.

    Raises:
        ValueError: on every rank alike, if some rank's input is wrong, or differs from another's in more than its length.
    """
    if problem is None:
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
        rows = compare(ranks, _facts(x, module, options), (x.shape[1], int(mask is not None), int(learns)))
    else:
        rows = compare(ranks, dict.fromkeys(_FACTS, ""), (0, 0, 0), problem)
    lengths, masked, learning = zip(*rows, strict=True)
    real = None
    if any(masked):
        own = torch.full((len(x),), x.shape[1], device=x.device) if mask is None else mask.sum(1)
        real = torch.stack([counts for (counts,) in ranks.gather("masks", [own]).pieces])
    return Layout(ranks.rank, tuple(lengths), real, any(learning))


_FACTS = ("batch", "width", "dtype", "device", "autocast", "gradients", "mode", "options")


def _facts(x: Tensor, module: nn.Module, options: str) -> dict[str, str]:
    """What must be the same on every rank."""
    values = (
        len(x),
        tuple(x.shape[2:]),
        x.dtype,
        x.device.type,
        "on" if torch.is_autocast_enabled(x.device.type) else "off",
        "on" if torch.is_grad_enabled() else "off",
        "training" if module.training else "evaluation",
        options,
    )
    return dict(zip(_FACTS, map(str, values), strict=True))


def compare(
    ranks: Ranks, facts: Mapping[str, str], numbers: tuple[int, ...] = (), problem: Exception | None = None
) -> list[list[int]]:
    """Every rank's ``numbers``, once it is sure that ``facts`` are the same on all and none has a ``problem``.

    All that is exchanged has a fixed size, so that no disagreement can make ranks wait for each other.

    Raises:
        ValueError: on every rank alike.
    """
    row = torch.tensor([int(problem is not None), *numbers, *map(_number, facts.values())], dtype=torch.int64)
    rows = [piece.tolist() for (piece,) in ranks.gather("header", [row]).pieces]
    count = len(numbers) + 1
    if any(row[0] for row in rows):
        texts = _exchange_texts(ranks, "" if problem is None else str(problem))
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
        raise ValueError(f"{text} (on rank {rank} of {ranks.size})") from problem
    unequal = [name for place, name in enumerate(facts, count) if len({row[place] for row in rows}) > 1]
    if unequal:
        name = unequal[0]
        texts = _exchange_texts(ranks, facts[name])
        raise ValueError(f"{name}: expected the same on every rank, got {_differences(texts)}")
    return [row[1:count] for row in rows]


def describe(module: nn.Module) -> str:
    """A module's structure and simple options in lines: what makes two of them compute the same from the same parameters."""
    lines = []
    for path, part in module.named_modules():
        lines.append(f"{path}: {type(part).__qualname__}")
        for name, value in sorted(vars(part).items()):
            if isinstance(value, bool | int | float | str | None) and name != "training" and not name.startswith("_"):
                lines.append(f"{path}.{name} = {value!r}".lstrip("."))
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        lines.append(f"{name}: {tuple(parameter.shape)} {parameter.dtype}")
    return "\n".join(lines)


def checksum(module: nn.Module) -> str:
    """Lines that differ where parameters or buffers do: sums of their bytes, which no order of summing changes."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return "\n".join(
        f"{name}: {_byte_sum(tensor)}" for name, tensor in tensors if tensor.device.type != "meta" and tensor.numel()
    )


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


def current_layout() -> Layout | None:
    """That of the model that is running, which all its layers share; None outside of one."""
    return _current.get()


@contextmanager
def shared_layout(layout: Layout) -> Iterator[None]:
    """Inside the block `current_layout` is ``layout``."""
    before = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(before)


@torch.no_grad()
def _byte_sum(tensor: Tensor) -> int:
    return int(tensor.detach().resolve_conj().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))


def _number(text: str) -> int:
    """The same 56 bits for the same text, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _exchange_texts(ranks: Ranks, text: str) -> list[str]:
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return [bytes(piece.tolist()).decode() for (piece,) in ranks.gather("texts", [raw], uneven=True).pieces]


def _differences(texts: list[str]) -> str:
    """What ranks have of their own, a few lines of it."""
    lines = [text.splitlines() or [""] for text in texts]
    common = set(lines[0]).intersection(*map(set, lines[1:]))
    own = [[line for line in each if line not in common][:3] for each in lines]
    return ", ".join(f"{'; '.join(each) or 'nothing else'} on rank {rank}" for rank, each in enumerate(own))
