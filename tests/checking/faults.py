"""Faults in what a mixer computes: padding, empty rows, causality, streaming, batch, precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.core.masks import Masks, causal_pairs
from attnlab.core.state import State
from checking.planting import plant
from checking.toys import ToyAttention, ToyRecurrence, at_once, attention_op, weigh

# Law 1


class RawInput(ToyAttention):
    """Hands what really stands at masked tokens to `finish`."""

    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        self.raw = x
        return super().forward(x, context, mask=mask, context_mask=context_mask, pair_mask=pair_mask, grid=grid)


@plant("padding_inside", "differs")
class PaddingInGate(RawInput):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) * torch.sigmoid(self.gate(self.raw.detach().mean(dim=1, keepdim=True)))


@plant("padding_right", "output at masked tokens must be exactly 0")
class OutputAtMaskedTokens(ToyAttention):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y = super().forward(x, context, mask=mask, context_mask=context_mask, pair_mask=pair_mask, grid=grid)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 1e-30)


@plant("padding_left", "gradient of x at masked tokens must be exactly 0")
class PaddingInShortConvolution(ToyRecurrence):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y, _ = self.advance(x, self.begin(x.shape[0], x.device, x.dtype), mask=mask)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)


@plant("padding_context", "gradient of context at masked tokens must be exactly 0")
class PaddingInContext(ToyAttention):
    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        y = super().forward(x, context, mask=mask, context_mask=context_mask, pair_mask=pair_mask, grid=grid)
        return y if context is None else y + 1e-6 * context.mean(dim=1, keepdim=True)


@plant("padding_right_equals_shorter", "masked tokens more on the right")
class MeanOverMaskedTokens(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) + (0.0 if self.causal else x.mean(dim=1, keepdim=True))


@plant("padding_mask_of_ones", "mask of ones")
class TwoPaths(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) * (1.0 if mask is None else 1.0 + 1e-6)


# Law 2


def nan_rows(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))).softmax(dim=-1) @ v


@plant("empty_rows", "a gradient of queries without a key has NaN")
class NaNRow(ToyAttention):
    op = attention_op("toy_nan_rows", nan_rows)


class NoZeros(ToyAttention):
    """Has no base class that zeroes its output."""

    def forward(self, x, context=None, *, mask=None, context_mask=None, pair_mask=None, grid=None):
        grid = self._validate(x, context, mask, context_mask, pair_mask, grid)
        y = self.mix(x, context, Masks(mask, mask if context is None else context_mask, pair_mask), grid)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)


@plant("empty_rows_pair_mask", "output of queries without a key must be exactly 0")
class BiasOnEmptyRow(NoZeros):
    """The bias of the output projection shows where nothing was attended to."""


@plant("empty_rows_context", "output of queries without a key must be exactly 0")
class BiasOnEmptyContext(NoZeros):
    """The same where the context is masked throughout."""


# Law 3


@plant("causality_gradient", "output 0 depends on input 1")
class OneStepLeak(ToyAttention):
    def pairs(self, q, k, key_mask, pair_mask):
        n, m = q.shape[2], k.shape[2]
        allowed = causal_pairs(n, m).roll(-1, dims=0) if self.causal and n > 1 else torch.ones(n, m, dtype=torch.bool)
        return allowed if key_mask is None else allowed & key_mask[:, None, None]


@plant("causality_perturbation", "when later inputs change")
class LeakThroughNorm(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) / (1.0 + x.square().mean(dim=1, keepdim=True))


@plant("causality_truncation", "cut after")
class LeakOfLength(ToyRecurrence):
    def accumulate(self, u: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return super().accumulate(u / u.shape[1], total)


# Law 4


@plant("streaming_splits", "in pieces of")
class StateOffByOne(ToyRecurrence):
    def convolve(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        u, _ = super().convolve(x, tail)
        return u, torch.cat([tail, x], dim=1)[:, x.shape[1] - 1 : -1]


@plant("streaming_padding", "in pieces of")
class ForgetsMaskOfPast(ToyAttention):
    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        y, after = super().advance(x, state, mask=mask)
        return y, State({**after, "real": torch.ones_like(after["real"])})


@plant("streaming_mask_begins_late", "IndexError|RuntimeError")
class MaskFromTheBeginningOnly(ToyAttention):
    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        y, after = super().advance(x, state, mask=mask)
        return y, (State({**after, "real": state["real"]}) if mask is None else after)


@plant("streaming_gradient", "gradient of x")
class DetachedState(ToyRecurrence):
    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        return super().advance(x, state.detach(), mask=mask)


@plant("streaming_keeps_its_input", "extend changed 'total'")
class StateInPlace(ToyRecurrence):
    def advance(self, x: Tensor, state: State, *, mask: Tensor | None) -> tuple[Tensor, State]:
        y, after = super().advance(x, state, mask=mask)
        state["total"].copy_(after["total"])
        return y, after


@plant("streaming_state_save_load", "continues otherwise")
class StateInMixer(ToyRecurrence):
    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        self.sum = torch.zeros(batch_size, self.dim, device=device, dtype=dtype)
        return super().begin(batch_size, device, dtype)

    def accumulate(self, u: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        sums, self.sum = super().accumulate(u, self.sum)
        return sums, total


@plant("streaming_state_select", "state re-ordered")
class StateOfPlaces(ToyRecurrence):
    """Reads the state by the example's place in the batch."""

    def accumulate(self, u: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return super().accumulate(u, total * torch.arange(1, total.shape[0] + 1, device=u.device)[:, None])


@plant("streaming_state_dtype", "expected torch.float64")
class StateInSingle(ToyRecurrence):
    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return super().begin(batch_size, device, torch.float32)


# Law 5


@plant("batch_independence", "training: an output depends on another example")
class BatchStatistics(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed, x, mask) - (mixed.mean() if self.training else 0.0)


@plant("batch_independence_masked", "alone, with a mask")
class LongestOfBatch(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        longest = 1.0 if mask is None else mask.sum(dim=1).amax()
        return super().finish(mixed, x, mask) / longest


# Law 6


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    return at_once(q * 1.0001, k, v, allowed)


@plant("precision_float64", "against the reference: output")
class WrongScale(ToyAttention):
    op = attention_op("toy_wrong_scale", wrong_scale)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    return at_once(q, HalfGradient.apply(k), v, allowed)


@plant("precision_float64", "against the reference: gradient of x")
class WrongGradient(ToyAttention):
    op = attention_op("toy_wrong_gradient", wrong_gradient)


def rounded_to(dtype: torch.dtype, only: torch.dtype):
    def run(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        return at_once(q, k, v.to(dtype).to(v.dtype) if v.dtype == only else v, allowed)

    return run


@plant("precision_float32", "the output is off by")
class HalfInside(ToyAttention):
    op = attention_op("toy_half_inside", rounded_to(torch.float16, only=torch.float32))


@plant("precision_bfloat16", "the output is off by")
class EighthInside(ToyAttention):
    op = attention_op("toy_eighth_inside", rounded_to(torch.float8_e5m2, only=torch.bfloat16))


@plant("precision_autocast", "RuntimeError")
class MixesDtypes(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        examples, tokens = (torch.arange(size, device=x.device) for size in x.shape[:2])
        return torch.zeros_like(x).index_put((examples[:, None], tokens), super().finish(mixed, x, mask))


def without_last_tile(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    usable = torch.arange(k.shape[2], device=k.device) < max(16, k.shape[2] // 16 * 16)
    return at_once(q, k, v, usable if allowed is None else allowed & usable)


@plant("awkward_lengths", "n=17")
class DropsLastTile(ToyAttention):
    op = attention_op("toy_drops_last_tile", without_last_tile)


# Law 9


@plant("determinism", "other bits")
class NoiseInEvaluation(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(mixed * (1.0 + 1e-12 * torch.rand_like(mixed)), x, mask)


@plant("randomness_is_declared", "no option 'generator'")
class GlobalDropout(ToyAttention):
    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(nn.functional.dropout(mixed, 0.5, self.training), x, mask)


@plant("generator", "generators of the same seed")
class IgnoresGenerator(ToyAttention):
    def __init__(self, dim, num_heads=8, *, causal=False, generator=None, device=None, dtype=None) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.generator = generator

    def finish(self, mixed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().finish(nn.functional.dropout(mixed, 0.5, self.training), x, mask)


# What is read out


@plant("mixing_matrix", "matrix @ values against what was mixed")
class MatrixWithoutMask(ToyAttention):
    def matrix(self, x, context, masks, grid):
        whole = super().matrix(x, context, masks._replace(pair=None), grid)
        return whole if masks.pair is None else whole.masked_fill(~masks.pair, 0.0)


@plant("mixing_matrix_gradient", "through the matrix")
class DetachedMatrix(ToyAttention):
    def matrix(self, x, context, masks, grid):
        return super().matrix(x, context, masks, grid).detach()


@plant("pair_mask", "depends on a key left out")
class IgnoresPairMask(ToyAttention):
    def pairs(self, q, k, key_mask, pair_mask):
        return super().pairs(q, k, key_mask, None)


@plant("pair_mask_broadcast", "repeated")
class PairMaskOfFirstHead(ToyAttention):
    def pairs(self, q, k, key_mask, pair_mask):
        if pair_mask is not None and pair_mask.shape[1] > 1:
            pair_mask = pair_mask & (torch.arange(self.num_heads) == 0)[:, None, None]
        return super().pairs(q, k, key_mask, pair_mask)


@plant("pair_mask_equals_mask", "pair_mask against mask")
class PairMaskAfterSoftmax(ToyAttention):
    def mix(self, x, context, masks, grid):
        q, k, v = self.project(x, context)
        weights = weigh(q @ k.mT * q.shape[-1] ** -0.5, self.pairs(q, k, masks.key, None))
        weights = weights if masks.pair is None else weights.masked_fill(~masks.pair, 0.0)
        return self.finish(weights @ v, x, masks.query)


@plant("cross", "does not depend on the context")
class IgnoresContext(ToyAttention):
    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context)
        return q, 0.0 * k, 0.0 * v


@plant("cross_with_itself", "context=x")
class ContextIsAnother(ToyAttention):
    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x, None if context is None else context * 1.01)


# Packed sequences


@plant("packed_sequences", "packed lengths")
class ReadsTheSequenceBefore(ToyRecurrence):
    def mix_packed(self, x, lengths):
        return self.mix(x[None], None, Masks(), (len(x),))[0]


@plant("bad_input_packed", "cu_seqlens beyond the tokens")
class AnyLengths(ToyAttention):
    def packed(self, x, cu_seqlens):
        end = int(cu_seqlens[-1])
        return super().packed(x, cu_seqlens if end < len(x) else cu_seqlens.clamp(max=len(x)))
