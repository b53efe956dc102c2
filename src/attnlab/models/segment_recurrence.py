"""Segment recurrence: a causal model over segments, each of which also sees the hidden states of those before."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.masks import check_mask, token_positions
from attnlab.core.state import State
from attnlab.core.tokens import Tokens
from attnlab.models.block import Block
from attnlab.models.embedded import EmbeddedLM
from attnlab.models.language import CausalLM
from attnlab.models.registry import models
from attnlab.models.segments import flags, last_real, real_first


@models.register("segment_recurrence")
class SegmentRecurrence(nn.Module):
    r"""A `CausalLM` segment by segment, with the hidden states of the last M tokens before (Dai et al. 2019, Transformer-XL).

    With $h_\tau^{l}$ the input of block l for segment $\tau$, SG without a gradient,

    $$h_\tau^{l+1} = \mathrm{block}_l([\mathrm{SG}(c_\tau^l) \,\|\, h_\tau^l])\ \text{at the segment's tokens}, \qquad
    c_{\tau+1}^l = \text{the last M of } [c_\tau^l \,\|\, h_\tau^l] .$$

    The mixers need not stream. After L blocks a token sees at most L M tokens before its segment. State: ``memory``
    (b, M', L, dim) with M' <= M, ``length`` (b,), and ``real`` (b, M'), which is (b, 0) as long as no mask was given. Time
    that of n / S runs over S + M tokens.

    Args:
        model: a `CausalLM`; its parameters are used, not copied.
        segment: S, tokens of a segment.
        memory: M, tokens whose hidden states are kept; by default S.

    Raises:
        TypeError: for something that is no `CausalLM`.
        ValueError: for a segment or memory below 1, or learned positions.

    Differs from the paper, whose positions are relative: here they are the mixers' own (rotary or biases), which count from the
    first kept token on, or sinusoids of the place in the sequence. Blocks also compute what the kept tokens would get, which is
    thrown away. The embedding's short convolution goes across segments.
    """

    def __init__(self, model: nn.Module, segment: int = 256, memory: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, CausalLM):
            raise TypeError(f"model: expected a CausalLM, got {type(model).__name__}")
        for name, size in (("segment", segment), ("memory", memory)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if model.position.name == "learned":
            raise ValueError("model: expected position 'none' or 'sinusoidal', learned positions end with their table")
        self.embedded = EmbeddedLM(model)
        self.segment, self.memory = segment, segment if memory is None else memory

    def forward(self, tokens: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        """Logits of the next token at every token of a sequence."""
        return self.extend(tokens, self.init_state(tokens.shape[0]), mask=mask)[0]

    def init_state(self, batch_size: int) -> State:
        """The state before the first token: nothing is kept."""
        model, weight = self.embedded.model, self.embedded.model.embedding.weight
        state = {
            "memory": weight.new_zeros(batch_size, 0, len(model.blocks), model.dim),
            "real": torch.ones(batch_size, 0, dtype=torch.bool, device=weight.device),
            "length": torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        }
        if model.short_conv is not None:
            state["window"] = model.short_conv.begin(batch_size, weight.device, weight.dtype)
        return State(state)

    def extend(
        self, tokens: Int[Tensor, "b n"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n v"], State]:
        """The next n >= 1 tokens, cut into segments from the first of them on.

        A call begins a segment: pieces of whole segments give what `forward` gives at once, others have other segments.

        Args:
            tokens: the next ids, (batch, n).
            state: what `init_state` or the last call returned; it is not changed.
            mask: (batch, n), True marks a real token; a masked one is as if it were not there.

        Returns:
            Logits (batch, n, vocab_size) and the state after these tokens.
        """
        check_mask("mask", mask, tuple(tokens.shape))
        x, aligned, real = self.embedded.embed(tokens, mask), None, None
        if mask is not None:
            aligned = real_first(mask)
            x, real = aligned.spread(x[:, None])[:, 0], aligned.live
        pieces, outputs = x.split(self.segment, 1), []
        reals = [None] * len(pieces) if real is None else list(real.split(self.segment, 1))
        for piece, there in zip(pieces, reals, strict=True):
            hidden, state = self._segment(piece, state, there)
            outputs.append(hidden)
        hidden = torch.cat(outputs, 1)
        return self.embedded.logits(hidden if aligned is None else aligned.collect(hidden[:, None])[:, 0]), state

    def _segment(
        self, x: Float[Tensor, "b n c"], state: State, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Hidden states of one segment of embeddings after the last norm; real tokens stand first."""
        model, batch, n = self.embedded.model, *x.shape[:2]
        window = {}
        if model.short_conv is not None:
            before = state["window"]
            y, window["window"] = model.short_conv(x, before)
            if mask is not None:  # what stands behind the real tokens is no past
                there = torch.cat((mask.new_ones(before.shape[:2]), mask), 1)
                window["window"] = last_real(torch.cat((before, x), 1), there, before.shape[1])[0]
            x = x + y
        x = model.position(x, token_positions(batch, n, mask, start=state["length"], device=x.device))
        kept = state["memory"].detach()
        size = kept.shape[1]
        real = flags(mask, state["real"], size, n)
        inputs = []
        for block, before in zip(cast("list[Block]", list(model.blocks)), kept.unbind(2), strict=True):
            inputs.append(torch.cat((before, x), 1))
            x = block(Tokens(inputs[-1], real)).x[:, size:]
        memory, there = torch.stack(inputs, 2).detach(), state["real"]
        if real is None:
            memory = memory[:, -self.memory :]
        else:
            memory, there = last_real(memory, real, min(self.memory, size + n))
        length = state["length"] + (n if mask is None else mask.sum(1))
        return model.norm(x, mask), State({"memory": memory, "real": there, "length": length, **window})
