"""What a check works on: the mixer under check in all its forms, drawn inputs, and measurements."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.checking.draw import Draw
from attnlab.checking.outcome import NotApplicable
from attnlab.checking.subject import Subject
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports


@dataclass(frozen=True)
class Profile:
    """How much is drawn.

    Args:
        name: as `attnlab.check(profile=...)` takes it.
        cases: draws for each pair of a form (causal or not) and a grid rank.
        crossed: whether every form is tried with every rank, or only each of both at least once.
        splits: random splits of each streamed sequence.
        lengths: awkward lengths.
    """

    name: str
    cases: int
    crossed: bool
    splits: int
    lengths: tuple[int, ...]


PROFILES = {
    "default": Profile("default", cases=1, crossed=False, splits=2, lengths=(1, 3, 17, 65)),
    "thorough": Profile("thorough", cases=8, crossed=True, splits=12, lengths=(1, 2, 3, 5, 17, 31, 33, 63, 64, 65, 129, 257)),
}


@dataclass(frozen=True)
class Inputs:
    """The arguments of `Mixer.forward`, wrong ones too: what they must be is the mixer's to say, so no shape is written here."""

    x: Tensor
    context: Tensor | None = None
    mask: Tensor | None = None
    context_mask: Tensor | None = None
    pair_mask: Tensor | None = None
    grid: Any = None

    def apply(self, mixer: Mixer) -> Float[Tensor, "b n c"]:
        """The output of ``mixer``."""
        return mixer(
            self.x,
            self.context,
            mask=self.mask,
            context_mask=self.context_mask,
            pair_mask=self.pair_mask,
            grid=self.grid,
        )

    def matrix(self, mixer: Mixer) -> Float[Tensor, "b h n m"]:
        """The mixing matrix of ``mixer``."""
        return mixer.mixing_matrix(
            self.x,
            self.context,
            mask=self.mask,
            context_mask=self.context_mask,
            pair_mask=self.pair_mask,
            grid=self.grid,
        )

    def map_tokens(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with ``change`` applied to ``x`` and ``context``."""
        return replace(self, x=change(self.x), context=None if self.context is None else change(self.context))


@dataclass(frozen=True)
class Trial:
    """One mixer with one drawn input; as text, what must be said to draw it again."""

    mixer: Mixer
    inputs: Inputs
    causal: bool

    def __str__(self) -> str:
        batch, n = self.inputs.x.shape[:2]
        return f"causal={self.causal}, batch {batch}, n={n}, grid {self.inputs.grid}"


@dataclass(frozen=True)
class Measured:
    """Output and gradients (of a random projection of the output, by name: "x", "context", and the parameters)."""

    output: Tensor
    gradients: dict[str, Tensor]


def measure(mixer: Mixer, inputs: Inputs, *, train: bool = False) -> Measured:
    """Run ``mixer`` forward and backward; in training mode on a copy, with the global generator at a fixed seed."""
    if train:
        mixer = copy.deepcopy(mixer).train()
        torch.manual_seed(0)
    inputs = inputs.map_tokens(lambda tokens: tokens.detach().clone().requires_grad_())
    leaves = {"x": inputs.x, **({} if inputs.context is None else {"context": inputs.context}), **dict(mixer.named_parameters())}
    output = inputs.apply(mixer)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    return Measured(output.detach(), gradients_of((output * direction).sum(), leaves))


def gradients_of(loss: Float[Tensor, ""], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of ``loss`` with respect to each leaf, zeros where it has no influence; the graph is kept."""
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, retain_graph=True)
    return dict(zip(leaves, gradients, strict=True))


def squarest(n: int, rank: int) -> Grid:
    """The grid of ``n`` cells whose last two sides differ least; those before are 1."""
    side = next(side for side in range(math.isqrt(n), 0, -1) if n % side == 0)
    return {1: (n,), 2: (side, n // side), 3: (1, side, n // side)}[rank]


@dataclass
class Bench:
    """A subject with a profile and a seeded source of draws."""

    subject: Subject
    profile: Profile
    draw: Draw
    looked_at: int = field(default=0, init=False)

    @property
    def supports(self) -> Supports:
        """What the subject promises."""
        return self.subject.supports

    def mixers(self, *, causal: bool | None = None) -> Iterator[Mixer]:
        """The forms of the subject, in float64 and evaluation mode: causal, not causal, or whichever there are."""
        for form in self.subject.forms:
            if causal is None or form == causal:
                yield self.subject.mixer(form)

    def trials(self, *, causal: bool | None = None, ranks: Sequence[int] | None = None, batch: int = 2) -> Iterator[Trial]:
        """Drawn inputs: each form and each grid rank at least once, in a thorough profile each with each."""
        forms = [form for form in self.subject.forms if causal is None or form == causal]
        for form, rank in self._pairs(forms, sorted(self.supports.grid) if ranks is None else ranks):
            mixer = self.subject.mixer(form)
            for _ in range(self.profile.cases):
                yield Trial(mixer, self.inputs(mixer, self.draw.grid(rank), batch), mixer.causal)

    def _pairs(self, forms: Sequence[bool], ranks: Sequence[int]) -> list[tuple[bool, int]]:
        if not forms or self.profile.crossed:
            return [(form, rank) for form in forms for rank in ranks]
        start = self.draw.integer(0, len(forms) - 1)
        count = max(len(forms), len(ranks))
        return [(forms[(start + i) % len(forms)], ranks[i % len(ranks)]) for i in range(count)]

    def inputs(self, mixer: Mixer, grid: Grid, batch: int = 2) -> Inputs:
        """Random tokens on ``grid``, with the mixer's prefix in front; on another grid of its rank where the mixer fixes n."""
        self.looked_at += 1
        n = math.prod(grid) + mixer.num_prefix
        if mixer.fixed_tokens not in (None, n):
            n = mixer.fixed_tokens
            grid = squarest(n - mixer.num_prefix, len(grid))
        return Inputs(self.draw.normal(batch, n, mixer.dim), grid=grid if len(grid) > 1 else None)

    def sized(self, mixer: Mixer, grid: Grid) -> Mixer:
        """``mixer``, or where an option fixes how many tokens there are, one of the same form for those of ``grid``."""
        n = math.prod(grid) + mixer.num_prefix
        if mixer.fixed_tokens in (None, n):
            return mixer
        if self.subject.factory is None:
            raise NotApplicable(f"it is built, for {mixer.fixed_tokens} tokens")
        return self.subject.mixer(mixer.causal, n)

    def context_for(self, trial: Trial) -> Float[Tensor, "b m c2"]:
        """A random context of another length than the trial's tokens."""
        batch, n = trial.inputs.x.shape[:2]
        return self.draw.normal(batch, n + self.draw.integer(1, 4), trial.mixer.context_dim)

    def said(self) -> str:
        """How much was looked at, for the record; NotApplicable if it was nothing."""
        if not self.looked_at:
            raise NotApplicable("no form of this mixer can be looked at")
        return f"{self.looked_at} {'case' if self.looked_at == 1 else 'cases'}"
