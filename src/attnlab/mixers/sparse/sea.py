"""SEA: sparse attention on the keys that a linear-time estimate of the attention map finds best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, token_positions, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.sparse.sea_attention import sparse_attention
from attnlab.mixers.sparse.sea_estimator import CausalEstimator, DenseEstimator, Estimate
from attnlab.mixers.sparse.sea_loss import context_loss, distillation_loss
from attnlab.mixers.sparse.sea_selection import Budget, column_of
from attnlab.ops.backends import accumulate_dtype


class View(NamedTuple):
    """A forward pass before values are mixed.

    Args:
        q: queries.
        k: keys, 0 at masked tokens.
        v: values of the queries' tokens, likewise.
        rank: of each key among the real ones, masked ones last; None where all are real.
        lengths: how many keys each query has.
        estimate: the estimator's.
        chosen: the columns that are kept.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h m d"]
    v: Float[Tensor, "b h n d"]
    rank: Int[Tensor, "b m"] | None
    lengths: Int[Tensor, "#b #n"]
    estimate: Estimate
    chosen: Bool[Tensor, "b h n c"]

    def ranked(self, x: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h m d"]:
        """What belongs to the keys, by rank."""
        return x if self.rank is None else by_rank(x, self.rank)

    def resized(self, x: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n m"]:
        """What belongs to columns, at their keys; 0 at keys that a query has not."""
        num_keys = self.k.shape[2]
        rank = torch.arange(num_keys, device=x.device)[None] if self.rank is None else self.rank
        rank, lengths = rank[:, None, None], self.lengths[:, None, :, None]
        column = column_of(rank, lengths, x.shape[-1])
        found = x.take_along_dim(column.expand(len(x), *x.shape[1:3], num_keys), dim=3)
        return found.masked_fill(rank >= lengths, 0.0)


def ranks(real: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The place of each token if the real ones come first."""
    return (~real).long().argsort(dim=1, stable=True).argsort(dim=1)


def by_rank(x: Float[Tensor, "b h n d"], rank: Int[Tensor, "b n"]) -> Float[Tensor, "b h n d"]:
    """Tokens in the order of their ranks."""
    return x.take_along_dim(rank.argsort(dim=1)[:, None, :, None], dim=2)


@mixers.register(
    "sea",
    family="sparse",
    paper="sea",
    supports=Supports(causal="optional", streaming=True, mixing_matrix=True, state="grows", discontinuous=True, cost=1.0),
    example={"num_kept": 8, "estimate_dim": 64},
)
class SEA(AttentionMixer, StreamingMixer):
    r"""Sparse linear attention with an estimated mask (Lee et al. 2023, section 3).

    An estimator out of kernel attention and convolutions gives every query of a head probabilities $p_i$ over K columns, each
    for some neighbouring keys, and two gates (`DenseEstimator`, `CausalEstimator`). With $M_i$ the keys of the columns that a
    `Budget` of k keys a query keeps, and $\bar p$ the mean of p over queries, read at each key's column,

    $$o_i = g_{2,i}\, g_{1,i} \sum_{j \in M_i} \mathrm{softmax}_{M_i}(d^{-1/2} q_i^\top k_j)\, v_j + (1 - g_{2,i})\,
      \sum_j \bar p_j v_j$$

    and, where causal, the mean of $v_0, \dots, v_i$ in place of the last sum. The gradient does not pass the choice; the
    estimator learns by `distillation_loss`, k may be changed afterwards (``mixer.budget``). Time O(n K + n k d) for up to h k K
    tokens; a column is the least that can be kept, so that beyond that the keys of a column grow with n. Memory O(n (K + d)).
    State: ``k`` and ``v`` (b, h, m, d), ``real`` (b, m) or (b, 0) before there was a mask, ``total`` (b, h, d), ``position`` (b,)
    and the estimator's.

    ``record`` collects "estimate" (b, h, n, K), "gates" (b, h, n, 2) and "chosen" (b, h, n, K).

    Args:
        dim: width of the tokens.
        num_heads: h.
        num_kept: k.
        estimate_dim: K, even; a multiple of 4 if causal.
        scope: what shares a budget, "query", "causal_batch" (a query's heads), "head" or "batch"; the last two, over queries, not
            if causal.
        max_len: the most tokens if causal, rows of the estimator's learned table.
        feature_factor: d ln d over the number of random directions.
        generator: draws the directions.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for numbers that do not fit, and in use for more than ``max_len`` tokens if causal.

    Differs from the paper: masked tokens are in no sum, where the authors keep padded keys in the kernel's normaliser and rows of
    them in the convolutions; so padding changes nothing. Real tokens close up over masked ones, but in the causal convolutions,
    which pass them as rows of 0. Maxima that keep exponentials in range have no gradient. The index map is not jittered in
    training, and directions are drawn anew only by `redraw`. The causal 1 x 1 convolution has no border.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_kept: int = 64,
        estimate_dim: int = 128,
        scope: str = "causal_batch",
        max_len: int = 2048,
        feature_factor: float | int = 1,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        self.budget = Budget(num_kept, estimate_dim, scope)
        self._promises = replace(self.info.supports, cost=2.0) if self.budget.across_queries else self.info.supports
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads}, since the estimator pairs heads, got {self.num_kv_heads}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}")
        if feature_factor <= 0:
            raise ValueError(f"feature_factor: expected a positive number, got {feature_factor}")
        if self.causal and self.budget.across_queries:
            raise ValueError(f"scope: expected 'query' or 'causal_batch' with causal=True, got {scope!r}: queries would compete")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        more: dict[str, Any] = {"factor": feature_factor, "generator": generator, **place}
        self.estimator: DenseEstimator | CausalEstimator
        if self.causal:
            self.estimator = CausalEstimator(num_heads, self.head_dim, estimate_dim, max_len=max_len, **more)
        else:
            self.estimator = DenseEstimator(num_heads, self.head_dim, estimate_dim, **more)

    @property
    def supports(self) -> Supports:
        """Scopes over queries let a query keep all keys."""
        return self._promises

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the random directions by new ones."""
        self.estimator.redraw(generator)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys yet."""
        sums = accumulate_dtype(dtype)
        empty = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        own = {
            "k": empty,
            "v": empty.clone(),
            "real": torch.ones(batch_size, 0, device=device, dtype=torch.bool),
            "total": torch.zeros(batch_size, self.num_heads, self.head_dim, device=device, dtype=sums),
            "position": torch.zeros(batch_size, device=device, dtype=torch.int64),
        }
        estimator = cast("CausalEstimator", self.estimator).begin(batch_size, device, dtype, sums)
        return State({**own, **estimator.prefixed("estimator/")})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Estimate from the past, attend to kept keys of the past, add its mean."""
        view, after = self._past(x, state, mask)
        heads = self._paths(view, after["v"], self._running(view, view.v, state))
        self._show(view, heads)
        return self.join(heads, x, mask), after

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Estimate, choose, attend, add the mean."""
        heads, view = self._heads(x, masks.query)
        self._show(view, heads)
        return self.join(heads, x, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What both paths make of identity values."""
        return self._heads(x, masks.query, identity=True)[0]

    def distillation_loss(
        self,
        x: Float[Tensor, "b n c"],
        scores: Float[Tensor, "b h n n"],
        context: Float[Tensor, "b n e"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, ""]:
        r"""What this layer is to learn from the attention that it replaces (Lee et al. 2023, section 3.3); forms n x n maps.

        $0.1\,\mathrm{KL}(A \Vert \hat A) + \mathrm{MSE}(A, \hat A)$ for the estimate resized to all keys, the same two for the
        softmax of this layer's own products of queries and keys, and $\mathrm{MSE}$ of the head outputs.

        Args:
            x: the layer's input.
            scores: the teacher's logits, of which A is the softmax.
            context: the teacher's head outputs, before its output projection.
            mask: True marks a real token.
        """
        x = zero_masked(x, mask)
        real = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool) if mask is None else mask
        allowed = real[:, None, :, None] & real[:, None, None, :]
        heads, view = self._heads(x, mask)
        dense = view.q @ view.k.mT * self.head_dim**-0.5
        maps = distillation_loss(
            view.resized(view.estimate.scores),
            dense,
            scores,
            allowed.tril() if self.causal else allowed,
            sum_heads=not self.causal,
        )
        return maps + context_loss(rearrange(heads, "b h n d -> b n (h d)"), context, mask)

    def _heads(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, *, identity: bool = False
    ) -> tuple[Float[Tensor, "b h n e"], View]:
        """Both paths of a whole sequence, over its values or over those that show the map."""
        state = self.begin(x.shape[0], x.device, x.dtype) if self.causal else None
        view = self._whole(x, mask) if state is None else self._past(x, state, mask)[0]
        values = view.v
        if identity:
            values = self.identity(view.k)
            values = values if mask is None else values.masked_fill(~mask[:, None, :, None], 0.0)
        mean = self._mean(view, values) if state is None else self._running(view, values, None)
        return self._paths(view, values, mean), view

    def _project_real(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x)
        if mask is not None:
            k, v = (t.masked_fill(~mask[:, None, :, None], 0.0) for t in (k, v))
        return q, k, v

    def _whole(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> View:
        """All tokens at once; the estimator has the real ones first."""
        q, k, v = self._project_real(x, mask)
        estimator = cast("DenseEstimator", self.estimator)
        if mask is None:
            rank, lengths, estimate = None, torch.full((1, 1), x.shape[1], device=x.device), estimator(q, k, v, None)
        else:
            rank = ranks(mask)
            count = mask.sum(1).clamp(min=1)
            close = estimator(*(by_rank(t, rank) for t in (q, k, v)), count)
            estimate = Estimate(*(t.take_along_dim(rank[:, None, :, None], dim=2) for t in close))
            lengths = count[:, None]
        return View(q, k, v, rank, lengths, estimate, self.budget.choose(estimate.probabilities, lengths, mask))

    def _past(self, x: Float[Tensor, "b n c"], state: State, mask: Bool[Tensor, "b n"] | None) -> tuple[View, State]:
        """The next tokens with all that came before, and the state after them."""
        n, kept = x.shape[1], state["k"].shape[2]
        estimator = cast("CausalEstimator", self.estimator)
        if kept + n > estimator.max_len:
            raise ValueError(f"x: expected at most max_len={estimator.max_len} tokens, got {kept + n} with those before")
        q, k, v = self._project_real(x, mask)
        position = token_positions(x.shape[0], n, mask, start=state["position"], device=x.device)
        estimate, own = estimator(q, k, v, position, mask, state.part("estimator/"))
        after = state.grow(2, k=k, v=v)
        real, rank = state["real"], None
        if mask is not None or real.shape[1]:
            past = real if real.shape[1] == kept else real.new_ones(x.shape[0], kept)
            real = torch.cat((past, real.new_ones(x.shape[0], n) if mask is None else mask), dim=1)
            rank = ranks(real)
        lengths = position + 1
        view = View(q, after["k"], v, rank, lengths, estimate, self.budget.choose(estimate.probabilities, lengths, mask))
        count = state["position"] + (n if mask is None else mask.sum(1))
        total = state["total"] + v.to(state["total"].dtype).sum(2)
        return view, after.replace(real=real, position=count, total=total, **own.prefixed("estimator/"))

    def _paths(self, view: View, values: Float[Tensor, "b h m e"], mean: Float[Tensor, "b h #n e"]) -> Float[Tensor, "b h n e"]:
        """Kept keys and the mean, each by its gate."""
        most = self.budget.most_keys(view.k.shape[2], self.num_heads)
        found = sparse_attention(view.q, view.ranked(view.k), view.ranked(values), view.chosen, view.lengths, most)
        size, share = view.estimate.gates.unsqueeze(-1).unbind(3)
        return share * (size * found) + (1.0 - share) * mean

    @staticmethod
    def _mean(view: View, values: Float[Tensor, "b h m e"]) -> Float[Tensor, "b h 1 e"]:
        """Values weighed by how much the estimates of all real queries have for their keys."""
        p = view.estimate.probabilities
        if view.rank is not None:
            p = p.masked_fill((view.rank >= view.lengths)[:, None, :, None], 0.0)
        return view.resized(p.sum(2, keepdim=True) / view.lengths[:, None, :, None]) @ values

    @staticmethod
    def _running(view: View, values: Float[Tensor, "b h n e"], state: State | None) -> Float[Tensor, "b h n e"]:
        """The mean of the values of all real tokens so far."""
        sums = values.to(accumulate_dtype(values.dtype)).cumsum(2)
        sums = sums if state is None else sums + state["total"].unsqueeze(2)
        return (sums / view.lengths[:, None, :, None]).to(values.dtype)

    def _show(self, view: View, heads: Float[Tensor, "b h n e"]) -> None:
        self.emit("values", view.v)
        self.emit("mixed", heads)
        self.emit("estimate", lambda: view.estimate.probabilities)
        self.emit("gates", view.estimate.gates)
        self.emit("chosen", view.chosen)
