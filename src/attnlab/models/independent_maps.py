"""A language model whose attention maps come from another stream than the hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.masks import check_mask, token_positions, zero_masked
from attnlab.core.tokens import Tokens
from attnlab.mixers.dense.independent_map import IndependentMapAttention
from attnlab.models.block import Block
from attnlab.models.language import CausalLM

SOURCES = ("static_embedding", "random_embedding", "fixed_sequence")


class IndependentMaps(nn.Module):
    r"""Runs a `CausalLM` whose "independent_map" layers take queries and keys from a stream of their own (Xue et al. 2025).

    With ``source``

    - "static_embedding": the embedded tokens of the input, as they enter the first layer, in every layer;
    - "random_embedding": layer l's own input when the layers below run on fixed vectors $\epsilon \sim N(0, \sigma^2 I)$;
    - "fixed_sequence": the same, for the embeddings of a fixed sequence of tokens.

    The fixed streams run through the same weights, all layers of the model, each with its own plain attention, so that maps do
    not depend on the input. The source passes a layer's norm as its input would. Layers with other mixers are untouched: hybrids
    are a matter of the model's ``mixer`` list. A fixed stream costs a second pass for one example; `precompute` keeps it.

    Args:
        model: the language model; at least one of its mixers is "independent_map".
        source: one of the three.
        length: longest input of "random_embedding".
        std: $\sigma$; by default that of a model's token embeddings at first, dim ** -0.5.
        sequence: token ids of "fixed_sequence", as many as the longest input.
        generator: what the random vectors are drawn from.

    Raises:
        ValueError: for an unknown source, a model without such a mixer, or what a source needs and is not given.

    Differs from the paper: padding is left out, and tokens read the stream at their place among the real ones. That a source
    passes the norms is a choice; the paper does not say. Piece by piece (`CausalLM.extend`) is not built.
    """

    noise: Tensor | None
    sequence: Tensor | None

    def __init__(
        self,
        model: CausalLM,
        source: str = "static_embedding",
        *,
        length: int | None = None,
        std: float | None = None,
        sequence: Sequence[int] | Int[Tensor, "l"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if source not in SOURCES:
            raise ValueError(f"source: expected one of {SOURCES}, got {source!r}")
        self.model, self.source = model, source
        if not self._layers():
            raise ValueError("model: expected at least one 'independent_map' mixer, got none")
        weight, noise = model.embedding.weight, None
        if source == "random_embedding":
            if length is None or length < 1:
                raise ValueError(f"length: expected a positive integer with source='random_embedding', got {length}")
            noise = torch.randn(1, length, model.dim, generator=generator, dtype=torch.float32)
            noise = (noise * (model.dim**-0.5 if std is None else std)).to(weight.device, weight.dtype)
        if source == "fixed_sequence" and (sequence is None or len(sequence) < 1):
            raise ValueError("sequence: expected token ids with source='fixed_sequence', got none")
        ids = None if sequence is None else torch.as_tensor(sequence, device=weight.device)[None]
        self.register_buffer("noise", noise)
        self.register_buffer("sequence", ids)
        self._kept: list[Tensor] | None = None

    def forward(self, tokens: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        """Logits of the next token at every token; arguments as for `CausalLM.forward`.

        Raises:
            ValueError: for more tokens than the fixed stream has.
        """
        check_mask("mask", mask, tuple(tokens.shape))
        with ExitStack() as stack:
            if self.source == "static_embedding":
                stack.enter_context(_before(self.model.blocks[0], lambda first: self._read(stack, self._normed(first))))
            else:
                n = tokens.shape[1]
                self._check_length(n)
                streams = self._streams(n) if self._kept is None else [kept[:, :n] for kept in self._kept]
                if mask is not None:
                    index = token_positions(*tokens.shape, mask, device=tokens.device)
                    streams = [zero_masked(stream[0, index], mask) for stream in streams]
                self._read(stack, streams)
            return self.model(tokens, mask=mask)

    def precompute(self) -> None:
        """Keep the fixed stream for the weights as they are, where they are; nothing for "static_embedding".

        `train` and `eval` drop it; call this again after weights were changed, loaded or moved.
        """
        if self.source != "static_embedding":
            with torch.no_grad():
                self._kept = self._streams(self._longest())

    def train(self, mode: bool = True) -> IndependentMaps:
        """As for any module; a kept stream is dropped."""
        self._kept = None
        super().train(mode)
        return self

    def _layers(self) -> list[Block]:
        blocks: Any = self.model.blocks
        return [block for block in blocks if isinstance(block.mixer, IndependentMapAttention)]

    def _longest(self) -> int:
        fixed = self.noise if self.noise is not None else self.sequence
        return 0 if fixed is None else fixed.shape[1]

    def _check_length(self, n: int) -> None:
        if n > self._longest():
            raise ValueError(f"tokens: expected at most {self._longest()} as the fixed stream has, got {n}")

    def _read(self, stack: ExitStack, streams: list[Tensor]) -> None:
        for block, stream in zip(self._layers(), streams, strict=True):
            stack.enter_context(block.mixer.reading(stream))  # type: ignore[operator,arg-type]

    def _normed(self, first: Tokens) -> list[Tensor]:
        """The embedded tokens as each layer's norm hands them to its mixer."""
        blocks = self._layers()
        return [first.x if block.placement == "post" else block.mixer_norm(first.x, first.mask) for block in blocks]

    def _streams(self, n: int) -> list[Tensor]:
        """What enters each such layer's mixer when the model runs on the first n tokens of the fixed stream."""
        found: list[Tensor] = []
        with ExitStack() as stack:
            for block in self._layers():
                stack.enter_context(_before(block.mixer, found.append))
            if self.sequence is not None:
                self.model(self.sequence[:, :n])
            elif self.noise is not None:
                carried = Tokens(self.noise[:, :n])
                for layer in self.model.blocks:
                    carried = layer(carried)
        return found


@contextmanager
def _before(module: nn.Module, see: Callable[[Any], object]) -> Iterator[None]:
    """Inside, ``see`` gets the first argument of every call of ``module`` before it runs."""

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        see(arguments[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
