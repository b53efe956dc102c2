"""A bigram language with triggers, and what it is estimated from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from attnlab.tasks.corpus import load_corpus

Probabilities = Float[np.ndarray, "v"]
Transitions = Float[np.ndarray, "v v"]
Sequences = Int[np.ndarray, "b n"]


def read_text(path: str | os.PathLike[str] | None) -> str:
    """The characters of a text file in UTF-8; without one, 1,000,000 bytes and more of the standard library's sources."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    return load_corpus(1_500_000).splits["train"].numpy().tobytes().decode("latin-1")


@dataclass(frozen=True)
class BigramLanguage:
    r"""Characters by their code points, and a token that begins every sequence and comes nowhere else.

    Args:
        marginal: $\pi$, frequency of each token; 0 for the first of a sequence.
        transitions: $P_{xy}$, how often y follows x; the row of a sequence's first token is $\pi$.
        num_triggers: k; the k most frequent tokens are triggers.
        start: the token that begins a sequence.
    """

    marginal: Probabilities
    transitions: Transitions
    num_triggers: int
    start: int

    @classmethod
    def of_text(cls, text: str, num_triggers: int) -> BigramLanguage:
        """The frequencies of characters and of adjacent pairs over the whole of a text.

        Raises:
            ValueError: unless there are more characters than triggers.
        """
        characters, codes = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_inverse=True)
        size = len(characters)
        if not 1 <= num_triggers < size:
            raise ValueError(f"num_triggers: expected 1 to {size - 1} of {size} different characters, got {num_triggers}")
        marginal = np.zeros(size + 1)
        marginal[:size] = np.bincount(codes, minlength=size) / len(codes)
        pairs = np.zeros((size + 1, size + 1))
        pairs[:size, :size] = np.bincount(codes[:-1] * size + codes[1:], minlength=size**2).reshape(size, size)
        pairs[pairs.sum(1) == 0] = marginal  # the first token, and a character that ends the text and is nowhere else
        return cls(marginal, pairs / pairs.sum(1, keepdims=True), num_triggers, size)

    @property
    def vocab_size(self) -> int:
        """Tokens, the first one of a sequence included."""
        return len(self.marginal)

    @cached_property
    def triggers(self) -> Int[np.ndarray, "k"]:
        """The most frequent tokens, the rarest of them first."""
        return np.argsort(self.marginal)[-self.num_triggers :]

    def is_trigger(self, tokens: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """Where triggers stand."""
        return np.isin(tokens, self.triggers)

    @cached_property
    def cumulative(self) -> Transitions:
        """Rows of $P$ summed up, ending in 1; that of the start leads to no trigger."""
        first = self.marginal.copy()
        first[self.triggers] = 0.0
        rows = self.transitions.copy()
        rows[self.start] = first / first.sum()
        sums = rows.cumsum(1)
        return sums / sums[:, -1:]


def backcopy_sequences(
    language: BigramLanguage, count: int, length: int, rng: np.random.Generator, mix_p: float = 1.0
) -> Sequences:
    r"""Sequences of the bigram-backcopy language (Guo et al. 2024), from numpy's stream as the authors draw them.

    $x_0$ is the start, $x_1 \sim \pi$ without the triggers; after a trigger at $i \ge 1$ comes $x_{i-1}$ again with probability
    ``mix_p``, in every other case $x_{i+1} \sim P_{x_i}$. Each step of a sequence takes one uniform number for $P_{x_i}$ even
    where $x_{i-1}$ is copied; with ``mix_p`` below 1 a trigger takes another one after it. One sequence is drawn after another.

    Args:
        language: $\pi$, $P$ and the triggers.
        count: sequences.
        length: tokens after the first one.
        rng: where the numbers come from; nothing else is random.
        mix_p: probability of copying after a trigger.

    Returns:
        Tokens, (count, length + 1).
    """
    if mix_p == 1.0:
        return _follow(language, rng.random((count, length)))
    return np.concatenate([_follow_one(language, length, rng, mix_p) for _ in range(count)])


def _follow(language: BigramLanguage, uniform: Float[np.ndarray, "b draws"]) -> Sequences:
    """All sequences at once: how many numbers each takes is known."""
    count, length = uniform.shape
    tokens = np.full((count, length + 1), language.start)
    for i in range(length):
        now = tokens[:, i]
        drawn = (language.cumulative[now] <= uniform[:, i : i + 1]).sum(1)
        tokens[:, i + 1] = np.where(language.is_trigger(now), tokens[:, i - 1], drawn)
    return tokens


def _follow_one(language: BigramLanguage, length: int, rng: np.random.Generator, mix_p: float) -> Sequences:
    triggers, rows = set(language.triggers.tolist()), language.cumulative
    tokens = [language.start]
    for _ in range(length):
        now = tokens[-1]
        drawn = int(rows[now].searchsorted(rng.random(), side="right"))
        copied = now in triggers and rng.random() < mix_p
        tokens.append(tokens[-2] if copied else drawn)
    return np.array([tokens])


def following(language: BigramLanguage, tokens: Sequences, mix_p: float = 1.0) -> Float[np.ndarray, "b steps"]:
    """The probability with which each token after the first one was drawn, given all before it."""
    now, then = tokens[:, :-1], tokens[:, 1:]
    rows = np.diff(language.cumulative, axis=1, prepend=0.0)
    before = np.concatenate((tokens[:, :1], tokens[:, :-2]), 1)
    copied = np.where(language.is_trigger(now), mix_p, 0.0)
    return copied * (then == before) + (1.0 - copied) * rows[now, then]
