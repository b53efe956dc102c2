"""Sparsifiner: exact attention on the pairs that a small predictor of the map finds best."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.selection import as_mask, top_k
from attnlab.mixers.sparse.mask_predictor import MaskPredictor
from attnlab.ops.attention import attention, attention_map
from attnlab.ops.chunks import full_precision


@mixers.register(
    "sparsifiner",
    family="sparse",
    paper="sparsifiner",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, discontinuous=True, tokens_option="num_tokens", cost=3.0),
    example={"num_tokens": 12, "reduce_tokens": 3},
)
class Sparsifiner(AttentionMixer):
    r"""Attention of each query to the keys that a learned, low-rank estimate of its row finds best (Wei et al. 2023).

    $$M_i = \mathrm{top}_{\lceil \rho N \rceil}(S_i) \;\text{ or }\; \{j : S_{ij} > \tau\}, \qquad
      o_i = \sum_{j \in M_i} \mathrm{softmax}_{j \in M_i}(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    S is that of `MaskPredictor`. The class token attends to all. No gradient passes the choice: the predictor learns by
    `reconstruction_loss`. With $\rho$ = 1 this is dense attention. N, the number of tokens, is fixed. Time O(N^2 d + N^2 K) for a
    basis of K entries, a share of N, as S is formed; memory O(N^2) a head.

    ``record`` collects "selection" (b, h, N, N).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        num_tokens: N, a class token included.
        keep_rate: $\rho$, above 0.
        score_threshold: $\tau$, in place of $\rho$.
        class_token: the first token is outside of the grid and attends to all.
        reduce_tokens: the basis has N / ``reduce_tokens`` entries, rounded down, at least 1.
        reduce_dim: the predictor's queries and keys have d / ``reduce_dim`` channels, likewise.
        coef_threshold: coefficients not above it are 0.
        coef_top_k: keep so many coefficients instead.
        basis_threshold: entries of the basis not above it in size are 0.
        shared_basis: one basis for both directions.
        dense_training: attend to all in training mode, as while the predictor is fitted.
        **options: those of `AttentionMixer`; ``position`` must be "none" or "rotary".

    Raises:
        ValueError: for numbers out of range, or a position of another kind.
        UnsupportedError: with ``causal=True``: the estimate of a row reads all keys.

    Differs from the paper: masked tokens (or pruned ones) are no keys of the predictor either. Where coefficients and basis are
    cut so hard that fewer than $\rho N$ scores are positive, the rest of the budget goes to keys with a score of 0, whichever
    these are.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_tokens: int,
        keep_rate: float | int = 0.25,
        score_threshold: float | int | None = None,
        class_token: bool = False,
        reduce_tokens: int = 8,
        reduce_dim: int = 2,
        coef_threshold: float | int = 0.01,
        coef_top_k: int | None = None,
        basis_threshold: float | int = 0.0,
        shared_basis: bool = False,
        dense_training: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        sizes = (("num_tokens", num_tokens), ("reduce_tokens", reduce_tokens), ("reduce_dim", reduce_dim))
        for name, value in (*sizes, ("coef_top_k", 1 if coef_top_k is None else coef_top_k)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate: expected a number above 0 and up to 1, got {keep_rate}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}")
        self.num_tokens, self.num_prefix, self.dense_training = num_tokens, int(class_token), dense_training
        self.keep_rate, self.score_threshold = float(keep_rate), score_threshold
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.predictor = MaskPredictor(
            num_tokens,
            num_heads,
            self.head_dim,
            reduced_tokens=max(1, num_tokens // reduce_tokens),
            reduced_dim=max(1, self.head_dim // reduce_dim),
            coef_threshold=float(coef_threshold),
            coef_top_k=coef_top_k,
            basis_threshold=float(basis_threshold),
            shared_basis=shared_basis,
            **place,
        )

    @property
    def budget(self) -> int:
        """Keys of a query, at most."""
        return math.ceil(self.keep_rate * self.num_tokens)

    @torch.no_grad()
    @full_precision
    def choose(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], mask: Bool[Tensor, "b n"] | None
    ) -> Bool[Tensor, "b h n n"]:
        """The keys of each query."""
        dtype = self.predictor.down.dtype
        scores = self.predictor.scores(self.predictor.pruned(self.predictor.coefficients(q.to(dtype), k.to(dtype), mask)))
        allowed = None if mask is None else mask[:, None, None].expand_as(scores)
        if self.score_threshold is None:
            chosen = as_mask(top_k(scores, self.budget, allowed), scores.shape[-1])
        else:
            chosen = scores > self.score_threshold
            chosen = chosen if allowed is None else chosen & allowed
        if self.num_prefix:
            first = torch.ones_like(chosen[:, :, :1]) if allowed is None else allowed[:, :, :1]
            chosen = torch.cat((first, chosen[:, :, 1:]), dim=2)
        return chosen

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the chosen keys."""
        if self.dense_training and self.training:
            return attention(q, k, v, key_mask=masks.key)
        chosen = self.choose(q, k, masks.key)
        self.emit("selection", chosen)
        return attention(q, k, v, key_mask=masks.key, pair_mask=chosen)

    def reconstruction_loss(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        """The mean squared error of the estimate of the dense map, over pairs of real tokens and without the class token's row.

        Its gradient is the predictor's alone: queries, keys and the map are detached.
        """
        q, k, _ = self.project(zero_masked(x, mask))
        q, k = q.detach(), k.detach()
        error = self.predictor.reconstruction(self.predictor.coefficients(q, k, mask)) - attention_map(q, k, key_mask=mask)
        squares = error[:, :, self.num_prefix :].square()
        if mask is None:
            return squares.mean()
        real = (mask[:, None, self.num_prefix :, None] & mask[:, None, None]).expand_as(squares)
        return squares.masked_fill(~real, 0.0).sum() / real.sum().clamp(min=1)
