"""HMT: a frozen or trained model over segments, with a queue of their summaries and recall from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.masks import check_mask, zero_masked
from attnlab.core.record import emit, recording
from attnlab.core.state import State
from attnlab.models.embedded import EmbeddedLM
from attnlab.models.language import CausalLM
from attnlab.models.memory_recall import MemoryRecall
from attnlab.models.registry import models
from attnlab.models.segments import flags, last_real, real_first

SUMMARIES = ("current", "previous")
"""Of which segment the summary that recall asks with may be."""


class _Segment(NamedTuple):
    """Embeddings of a segment's tokens, real ones first, and which there are."""

    x: Float[Tensor, "b n c"]
    real: Bool[Tensor, "b n"] | None


class HierarchicalMemory(nn.Module):
    r"""Recurrence over segments with recall (He et al. 2024, HMT, section 3), around a map of embeddings to hidden states.

    With a model $f$, learned prompt $T$, memories $P$ of the last M segments, and segment $H_n$ of S tokens,

    $$q_n = f([T \,\|\, H_n[{:}\,\phi S] \,\|\, T])_{\text{last}}, \qquad
    m_n = \mathrm{softmax}(s\,(q_n W_q^\top)(P W_k^\top)^\top)\, P,$$
    $$O_n = f([m_n \,\|\, H_{n-1}[-k{:}] \,\|\, H_n \,\|\, m_n]), \qquad P \leftarrow P \,\|\, (O_n)_{\text{last}},$$

    and the output is $O_n$ at the tokens of the segment. Without memories $m_1$ is learned. Time O(n / S) runs of f over
    $\phi S + 2$ and over S + k + 2 tokens, memory of the queue O(M). State: ``memories`` (b, M, dim) and which of them there are,
    ``filled`` (b, M); ``preserved`` (b, k', dim), k' <= k, and ``preserved_real``, (b, 0) as long as no mask was given;
    ``query`` (b, dim), used with ``summary="previous"``.

    Args:
        backbone: maps (b, n, dim) to (b, n, dim), causally; called with ``mask=`` if a mask was given, and without otherwise.
        dim: width.
        segment: S.
        memory_size: M.
        num_preserved: k, tokens before the segment that the model sees again.
        summary_fraction: phi, the part of the segment that is summarised; at least one token.
        summary: "current" as in the paper: how much of which memory its first token sees depends on the first half of its own
            segment, so that the whole is causal by segments only. "previous": the last part of the segment before is
            summarised, and outputs depend on no later token.
        recall_dim: h, width of the queries and keys of recall; by default ``dim``.
        recall_scale: "root" or "width", see `MemoryRecall`.
        unroll: segments of a call through which gradients flow before the state is cut off; None for all.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an option out of its range.

    Differs from the paper: its browsing of further segments in inference, and the schedule by which training lengthens
    ``unroll``, are not here. A masked token is as if it were not there: real ones move together before segments are cut.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: int,
        *,
        segment: int = 1024,
        memory_size: int = 300,
        num_preserved: int = 32,
        summary_fraction: float = 0.5,
        summary: str = "current",
        recall_dim: int | None = None,
        recall_scale: str = "root",
        unroll: int | None = 2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        limits = (("segment", segment, 1), ("memory_size", memory_size, 1), ("num_preserved", num_preserved, 0))
        for name, value, least in (*limits, ("unroll", 1 if unroll is None else unroll, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0.0 < summary_fraction <= 1.0:
            raise ValueError(f"summary_fraction: expected more than 0 and at most 1, got {summary_fraction}")
        if summary not in SUMMARIES:
            raise ValueError(f"summary: expected one of {SUMMARIES}, got {summary!r}")
        self.backbone, self.dim, self.summary, self.unroll = backbone, dim, summary, unroll
        self.segment, self.memory_size, self.num_preserved = segment, memory_size, num_preserved
        self.summary_length = max(int(segment * summary_fraction), 1)
        self.prompt = nn.Parameter(torch.empty(dim, device=device, dtype=dtype).normal_(std=0.02))
        self.first_memory = nn.Parameter(torch.empty(dim, device=device, dtype=dtype).normal_(std=0.02))
        self.recall = MemoryRecall(dim, recall_dim, scale=recall_scale, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """Hidden states of a whole sequence of embeddings, zero at masked tokens."""
        return self.extend(x, self.init_state(x.shape[0]), mask=mask)[0]

    def init_state(self, batch_size: int) -> State:
        """No memories, nothing preserved."""
        zeros = self.prompt.new_zeros(batch_size, self.memory_size, self.dim)
        return State(
            {
                "memories": zeros,
                "filled": torch.zeros(zeros.shape[:2], dtype=torch.bool, device=zeros.device),
                "preserved": zeros[:, :0],
                "preserved_real": torch.zeros(batch_size, 0, dtype=torch.bool, device=zeros.device),
                "query": zeros[:, 0],
            }
        )

    def extend(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """The next n >= 1 embeddings, cut into segments from the first of them on.

        A call begins a segment: pieces of whole segments give what `forward` gives at once, others have other segments.

        Args:
            x: embeddings, (batch, n, dim).
            state: what `init_state` or the last call returned; it is not changed.
            mask: (batch, n), True marks a real token.

        Returns:
            Hidden states (batch, n, dim) and the state after these tokens.

        Raises:
            ValueError: for embeddings of another width, or none.
        """
        if x.dim() != 3 or x.shape[2] != self.dim or x.shape[1] < 1:
            raise ValueError(f"x: expected (batch, n >= 1, {self.dim}), got {tuple(x.shape)}")
        check_mask("mask", mask, tuple(x.shape[:2]))
        aligned, real = None, None
        if mask is not None:
            aligned = real_first(mask)
            x, real = aligned.spread(zero_masked(x, mask)[:, None])[:, 0], aligned.live
        pieces = x.split(self.segment, 1)
        reals = [None] * len(pieces) if real is None else list(real.split(self.segment, 1))
        outputs = []
        for number, segment in enumerate(map(_Segment, pieces, reals)):
            if self.unroll is not None and number and number % self.unroll == 0:
                state = state.detach()
            hidden, state = self._process(segment, state)
            outputs.append(hidden)
        y = torch.cat(outputs, 1)
        return (y, state) if aligned is None else (zero_masked(aligned.collect(y[:, None])[:, 0], mask), state)

    def _process(self, segment: _Segment, state: State) -> tuple[Float[Tensor, "b n c"], State]:
        """Summarise, recall, run the model, remember."""
        query = self._summarize(segment, first=True) if self.summary == "current" else state["query"]
        recalled = self._recall(query, state)
        slot = recalled[:, None]
        n, kept = segment.x.shape[1], state["preserved"].shape[1]
        real = self._together(segment.real, state["preserved_real"], kept, n)
        hidden = self._run(torch.cat((slot, state["preserved"], segment.x, slot), 1), real)
        memory, tokens = hidden[:, -1], hidden[:, 1 + kept : 1 + kept + n]
        there = state["filled"].new_ones(len(memory)) if segment.real is None else segment.real.any(1)
        # An example that has ended keeps its queue and its preserved tokens.
        queue, filled = _append(state["memories"], memory, there), _append(state["filled"], there, there)
        after = {"memories": queue, "filled": filled, **self._preserve(segment, state)}
        if self.summary == "previous":
            after["query"] = torch.where(there[:, None], self._summarize(segment, first=False), state["query"])
        return tokens, state.replace(**after)

    def _summarize(self, segment: _Segment, *, first: bool) -> Float[Tensor, "b c"]:
        """What the model makes of a prompt behind the first or the last part of the segment, between two prompts."""
        prompt = self.prompt.expand(len(segment.x), 1, -1)
        n = segment.x.shape[1]
        length = min(self.summary_length, n)
        if first or segment.real is None:
            part = slice(0, length) if first else slice(n - length, n)
            x, real = segment.x[:, part], None if segment.real is None else segment.real[:, part]
        else:
            x, real = last_real(segment.x, segment.real, length)
        ones = None if real is None else real.new_ones(len(real), 1)
        mask = None if real is None or ones is None else torch.cat((ones, real, ones), 1)
        return self._run(torch.cat((prompt, x, prompt), 1), mask)[:, -1]

    def _recall(self, query: Float[Tensor, "b c"], state: State) -> Float[Tensor, "b c"]:
        """A mix of the memories, or the learned first one where there are none."""
        query, filled = query[:, None], state["filled"]
        if recording():
            emit(self, "recall", self.recall.weights(query, state["memories"], mask=filled))
        recalled = self.recall(query, state["memories"], mask=filled)[:, 0]
        return torch.where(filled.any(1, keepdim=True), recalled, self.first_memory)

    def _preserve(self, segment: _Segment, state: State) -> dict[str, Tensor]:
        """The last k tokens so far."""
        old, size = state["preserved"], self.num_preserved
        x = torch.cat((old, segment.x), 1)
        seen = flags(segment.real, state["preserved_real"], old.shape[1], segment.x.shape[1])
        if seen is None:
            return {"preserved": x[:, max(x.shape[1] - size, 0) :]}
        x, real = last_real(x, seen, min(size, x.shape[1]))
        return {"preserved": x, "preserved_real": real}

    def _together(self, real: Tensor | None, before: Tensor, kept: int, n: int) -> Bool[Tensor, "b m"] | None:
        """The mask of a run: slot, preserved tokens, segment, slot."""
        seen = flags(real, before, kept, n)
        if seen is None:
            return None
        ones = seen.new_ones(len(seen), 1)
        return torch.cat((ones, seen, ones), 1)

    def _run(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
        hidden: Tensor = self.backbone(x) if mask is None else self.backbone(x, mask=mask)
        return hidden


def _append(queue: Tensor, new: Tensor, there: Bool[Tensor, "b"]) -> Tensor:
    """The queue (b, M, ...) with ``new`` at its end and without its oldest, for the examples that are there."""
    moved = torch.cat((queue[:, 1:], new[:, None]), 1)
    return torch.where(there.view(-1, *[1] * (queue.dim() - 1)), moved, queue)


@models.register("hmt", paper="hmt")
class HierarchicalMemoryLM(nn.Module):
    """`HierarchicalMemory` around a `CausalLM`: token ids to logits of the next token, over any number of segments.

    Args:
        model: a `CausalLM`; its parameters are used, not copied.
        segment: tokens of a segment.
        memory_size: segments that are remembered.
        num_preserved: tokens before a segment that the model sees again.
        summary_fraction: the part of a segment that is summarised.
        summary: "current" (the paper's) or "previous" (no logit depends on a later token).
        recall_dim: width of the queries and keys of recall; by default the model's.
        recall_scale: "root" or "width".
        unroll: segments through which gradients flow, or None for all.

    Raises:
        TypeError: for something that is no `CausalLM`.
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        segment: int = 1024,
        memory_size: int = 300,
        num_preserved: int = 32,
        summary_fraction: float = 0.5,
        summary: str = "current",
        recall_dim: int | None = None,
        recall_scale: str = "root",
        unroll: int | None = 2,
    ) -> None:
        super().__init__()
        if not isinstance(model, CausalLM):
            raise TypeError(f"model: expected a CausalLM, got {type(model).__name__}")
        weight = model.embedding.weight
        self.embedded = EmbeddedLM(model)
        self.memory = HierarchicalMemory(
            self.embedded,
            model.dim,
            segment=segment,
            memory_size=memory_size,
            num_preserved=num_preserved,
            summary_fraction=summary_fraction,
            summary=summary,
            recall_dim=recall_dim,
            recall_scale=recall_scale,
            unroll=unroll,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(self, tokens: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        """Logits of the next token at every token; what they are at masked ones means nothing."""
        return self.extend(tokens, self.init_state(tokens.shape[0]), mask=mask)[0]

    def init_state(self, batch_size: int) -> State:
        """The state before the first token."""
        return self.memory.init_state(batch_size)

    def extend(
        self, tokens: Int[Tensor, "b n"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n v"], State]:
        """The next n >= 1 tokens; a call begins a segment, see `HierarchicalMemory.extend`."""
        check_mask("mask", mask, tuple(tokens.shape))
        hidden, state = self.memory.extend(self.embedded.embed(tokens, mask), state, mask=mask)
        return self.embedded.logits(hidden), state
