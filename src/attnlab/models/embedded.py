"""A causal language model cut open at its embeddings, for wrappers that put tokens of their own between the words."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.masks import token_positions, zero_masked
from attnlab.core.tokens import Tokens
from attnlab.models.language import CausalLM


class EmbeddedLM(nn.Module):
    """`CausalLM` in three steps: ids to embeddings, these to hidden states, and those to logits.

    Args:
        model: the language model; its parameters are used, not copied.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model, self.dim = model, model.dim

    def embed(self, tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """The embedded ids, zero at masked ones, without anything that looks at neighbours or positions."""
        return zero_masked(self.model.embedding(tokens), mask)

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Hidden states after the last norm; positions are those of the real tokens of ``x``, from 0."""
        model = self.model
        model.position.check_length(x.shape[1])
        if model.short_conv is not None:
            x = x + model.short_conv(x)[0]
        positions = token_positions(*x.shape[:2], mask, device=x.device)
        carried = Tokens(model.position(x, positions), mask)
        for block in model.blocks:
            carried = block(carried)
        return model.norm(carried.x, mask)

    def logits(self, hidden: Float[Tensor, "b n c"]) -> Float[Tensor, "b n v"]:
        """Of the next token at every hidden state."""
        head = self.model.head
        return F.linear(hidden, self.model.embedding.weight) if head is None else head(hidden)
