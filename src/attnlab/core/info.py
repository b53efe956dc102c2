"""What a registered thing says of itself: name, paper, options, and what it supports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Causality = Literal["no", "optional", "always"]
StateSize = Literal["none", "bounded", "grows"]


@dataclass(frozen=True)
class Supports:
    """The promises of a token mixer. Each is checked where it is made, and refused where it is not.

    Args:
        causal: "no", "optional" (``causal=`` chooses) or "always" (the mechanism has no other form).
        cross: ``context=``, keys and values from another sequence.
        mask: ``mask=`` and, with ``cross``, ``context_mask=``.
        pair_mask: ``pair_mask=``, a choice of keys for each query.
        streaming: ``init_state`` and ``extend``.
        grid: the ranks that ``grid=`` may have; a flat sequence is rank 1.
        mixing_matrix: the map that multiplies the values can be read out.
        permutation_equivariant: permuting the tokens permutes the output, when not causal.
        batch_coupled: an example's output depends on its neighbours in the batch, by definition.
        state: size of the streaming state: "none", "bounded", or "grows" with the tokens seen.
        associative: ``summarize`` and ``combine``: what pieces do to the state can be summed up apart and put together.
        dynamics: ``dynamics``, the mechanism as a linear recurrence (of its causal form).
        discontinuous: by definition the output jumps where a choice flips (top-k, thresholds, look-ups).
        tokens_option: name of the constructor's option that fixes how many tokens there are; None takes any number.
        cost: exponent of n in the time and memory of a forward pass.
    """

    causal: Causality = "no"
    cross: bool = False
    mask: bool = True
    pair_mask: bool = False
    streaming: bool = False
    grid: frozenset[int] = frozenset({1})
    mixing_matrix: bool = False
    permutation_equivariant: bool = False
    batch_coupled: bool = False
    state: StateSize = "none"
    associative: bool = False
    dynamics: bool = False
    discontinuous: bool = False
    tokens_option: str | None = None
    cost: float | int = 2.0

    @property
    def varlen(self) -> bool:
        """Packed sequences by cumulative lengths: whatever takes a sequence of any length and looks at no other example."""
        return 1 in self.grid and not self.batch_coupled and self.tokens_option is None

    def as_dict(self) -> dict[str, Any]:
        """All promises by name, derived ones too."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "varlen": self.varlen}

    def matches(self, **wanted: object) -> bool:
        """Whether this has what is wanted: ``causal=True``, ``grid=2``, ``streaming=True``, ..."""
        known = self.as_dict()
        for name, value in wanted.items():
            if name not in known:
                raise ValueError(f"filter {name!r}: expected one of {sorted(known)}")
            have = known[name]
            if name == "causal" and isinstance(value, bool):
                if (have != "no") != value:
                    return False
            elif name == "grid" and isinstance(value, int):
                if value not in have:
                    return False
            elif have != value:
                return False
        return True


@dataclass(frozen=True)
class Option:
    """One argument of a constructor: its name, annotation as written, and default (``...`` where it is required)."""

    name: str
    annotation: str
    default: Any = ...


@dataclass(frozen=True)
class Info:
    """What the registry knows of an entry.

    Args:
        name: the name that `create` takes.
        kind: the registry: "mixer", "position", "task", ...
        summary: first line of the docstring.
        family: the room it stands in ("linear", "dense", ...).
        paper: slug of the paper in `attnlab.papers`, or None for common knowledge.
        options: the constructor's arguments.
        partial: it is a part of what the paper has, and not its mechanism.
        also: slugs of further papers whose mechanism it is, with other options.
    """

    name: str
    kind: str
    summary: str
    family: str
    paper: str | None
    options: tuple[Option, ...]
    partial: bool = field(default=False, kw_only=True)
    also: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def papers(self) -> tuple[str, ...]:
        """All papers that it implements, the first one first."""
        return (() if self.paper is None else (self.paper,)) + self.also


@dataclass(frozen=True)
class MixerInfo(Info):
    """`Info` of a token mixer, with its promises.

    Args:
        supports: what the mixer promises.
        example: options that make a small instance for checks and pictures, beyond ``dim`` and ``num_heads``.
    """

    supports: Supports = field(default_factory=Supports)
    example: tuple[tuple[str, Any], ...] = ()


def read_options(factory: Callable[..., Any]) -> tuple[Option, ...]:
    """The options of a function or of a class's constructor, from its signature.

    Where a constructor hands typed keywords (``**options: Unpack[...]``) on to the next class, that one's options follow.
    """
    chain = [c.__init__ for c in factory.__mro__ if "__init__" in vars(c)] if isinstance(factory, type) else [factory]
    found: dict[str, Option] = {}
    for function in chain:
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            annotation = parameter.annotation
            text = "" if annotation is inspect.Parameter.empty else str(getattr(annotation, "__name__", annotation))
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            found.setdefault(parameter.name, Option(parameter.name, text.strip("'"), default))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return tuple(found.values())


def first_line(doc: str | None) -> str:
    """The first non-empty line of a docstring."""
    return next((line.strip() for line in (doc or "").splitlines() if line.strip()), "")
