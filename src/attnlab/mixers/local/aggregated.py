"""Aggregated attention: sharp nearby, pooled far away, one softmax over both."""

from __future__ import annotations

from attnlab.core.catalog import mixers
from attnlab.mixers.parts.foveal import FOVEAL, FovealAttention


@mixers.register("aggregated", family="local", paper="transnext", supports=FOVEAL, example={"pool": 3})
class AggregatedAttention(FovealAttention):
    r"""Neighbourhood and pooled map under one softmax, with cosine logits (Shi 2023, TransNeXt, section 3.2).

    For one head on an H x W map: queries, keys and values $q, k, v$; a neighbourhood $N(i)$ of k x k cells, out of which cells
    beyond the border are left; the pooled map $X' = \mathrm{LN}(\mathrm{pool}(\mathrm{GELU}(W_p X)))$ of P cells, with keys and
    values $k', v'$ by the same projections. With $\hat q = q / \lVert q \rVert$, likewise $\hat k$, and
    $Q_i = (\hat q_i + e)\,\tau \ln(|N(i)| + P)$,

    $$[A_i, A'_i] = \mathrm{softmax}\big([Q_i^\top \hat k_j + b_{j - i}]_{j \in N(i)},
      [Q_i^\top \hat k'_m + \mathrm{CPB}_{im}]_m\big)$$
    $$o_i = \sum_{j \in N(i)} (A_{ij} + \hat q_i^\top T_{j - i} + u_{j - i})\, v_j + \sum_m A'_{im} v'_m$$

    $e$ (query embedding), $\tau = \mathrm{softplus}(t)$, $b$, $T$ (width d an offset) and $u$ are learned a head; CPB is an
    MLP on the log-spaced offset to the centre of a pooled cell (`PooledCPB`). The weights $\hat q^\top T + u$ come after the
    softmax, so that a row does not sum to one. Both softmax parts are merged by their log-sum-exp: time O(n (k^2 + P) C + n C^2),
    memory O(n (C + k^2)), no tensor between all tokens. ``record`` collects "local_share" (b, h, n), the softmax mass on the
    neighbourhood. Pooled values are of no token, so there is no matrix between tokens.

    Masked cells are in no neighbourhood, no mean and no count; a pooled cell without a real cell is no key.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `FovealAttention`.

    Raises:
        UnsupportedError: with ``causal=True``; without a grid of rank 2: what is pooled of a sequence would depend on
            its padding.
        ValueError: for an even window, or a number below 1.

    Differs from the paper: no dropout on the weights; linear layers begin as PyTorch's do.
    The authors' last stage has no neighbourhood and no pooling: that is `scaled_cosine` with the position "log_cpb".
    """
