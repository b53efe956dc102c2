"""Stochastically subsampled attention: random windows in training, dense in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.sparse.sampled_windows import check_windows, sample_windows
from attnlab.ops.attention import Pairwise, attention

WHEN = ("training", "always", "never")


@mixers.register(
    "subsampled",
    family="sparse",
    paper="information-pathways-ssa",
    supports=replace(DENSE, cross=False),
    example={"reduction": 2},
)
class SubsampledAttention(CachedAttention):
    r"""Attention that is trained on random windows and evaluated dense (after Hussain et al. 2023, SSA). A reconstruction.

    The paper's abstract says that in training every layer attends to a random subset, 4 to 8 times smaller, with a bias to near
    tokens where locality helps; the sampling laws here are ours, and no equivalence with the paper is claimed. In training each
    call draws a partition of the n tokens into windows P of about n / c, for all heads and examples, and

    $$o_i = \sum_{j \in P(i)} \mathrm{softmax}_{j \in P(i)}(d^{-1/2}\, q_i^\top k_j + b_{ij})\, v_j ,$$

    where causal only j <= i take part. Positions are those of the whole sequence; a token always sees itself. `sample_windows`
    has the two laws, unbiased and local. With c = 1 this is dense attention exactly. Time O(n^2 d / c) in training, O(n^2 d) in
    evaluation; streaming is dense. Dense fine-tuning at the end is advised: `is_dense_step`, `subsampling(model, "never")`.

    ``windows`` is the last draw (windows, size), -1 where a window has no more tokens; `hold` sets it. ``record`` collects it.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        reduction: c, at least 1.
        policy: "unbiased" or "local".
        sigma: reach of "local" in tokens; `layer_sigma` lets it grow with depth.
        generator: source of the draws. Gradient checkpointing repeats draws of the global generator alone: with one of your own,
            `hold` the windows.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for a reduction below 1, an unknown policy, or a negative sigma.
        UnsupportedError: in training, with a position whose bias depends on queries and offsets.

    Differs from the paper: see above. On a grid the local law draws rows and columns, not cells.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        reduction: float | int = 4,
        policy: str = "unbiased",
        sigma: float | int = 1.0,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if not reduction >= 1:
            raise ValueError(f"reduction: expected at least 1, got {reduction}")
        if policy not in ("unbiased", "local"):
            raise ValueError(f"policy: expected 'unbiased' or 'local', got {policy!r}")
        if not sigma >= 0:
            raise ValueError(f"sigma: expected 0 or more, got {sigma}")
        self.reduction, self.policy, self.sigma, self.generator = reduction, policy, sigma, generator
        self.when = "training"
        self.windows: Tensor | None = None
        self.held, self._held_tokens = False, 0

    @property
    def sampling(self) -> bool:
        """Whether the next call attends in windows."""
        return self.held or self.when == "always" or (self.when == "training" and self.training)

    def hold(self, windows: Int[Tensor, "w s"] | None) -> None:
        """Attend in these windows, in training and evaluation, until None lets them be drawn again."""
        if windows is not None:
            self._held_tokens = int((windows >= 0).sum())
            check_windows(windows, self._held_tokens)
        self.windows, self.held = windows, windows is not None

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Draw if it is time to, then attend."""
        if self.sampling and not self.held:
            self.windows = self._draw(grid, x.device)
        if self.sampling and self.windows is not None:
            self.emit("windows", self.windows)
        return super().mix(x, context, masks, grid)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """Of the last draw, if it is one for as many tokens."""
        if self.sampling and not self.held and (self.windows is None or int((self.windows >= 0).sum()) != x.shape[1]):
            self.windows = self._draw(grid, x.device)
        return super().matrix(x, context, masks, grid)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys, of the window where there are windows; a piece of a stream has none."""
        if grid is None or not self.sampling or self.windows is None:
            return self.dense(q, k, v, masks, grid)
        places = self.windows.clamp(min=0)
        if self.held and self._held_tokens != q.shape[2]:
            raise ValueError(f"windows: expected those held to have {q.shape[2]} tokens, got {self._held_tokens}")
        real = (self.windows >= 0).expand(len(q), -1, -1)
        if masks.key is not None:
            real = real & masks.key[:, places]
        parts = [rearrange(t[:, :, places], "b h w s d -> (b w) h s d") for t in (q, k, v)]
        pairs = None if masks.pair is None else self._pairs(masks.pair, places, len(q))
        terms = [
            None if term is None else self._of_windows(Pairwise.of(term), places, *q.shape[::2])
            for term in (
                self.position.bias(q, q.shape[2], causal=self.causal, grid=grid),
                self.position.factor(q, q.shape[2], causal=self.causal, grid=grid),
            )
        ]
        heads = attention(
            *parts,
            bias=terms[0],
            factor=terms[1],
            causal=self.causal,
            key_mask=real.flatten(0, 1),
            pair_mask=pairs,
        )
        heads = rearrange(heads, "(b w) h s e -> b h (w s) e", b=len(q))
        # the place of each token among the slots of all windows: the inverse of the gather
        slots = torch.arange(places.numel(), device=places.device)
        there = self.windows.flatten()
        inverse = torch.zeros(q.shape[2] + 1, dtype=torch.int64, device=places.device)
        inverse = inverse.scatter(0, there.masked_fill(there < 0, q.shape[2]), slots)[:-1]
        return heads[:, :, inverse]

    def _draw(self, grid: Grid, device: torch.device) -> Int[Tensor, "w s"]:
        sigma = self.sigma if self.policy == "local" else None
        return sample_windows(grid, reduction=self.reduction, sigma=sigma, generator=self.generator, device=device)

    @staticmethod
    def _pairs(pairs: Tensor, places: Int[Tensor, "w s"], batch: int) -> Tensor:
        """What stands at the pairs inside each window, (b w, h or 1, s, s)."""
        inside = pairs.expand(batch, -1, -1, -1)[:, :, places[:, :, None], places[:, None, :]]
        return rearrange(inside, "b h w s t -> (b w) h s t")

    def _of_windows(self, term: Pairwise, places: Int[Tensor, "w s"], batch: int, n: int) -> Float[Tensor, "bw #h s s"] | None:
        """A term of the position at the pairs inside each window."""
        if term.keys is not None:
            raise self._refusal(
                f"training with position={self.position_name!r}", "its bias is formed for all pairs of query and offset at once"
            )
        total = None if term.dense is None else self._pairs(term.dense.expand(-1, -1, n, n), places, batch)
        if term.offsets is None:
            return total
        rows = places[:, None, :] - places[:, :, None] + n - 1
        by_offset = rearrange(term.offsets[:, rows], "h w s t -> w h s t").repeat(batch, 1, 1, 1)
        return by_offset if total is None else total + by_offset


