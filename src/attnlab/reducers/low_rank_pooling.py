"""Low-rank attention pooling (LAMA): heads of one factorised bilinear form summarise a sequence in a few vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.tokens import Tokens
from attnlab.mixers.parts.norms import l2_normalize
from attnlab.ops.backends import accumulate_dtype
from attnlab.reducers.contract import Reducer
from attnlab.reducers.registry import reducers

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "identity": nn.Identity()}
_TINY = 1e-12  # keeps a token whose scores are all zero from dividing by zero


@reducers.register("low_rank_pooling", family="pooling", paper="lama-low-rank-attention")
class LowRankPooling(Reducer):
    r"""m heads pool N tokens to m vectors by a bilinear form of rank k a head (Mehta, Rangwala & Ramakrishnan 2019).

    For tokens $h_t \in \mathbb{R}^D$, their context $c \in \mathbb{R}^D$, and $P, Q \in \mathbb{R}^{D \times mk}$,

    $$e_t = \phi\Big(\sum_{k} (P^\top c) \odot (Q^\top h_t)\Big) \in \mathbb{R}^m, \qquad
      \hat e_t = \frac{e_t}{\lVert e_t \rVert_2}, \qquad A_{it} = \mathrm{softmax}_t(\hat e_{t,i}), \qquad M = A H ,$$

    where the sum runs over the k columns of each head. The scores of a token are normalised over the heads, so a head's
    weights depend on the others', and no two weights of a head differ by more than a factor $e^2$. Time O(N m (k + 1) D),
    memory O(N (D + m k)). ``record`` collects "attention" (b, m, 1, N) and "diversity_penalty", the mean over the examples of
    $\lVert A A^\top - I \rVert_F^2$ (Lin et al. 2017), a scalar to be added to the loss.

    The output has m tokens, all real, but none where no token was real: those are exactly zero. They stand for no place:
    grid, prefix, sizes and source are dropped.

    Args:
        dim: D, width of the tokens.
        num_heads: m, pooled vectors.
        rank: k, of each head's bilinear form.
        activation: $\phi$: "tanh", "relu" or "identity".
        context: c: "mean" of the real tokens, or a "learned" vector.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a count that is not positive, or an unknown activation or context.

    Differs from the paper: 1e-12 is added under the root of the norm over the heads, which has nothing there. The recurrent
    encoder before the pooling and the classifier behind it are the model's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 5,
        *,
        rank: int = 1,
        activation: str = "tanh",
        context: str = "mean",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        for name, count in (("num_heads", num_heads), ("rank", rank)):
            if count < 1:
                raise ValueError(f"{name}: expected a positive integer, got {count}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected one of {list(_ACTIVATIONS)}, got {activation!r}")
        if context not in ("mean", "learned"):
            raise ValueError(f"context: expected 'mean' or 'learned', got {context!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.rank, self.activation = num_heads, rank, activation
        self.context_proj = nn.Linear(dim, num_heads * rank, bias=False, **place)
        self.token_proj = nn.Linear(dim, num_heads * rank, bias=False, **place)
        self.context = nn.Parameter(torch.randn(dim, **place)) if context == "learned" else None

    def reduce(self, tokens: Tokens) -> Tokens:
        """The pooled vectors, (b, m, dim)."""
        weights = self._weights(tokens)
        self.emit("attention", weights.unsqueeze(2))
        self.emit("diversity_penalty", lambda: diversity_penalty(weights))
        mask = None if tokens.mask is None else tokens.mask.any(dim=1, keepdim=True).expand(-1, self.num_heads)
        return Tokens(weights @ tokens.x, mask, streams=tokens.streams)

    def _weights(self, tokens: Tokens) -> Float[Tensor, "b m n"]:
        x, mask = tokens.x, tokens.mask
        if self.context is not None:
            context = self.context.expand(x.shape[0], 1, -1)
        elif mask is None:
            context = x.mean(dim=1, keepdim=True)
        else:
            context = x.sum(dim=1, keepdim=True) / mask.sum(dim=1).clamp(min=1)[:, None, None]
        scores = (self.context_proj(context) * self.token_proj(x)).unflatten(-1, (self.num_heads, self.rank)).sum(dim=-1)
        scores = _ACTIVATIONS[self.activation](scores.to(accumulate_dtype(x.dtype)))
        scores = l2_normalize(scores, eps=_TINY).transpose(1, 2)
        if mask is None:
            return scores.softmax(dim=-1).to(x.dtype)
        masked = ~mask[:, None, :]
        return scores.masked_fill(masked, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(masked, 0.0).to(x.dtype)


def diversity_penalty(weights: Float[Tensor, "b m n"]) -> Float[Tensor, ""]:
    r"""Mean over the examples of $\lVert A A^\top - I \rVert_F^2$: least where every head looks at one token, each at another."""
    gram = weights @ weights.transpose(1, 2)
    return (gram - torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)).square().sum(dim=(1, 2)).mean()
