"""One mixer over a sequence whose pieces lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import alternatives
from attnlab.core.contract import Mixer
from attnlab.core.errors import UnsupportedError
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import Before, State
from attnlab.core.streaming import StreamingMixer
from attnlab.parallel.layout import Layout, checksum, compare, current_layout, describe, find_layout
from attnlab.parallel.processes import ProcessRanks
from attnlab.parallel.ranks import Ranks, Traffic
from attnlab.parallel.registry import parallelisms
from attnlab.positions import Position


class SequenceParallel(nn.Module):
    r"""A mixer over a sequence split among ranks, with one all-gather of summaries a pass (Sun et al. 2025, LASP-2).

    Rank t holds the tokens $X_t$ of the sequence $X_1, \dots, X_W$. What a piece does to the state is an element $M_t$ of a
    monoid, whatever the state before it. All ranks exchange these at once and each goes on from those before its own,

    $$M_t = \mathrm{summarize}(X_t), \qquad [M_1, \dots, M_W] = \mathrm{AllGather}(M_t), \qquad
      O_t = \mathrm{advance}(X_t \mid M_1 \circ \dots \circ M_{t-1})$$

    or, not causal, from all others'. For linear attention $M_t = K_t^\top V_t$, of size d x d a head whatever the length, and
    $\circ$ adds: LASP-2 (arXiv 2502.07563). A decay, a delta rule or a selective scan send the factor beside that they leave of
    an earlier state. For softmax attention $M_t = (K_t, V_t)$ and $\circ$ puts one behind the other: LASP-2H.

    A call makes these collectives: a header of a hundred bytes (lengths, and whether the ranks agree); the counts of real
    tokens where there are masks; the last few tokens of each piece where a short convolution looks back on them; the shapes of
    the summaries where they grow with the piece; and the summaries, in a single message of all tensors. Backward is an
    all-to-all for each of those that carry values, in which a rank gets the gradients of what it gave. Work a rank is that of
    its piece, and its keys and values twice.

    Gradients of parameters are those of the rank's own tokens: `reduce_gradients` adds them up. The loss must be a sum over
    tokens (divide by the number of all of them, not by the rank's), and every rank must call backward, those without a token in
    the loss on something like ``(y * 0).sum()``.

    Args:
        mixer: any mixer whose ``info.supports.associative`` holds. It stays as it is, and keeps its parameters.
        ranks: among whom the sequence is split.

    Raises:
        TypeError: for something that is no mixer.
        UnsupportedError: for a mixer that cannot sum up pieces, or not without causality.

    Differs from the paper: backward sends each rank what it needs, where the paper gathers all $dM_t$ everywhere, with as many
    bytes; communication and the work within a rank are not overlapped; pieces may have different lengths, and padding; what
    forgets (decays, delta rules, selective scans) is an extension.
    """

    def __init__(self, mixer: Mixer, ranks: Ranks) -> None:
        super().__init__()
        require_combinable(mixer)
        self.mixer, self.ranks = mixer, ranks
        self._compared = False

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """What the mixer makes of the whole sequence, at this rank's tokens.

        Args:
            x: the rank's tokens, (batch, n, dim); n may differ between ranks and is at least 1.
            mask: (batch, n), True marks a real token; ranks without one have real tokens alone.

        Raises:
            ValueError: on every rank alike, for an input that is wrong on some rank or differs between them, for options that
                differ, and at the first call for parameters that do.
        """
        layout = current_layout()
        if layout is None:
            layout = find_layout(self.ranks, x, mask, self.mixer, self._problem(x, mask), describe(self.mixer))
            if not self._compared:
                compare(self.ranks, {"parameters": checksum(self.mixer)})
                self._compared = True
        return mix_piece(self.mixer, self.ranks, layout, x, mask)

    def _problem(self, x: Tensor, mask: Tensor | None) -> Exception | None:
        try:
            self.mixer._validate(x, None, mask, None, None, None)
        except (TypeError, ValueError, NotImplementedError) as error:
            return error
        return None


@parallelisms.register("sequence_parallel", paper="lasp2")
def sequence_parallel(
    mixer: Mixer, group: dist.ProcessGroup | None = None, *, size: int | None = None, traffic: Traffic | None = None
) -> SequenceParallel:
    """A mixer over a sequence split among the processes of ``group``, one all-gather of summaries a pass (LASP-2, LASP-2H).

    layer = attnlab.parallel.sequence_parallel(attnlab.create_mixer("delta_net", 256))
    y = layer(attnlab.parallel.split(x))  # this rank's tokens of mixer(x)

    Args:
        mixer: any mixer whose ``info.supports.associative`` holds.
        group: of torch.distributed; None is all processes.
        size: how many ranks are expected; None takes as many as there are.
        traffic: counts what is sent, if given.

    Raises:
        RuntimeError: without a process group; it says how to start one.
        ValueError: for a group of another size than expected.
        UnsupportedError: for a mixer that cannot sum up pieces; some that can are named.
    """
    require_combinable(mixer)
    return SequenceParallel(mixer, ProcessRanks(group, size=size, traffic=traffic))


def require_combinable(mixer: Mixer) -> None:
    """TypeError for what is no mixer, UnsupportedError for one whose pieces cannot be put together by summaries."""
    if not isinstance(mixer, Mixer):
        raise TypeError(f"mixer: expected an attnlab.Mixer, got {type(mixer).__name__}; parallelize takes whole models")
    asked, supports = "sequence parallelism", mixer.supports
    if not isinstance(mixer, StreamingMixer) or not supports.associative:
        raise mixer._refusal(asked, "what a piece does to its state depends on the state before it", associative=True)
    if supports.batch_coupled or mixer.fixed_tokens is not None or mixer.num_prefix:
        why = "it couples examples, counts its tokens or sets some apart, and no rank sees all of them"
        raise mixer._refusal(asked, why, associative=True, batch_coupled=False, tokens_option=None)
    if not mixer.causal:
        _require_sets(mixer)


def _require_sets(mixer: StreamingMixer) -> None:
    """UnsupportedError for a mixer that is not causal, unless its keys may come in any order: those of later ranks come first."""
    why, position = "", getattr(mixer, "position", None)
    if not mixer.supports.permutation_equivariant:
        why = "its keys must stand in order, and a rank meets the others' before its own"
    elif isinstance(position, Position) and _acts_on_pairs(position):
        why = (
            "its position acts on pairs of a query and a key in the order of the text; one in queries and keys, as 'rotary', can"
        )
    elif not _goes_on_from_later(mixer):
        why = "without causality its output is not that of sums over pieces"
    if why:
        others = alternatives(mixer.info, associative=True, permutation_equivariant=True)
        others = [name for name in others if name != mixer.info.name]
        raise UnsupportedError(mixer.info.name, "sequence parallelism with causal=False", why, others)


def _acts_on_pairs(position: Position) -> bool:
    kind: Any = type(position)
    return kind.bias is not Position.bias or kind.factor is not Position.factor or kind.reads_values


@torch.no_grad()
def _goes_on_from_later(mixer: StreamingMixer) -> bool:
    """Whether two pieces, each after the other's summary, give the whole, on a few tokens: no promise speaks of this."""
    weight = next(mixer.parameters(), torch.empty(0))
    if weight.is_meta:
        return True
    modes = [(module, module.training) for module in mixer.modules()]
    mixer.eval()
    try:
        return _two_pieces_are_the_whole(mixer, weight)
    finally:
        for module, mode in modes:
            module.training = mode


def _two_pieces_are_the_whole(mixer: StreamingMixer, weight: Tensor) -> bool:
    x = torch.arange(5.0 * mixer.dim).sin().reshape(1, 5, mixer.dim).to(weight)
    first, second = x.split([2, 3], dim=1)
    nothing, two = x[:, :0], torch.full((1,), 2, device=x.device)
    openings = mixer.opening(first), mixer.opening(second, Before(nothing, nothing[..., 0].bool(), two, two))
    sums = [mixer.digest(piece, opening, mask=None) for piece, opening in zip((first, second), openings, strict=True)]
    after = [mixer.combine(opening, later) for opening, later in zip(openings, reversed(sums), strict=True)]
    parts = [mixer.advance(piece, state, mask=None)[0] for piece, state in zip((first, second), after, strict=True)]
    whole = mixer.mix(x, None, Masks(), (5,))
    return torch.allclose(torch.cat(parts, 1), whole, rtol=0.0, atol=5e-2 * float(whole.abs().max()))


def mix_piece(
    mixer: Mixer, ranks: Ranks, layout: Layout, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b n c"]:
    """`SequenceParallel.forward` with the layout known."""
    if not isinstance(mixer, StreamingMixer):
        raise TypeError(f"mixer: expected a StreamingMixer, got {type(mixer).__name__}")
    mask = layout.mask_of(mask, tuple(x.shape[:2]), x.device)
    x = zero_masked(x, mask)
    before, token = _tokens_before(mixer, ranks, layout, x, mask)
    opening = mixer.opening(x, before)
    summary = mixer.digest(x, opening, mask=mask)
    names = sorted(summary, key=lambda name: (not summary[name].is_floating_point(), name))
    given = [summary[name] for name in names]
    given[0] = ranks.tie(given[0], token)  # backward passes the summaries first and then the tokens before, on every rank
    grows = any(0 in opening[name].shape for name in mixer.memory)
    pieces, token = ranks.gather("summary", given, uneven=grows, gradient=layout.gradient)
    state = opening
    for rank, piece in enumerate(pieces):
        if rank < layout.rank or (not mixer.causal and rank != layout.rank):
            state = mixer.combine(state, State(dict(zip(names, piece, strict=True))))
    y, _ = mixer.advance(x, state, mask=mask)
    return ranks.tie(zero_masked(y, mask), token)


def _tokens_before(
    mixer: StreamingMixer, ranks: Ranks, layout: Layout, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
) -> tuple[Before | None, Tensor | None]:
    """What stands before the piece, None on the first rank, and the token of the collective if there was one."""
    batch, n = x.shape[:2]
    width, token = mixer.lookback, None
    tokens, known = x.new_zeros(batch, width, x.shape[2]), x.new_zeros(batch, width, dtype=torch.bool)
    if width:
        have = min(width, n)
        real = x.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
        own = [F.pad(x[:, n - have :], (0, 0, width - have, 0)), F.pad(real[:, n - have :], (width - have, 0))]
        pieces, token = ranks.gather("halo", own, gradient=layout.gradient)
        earlier = [
            [t[:, width - min(width, length) :] for t in piece] for piece, length in zip(pieces, layout.lengths, strict=True)
        ]
        tokens, known = (
            torch.cat([nothing, *parts], dim=1)[:, -width:]
            for nothing, *parts in zip((tokens, known), *earlier[: layout.rank], strict=True)
        )
    if layout.rank == 0:
        return None, token
    count = torch.full((batch,), layout.start, device=x.device)
    return Before(tokens, known, count, layout.real_before(batch, x.device)), token