@contextmanager
def subsampling(model: nn.Module, when: str) -> Iterator[list[SubsampledAttention]]:
    """Inside the block every `SubsampledAttention` of ``model`` samples in "training", "always" or "never".

    Raises:
        ValueError: for another word, or a model without any.
    """
    if when not in WHEN:
        raise ValueError(f"when: expected one of {WHEN}, got {when!r}")
    found = [module for module in model.modules() if isinstance(module, SubsampledAttention)]
    if not found:
        raise ValueError("model: expected a mixer 'subsampled' in it, got none")
    before = [one.when for one in found]
    for one in found:
        one.when = when
    try:
        yield found
    finally:
        for one, said in zip(found, before, strict=True):
            one.when = said


def ensemble(model: nn.Module, run: Callable[[], Tensor], num_draws: int, *, probabilities: bool = True) -> Float[Tensor, "..."]:
    """The mean of ``run()`` over draws of the windows, each a sub-model of ``model``.

    Args:
        model: holds `SubsampledAttention`; in evaluation mode, so that nothing else is random. Its mixers' generators draw.
        run: calls it and returns its logits or outputs.
        num_draws: how many.
        probabilities: average the softmax of the last dimension (classes, vocabulary), not the outputs.

    Raises:
        ValueError: if ``num_draws`` is less than 1.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, got {num_draws}")
    total: Tensor | None = None
    with subsampling(model, "always"):
        for _ in range(num_draws):
            output = run().softmax(dim=-1) if probabilities else run()
            total = output if total is None else total + output
    if total is None:
        raise ValueError("run: expected a tensor, got none")
    return total / num_draws
