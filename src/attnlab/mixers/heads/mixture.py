"""Mixture of attention (BAM): whole attention layers as experts, weighed token by token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import create_mixer, mixer_info, mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.record import Tape, record, recording
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import DENSE, AttentionMixer, CachedAttention
from attnlab.mixers.parts.routing import balance_loss, top_k_mask


@mixers.register("mixture_of_attention", family="heads", paper="bam", supports=DENSE, example={"num_experts": 2})
class MixtureOfAttention(StreamingMixer):
    r"""The outputs of N attention layers, each over the whole sequence, weighed by a router (Zhang et al. 2024).

    $$y_t = \sum_{i=1}^{N} g_i(x_t)\, \mathrm{Attn}_i(x)_t, \qquad g(x_t) = \mathrm{softmax}(W_r x_t) ,$$

    over all experts (soft), or with g set to 0 but for its ``num_active`` largest. Every expert has keys and values of all
    tokens, so a token may choose other experts than those before it. Any registered mixer can be the expert; what it promises,
    the mixture does. Time and memory are N times the expert's, top-k or not. State: those of the experts, under ``expert_0/``
    and so on, which is N caches; with ``shared_kv`` one.

    ``record`` collects "gates" (b, n, N), and of the router over real tokens "balance_loss" ($N \sum_i \bar p_i \bar f_i$, with
    the mean $\bar p$ of the softmax and the share $\bar f_i$ of tokens that have expert i among their ``num_active``, soft: as
    their first) and "z_loss" (the mean of $\mathrm{logsumexp}(W_r x)^2$); the authors add 0.01 of the first. The mixing matrix
    is (b, N h, n, m): the heads of the experts in order, each times its expert's gate; N h is what the attribute ``num_heads``
    says and what a ``pair_mask`` may have.

    Args:
        dim: width of the tokens.
        num_heads: h, heads of each expert.
        causal: as the experts allow.
        num_experts: N.
        num_active: experts whose gate stays; None for all, the soft mixture.
        renormalize: divide the gates that stay by their sum.
        expert: name of the experts' mechanism.
        expert_options: its own options.
        experts: built mixers, to be used instead of new ones: see `upcycle`.
        shared_kv: one projection of keys and of values for all experts, which must be of the form "q, k, v, attend": that of the
            first, or of ``experts`` the mean.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for counts that do not fit, experts that differ in form, or ``shared_kv`` where there are no keys and values.
        UnknownNameError: for an unknown expert or option of it.

    Differs from the paper: with ``shared_kv`` every expert computes the shared projection anew. The block around it, attention
    and feed-forward experts in parallel, is the model's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_experts: int = 4,
        num_active: int | None = None,
        renormalize: bool = False,
        expert: str = "softmax",
        expert_options: Mapping[str, Any] | None = None,
        experts: Sequence[Mixer] | None = None,
        shared_kv: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        found = mixer_info(expert).supports if not experts else experts[0].supports
        self._promises = replace(found, associative=False, dynamics=False)
        super().__init__(dim, num_heads, causal=causal)
        num_experts = num_experts if experts is None else len(experts)
        if num_experts < 1:
            raise ValueError(f"num_experts, experts: expected at least one, got {num_experts}")
        if num_active is not None and not 1 <= num_active <= num_experts:
            raise ValueError(f"num_active: expected 1 to num_experts={num_experts}, or None, got {num_active}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if experts is None:
            form = {"causal": causal} if self._promises.causal == "optional" else {}
            options = {**form, **place, **(expert_options or {})}
            built = [create_mixer(expert, dim, num_heads, **options) for _ in range(num_experts)]
        else:
            _require_one_form(experts, dim, num_heads, causal)
            built = [copy.deepcopy(one).to(**place) for one in experts]
        if shared_kv:
            _share_keys(built, average=experts is not None)
        self.experts = nn.ModuleList(built)
        self.router = nn.Linear(dim, num_experts, bias=False, **place)
        self.num_active, self.renormalize, self.shared_kv = num_active, renormalize, shared_kv
        if num_active is not None and num_active < num_experts:
            self._promises = replace(self._promises, discontinuous=True)
        self.num_heads = sum(one.num_heads for one in built)
        self.num_prefix, self.context_dim = built[0].num_prefix, built[0].context_dim
        # a subclass with a state of its own keeps more than keys and values
        alike = isinstance(built[0], CachedAttention) and type(built[0]).begin is CachedAttention.begin
        self.one_cache = shared_kv and alike

    @property
    def supports(self) -> Supports:
        """The promises of the experts, but for summaries and dynamics, which are theirs alone; top-k adds a choice."""
        return self._promises

    @property
    def fixed_tokens(self) -> int | None:
        """As many as the experts were built for; None for any number."""
        return self._experts[0].fixed_tokens

    @property
    def _experts(self) -> list[Mixer]:
        return cast("list[Mixer]", list(self.experts))

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty states of the experts."""
        kept = self._streaming[:1] if self.one_cache else self._streaming
        return _joined([one.begin(batch_size, device, dtype) for one in kept])

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Every expert continues from its own state, or all from the one that they share."""
        steps = []
        for index, one in enumerate(self._streaming):
            steps.append(one.advance(x, state.part(f"expert_{0 if self.one_cache else index}/"), mask=mask))
        kept = [after for _, after in (steps[:1] if self.one_cache else steps)]
        return _weighed([y for y, _ in steps], self._gates(x, mask)), _joined(kept)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """All experts on all tokens, weighed."""
        gates = self._gates(x, masks.query)
        with record(self.experts, only=("values", "mixed")) if recording() else nullcontext() as tape:
            outputs = [one.mix(x, context, self._masks(masks, index), grid) for index, one in enumerate(self._experts)]
        if tape is not None:
            self._show(tape, gates)
        return _weighed(outputs, gates)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The experts' matrices, each row times its gate."""
        maps = [one.matrix(x, context, self._masks(masks, index), grid) for index, one in enumerate(self._experts)]
        return self._gated_heads(maps, self._gates(x, masks.query))

    @property
    def _streaming(self) -> list[StreamingMixer]:
        return cast("list[StreamingMixer]", list(self.experts))

    def _masks(self, masks: Masks, index: int) -> Masks:
        """The masks as expert ``index`` sees them: of a pair mask for every head its own part."""
        if masks.pair is None or masks.pair.shape[1] == 1:
            return masks
        heads = self.num_heads // len(self.experts)
        return masks._replace(pair=masks.pair[:, index * heads : (index + 1) * heads])

    def _gates(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n e"]:
        logits = self.router(x)
        scores = logits.softmax(dim=-1)
        chosen = top_k_mask(scores, self.num_active or 1)
        gates = scores if self.num_active is None else scores.masked_fill(~chosen, 0.0)
        if self.renormalize:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        self.emit("gates", gates)
        self.emit("balance_loss", lambda: balance_loss(scores, chosen, mask))
        self.emit("z_loss", lambda: z_loss(logits, mask))
        return gates

    @staticmethod
    def _gated_heads(parts: Sequence[Tensor], gates: Float[Tensor, "b n e"]) -> Float[Tensor, "b h n m"]:
        return torch.cat([part * gates[:, None, :, i, None] for i, part in enumerate(parts)], dim=1)

    def _show(self, tape: Tape, gates: Float[Tensor, "b n e"]) -> None:
        """Emit "values" and "mixed" of all heads, where the experts do."""
        names = [f"{index}/values" for index in range(len(self.experts))]
        if all(name in tape for name in names):
            self.emit("values", lambda: torch.cat([tape[name] for name in names], dim=1))
            self.emit("mixed", lambda: self._gated_heads([tape[f"{i}/mixed"] for i in range(len(names))], gates))


def upcycle(
    mixers: Sequence[Mixer], *, num_active: int | None = None, renormalize: bool = False, shared_kv: bool = False
) -> MixtureOfAttention:
    """A mixture whose experts are copies of trained mixers, with a new router.

    Alike mixers give what one of them gives, where the gates sum to 1 (soft, or renormalised).

    Args:
        mixers: of one mechanism and form; what they were fine-tuned for may differ.
        num_active: as for `MixtureOfAttention`.
        renormalize: likewise.
        shared_kv: use the mean of their projections of keys and values for all.

    Raises:
        ValueError: if there is none, or they differ in form.
    """
    if not mixers:
        raise ValueError("mixers: expected at least one, got none")
    first, weight = mixers[0], next(mixers[0].parameters(), torch.empty(0))
    return MixtureOfAttention(
        first.dim,
        first.num_heads,
        causal=first.causal,
        experts=mixers,
        num_active=num_active,
        renormalize=renormalize,
        shared_kv=shared_kv,
        device=weight.device,
        dtype=weight.dtype,
    )


def z_loss(logits: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
    r"""The mean of $\mathrm{logsumexp}_e(z)^2$ over real tokens, which keeps a router's logits small (Zoph et al. 2022)."""
    squares = logits.logsumexp(dim=-1).square()
    return squares.mean() if mask is None else squares.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _weighed(outputs: Sequence[Tensor], gates: Float[Tensor, "b n e"]) -> Float[Tensor, "b n c"]:
    total = outputs[0] * gates[..., :1]
    for index, output in enumerate(outputs[1:], start=1):
        total = total + output * gates[..., index : index + 1]
    return total


def _joined(states: Sequence[State]) -> State:
    return State({name: t for index, state in enumerate(states) for name, t in state.prefixed(f"expert_{index}/").items()})


def _require_one_form(experts: Sequence[Mixer], dim: int, num_heads: int, causal: bool) -> None:
    for one in experts:
        found, expected = (type(one), one.dim, one.num_heads, one.causal), (type(experts[0]), dim, num_heads, causal)
        if found != expected:
            said = "experts: expected one mechanism, dim, num_heads and causal, {}, got {}"
            raise ValueError(said.format(*((kind.__name__, *rest) for kind, *rest in (expected, found))))


def _share_keys(experts: Sequence[Mixer], *, average: bool) -> None:
    """One module for the keys' and one for the values' projection in all experts."""
    forms = [one for one in experts if isinstance(one, AttentionMixer)]
    if len(forms) != len(experts):
        name = type(experts[0]).__name__
        raise ValueError(f"shared_kv: expected experts with projections of keys and values, got {name}; use shared_kv=False")
    for part in ("k_proj", "v_proj", "k_norm"):
        modules = [cast("nn.Module", getattr(one, part)) for one in forms]
        if average:
            with torch.no_grad():
                for mine, *others in zip(*(module.parameters() for module in modules), strict=True):
                    mine.copy_(torch.stack([mine, *others]).mean(dim=0))
        for one in forms:
            setattr(one, part, modules[0])
