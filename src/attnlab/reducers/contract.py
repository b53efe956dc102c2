"""The contract of a reducer: `Tokens` in, fewer `Tokens` out."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from attnlab.core.info import Info
from attnlab.core.masks import check_mask, zero_masked
from attnlab.core.record import emit, recording
from attnlab.core.tokens import Tokens


class Reducer(nn.Module):
    """Maps tokens to fewer tokens of the same width; a subclass implements `reduce`.

    `forward` validates, and zeroes what stands at masked tokens before anything reads it and in the output. What comes out says
    which of its tokens are real by its own mask.

    Args:
        dim: width of the tokens.

    Raises:
        ValueError: if ``dim`` is not positive.
    """

    info: ClassVar[Info]

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: expected a positive integer, got {dim}")
        self.dim = dim

    def forward(self, tokens: Tokens) -> Tokens:
        """Reduce the tokens.

        Raises:
            TypeError: for something else than `Tokens`, or a mask that is not boolean.
            ValueError: for a wrong width or shape, or no token at all.
        """
        if not isinstance(tokens, Tokens):
            raise TypeError(f"tokens: expected attnlab.Tokens, got {type(tokens).__name__}")
        shape = tuple(tokens.x.shape)
        if len(shape) != 3 or shape[2] != self.dim or shape[1] < 1:
            raise ValueError(f"tokens: expected x of shape (batch, 1 or more tokens, {self.dim}), got {shape}")
        check_mask("tokens.mask", tokens.mask, shape[:2])
        reduced = self.reduce(tokens.with_x(zero_masked(tokens.x, tokens.mask)))
        return reduced.with_x(zero_masked(reduced.x, reduced.mask))

    def reduce(self, tokens: Tokens) -> Tokens:
        """The mechanism on validated tokens, zero at masked ones. Subclasses implement this."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement reduce")

    def emit(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Hand ``value`` to an open `attnlab.record`, under this module's path; a function is called only if someone wants it."""
        if recording():
            emit(self, name, value)
