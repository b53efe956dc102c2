"""The pointer network: any mixer reads the points, a recurrent decoder answers with their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixer_info
from attnlab.core.masks import check_mask, token_positions, zero_masked
from attnlab.core.tokens import Tokens
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.encoder import pool_tokens
from attnlab.models.norms import create_norm
from attnlab.models.registry import models
from attnlab.models.sampling import evaluating
from attnlab.models.stack import (
    BlockOptions,
    ChannelOptions,
    MixerNames,
    MixerOptions,
    build_blocks,
    fix_lengths,
    layer_schedule,
    require_sequence,
)

END = 0
"""The answer that ends a sequence; before the first answer it stands for the start. Point j is answer j + 1."""
LSTMState = tuple[Tensor, Tensor]


@models.register("pointer", paper="pointer-networks")
class PointerNetwork(nn.Module):
    r"""Points to logits over their own positions, one answer after another (Vinyals et al. 2015).

    The blocks encode n points as $e_1 \dots e_n$, and a learned $e_0$ is the end. An LSTM reads the encoding of the answer before
    and gives $d_i$; the logit of answer j at step i is additive attention's score,

    $$u_{ij} = v^\top \tanh(W_1 e_j + W_2 d_i), \qquad v \in \mathbb{R}^c,\ W_1, W_2 \in \mathbb{R}^{c \times c},$$

    and the softmax of $u_i$ is the output. Differs from the paper: its encoder is an LSTM too, whose last state begins the
    decoder's; here the mean of the encodings does, by a linear map. A mixer that is always causal reads the points in order.

    Args:
        input_dim: numbers a point.
        dim: width of encoder and decoder, c.
        depth: blocks.
        mixer: a registered mixer, or several names that are repeated in turn over the layers.
        num_heads: heads of those mixers that have some; None takes each mixer's default.
        mixer_options: the mixers' own options: one mapping for all, or one a name.
        channel_mixer: a registered channel mixer, or None for none.
        channel_options: its own options, such as ``hidden``: one mapping for all blocks, or one a block.
        norm: norm of the blocks and of the encodings.
        placement: where the norms stand: "pre", "post" or "sandwich".
        position: "none", "learned" or "sinusoidal"; needed where the answer depends on which point comes first.
        max_length: points that learned positions, and mixers built for a number of tokens, reach.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for a name or option that does not exist.
        UnsupportedError: for a mixer that takes no flat sequence.
    """

    def __init__(
        self,
        input_dim: int,
        dim: int,
        depth: int,
        mixer: MixerNames = "softmax",
        num_heads: int | None = None,
        *,
        mixer_options: MixerOptions | None = None,
        channel_mixer: str | None = "mlp",
        channel_options: ChannelOptions | None = None,
        norm: str = "layer_norm",
        placement: str = "pre",
        position: str = "none",
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        layers = layer_schedule(depth, mixer, mixer_options)
        for name, _ in layers:
            require_sequence(mixer_info(name))
        where: Mapping[str, Any] = {"device": device, "dtype": dtype}
        self.input_dim, self.dim = input_dim, dim
        self.embedding = nn.Linear(input_dim, dim, **where)
        nn.init.normal_(self.embedding.weight, std=(12.0 / input_dim) ** 0.5)  # numbers uniform in [0, 1) vary by 1/12
        self.position = PositionEmbedding(position, dim, max_length, std=0.3, **where)
        options = BlockOptions(channel_mixer, channel_options or {}, norm, placement)
        layers = fix_lengths(layers, max_length)
        self.blocks = build_blocks(dim, layers, options, causal=False, num_heads=num_heads, device=device, dtype=dtype)
        self.norm = create_norm("none" if placement == "post" else norm, dim, **where)
        self.start, self.end = (nn.Parameter(torch.empty(dim, **where).normal_()) for _ in range(2))
        self.initial = nn.Linear(dim, 2 * dim, **where)
        self.decoder = nn.LSTM(dim, dim, batch_first=True, **where)
        self.keys = nn.Linear(dim, dim, bias=False, **where)
        self.queries = nn.Linear(dim, dim, bias=False, **where)
        self.score = nn.Linear(dim, 1, bias=False, **where)

    def encode(
        self, points: Float[Tensor, "b n p"], mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], LSTMState]:
        """The encoded points, and the decoder's state before its first step.

        Args:
            points: (batch, n, input_dim).
            mask: (batch, n), True marks a point.
        """
        check_mask("context_mask", mask, tuple(points.shape[:2]))
        self.position.check_length(points.shape[1])
        places = token_positions(*points.shape[:2], mask, device=points.device)
        tokens = Tokens(self.position(self.embedding(zero_masked(points, mask)), places), mask)
        for block in self.blocks:
            tokens = block(tokens)
        x = self.norm(tokens.x, mask)
        hidden, cell = self.initial(pool_tokens(x, mask, "mean")).tanh()[None].chunk(2, -1)
        return x, (hidden.contiguous(), cell.contiguous())

    def answer(
        self,
        inputs: Int[Tensor, "b m"],
        encoded: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None,
        state: LSTMState,
    ) -> tuple[Float[Tensor, "b m n+1"], LSTMState]:
        """Logits over the end and the points after each of ``inputs``, and the decoder's state after them.

        Args:
            inputs: the answers before, (batch, m); `END` is the start.
            encoded: what `encode` returned.
            mask: (batch, n), True marks a point; the others have the least logit there is.
            state: what `encode`, or the last call, returned.
        """
        read, asked = (torch.cat((one.expand(len(encoded), 1, -1), encoded), 1) for one in (self.start, self.end))
        states, state = self.decoder(read.gather(1, inputs[..., None].expand(-1, -1, self.dim)), state)
        scores = self.score(torch.tanh(self.keys(asked)[:, None] + self.queries(states)[:, :, None])).squeeze(-1)
        if mask is not None:
            padding = torch.cat((mask.new_zeros(len(mask), 1), ~mask), 1)
            scores = scores.masked_fill(padding[:, None], torch.finfo(scores.dtype).min)
        return scores, state

    def forward(
        self,
        inputs: Int[Tensor, "b m"],
        *,
        mask: Bool[Tensor, "b m"] | None = None,
        context: Float[Tensor, "b n p"],
        context_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b m n+1"]:
        """Logits of each answer, given those before (teacher forcing).

        Args:
            inputs: the answers before, (batch, m): `END` and then all right answers but the last.
            mask: (batch, m), True marks a step that is asked; real steps come first, and what follows them means nothing.
            context: the points, (batch, n, input_dim).
            context_mask: (batch, n), True marks a point.
        """
        check_mask("mask", mask, tuple(inputs.shape))
        encoded, state = self.encode(context, context_mask)
        return self.answer(inputs, encoded, context_mask, state)[0]


def greedy_answers(
    model: PointerNetwork,
    points: Float[Tensor, "b n p"],
    num_steps: int,
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    once: bool = False,
    fixed_length: bool = False,
) -> Int[Tensor, "b m"]:
    """The likeliest answer at every step, each read before the next; `END` after the first end.

    Args:
        model: the pointer network.
        points: (batch, n, input_dim).
        num_steps: m, answers to give.
        mask: (batch, n), True marks a point.
        once: no point may be answered twice.
        fixed_length: with ``once``, the end may be answered only after all points: tours and orders are valid by construction.

    Raises:
        ValueError: for no steps, or ``fixed_length`` without ``once``.
    """
    if num_steps < 1 or (fixed_length and not once):
        raise ValueError(
            f"num_steps, fixed_length: expected a positive integer, and once=True for a fixed length, got {num_steps} and {once}"
        )
    batch, n = points.shape[:2]
    real = points.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
    given: list[Tensor] = []
    with evaluating(model):
        encoded, state = model.encode(points, mask)
        open_ = torch.cat((real.new_ones(batch, 1), real), 1)
        last = torch.full((batch, 1), END, device=points.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=points.device)
        for _ in range(num_steps):
            logits, state = model.answer(last, encoded, mask, state)
            allowed = open_.clone()
            if fixed_length:
                allowed[:, END] = ~open_[:, 1:].any(1)
            allowed[:, END] |= ended
            choice = logits[:, 0].masked_fill(~allowed, -torch.inf).argmax(-1)
            choice = choice.masked_fill(ended, END)
            ended |= choice == END
            given.append(choice)
            last = choice[:, None]
            if once:
                used = torch.zeros_like(open_).scatter_(1, last, True)
                used[:, END] = False
                open_ &= ~used
    return torch.stack(given, 1)
