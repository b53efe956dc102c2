"""Sequences of items and labels from a Gaussian mixture, bursty or not, of known or of new classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

FRESH = 128
"""Classes that new sequences of one draw are made of."""

Generator = np.random.RandomState


@dataclass(frozen=True)
class Mixture:
    r"""K classes with L labels: class k has label k mod L, both have a vector in D dimensions.

    Args:
        labels: $\lambda_l$, (L, D).
        classes: $\mu_k$, (K, D); K is a multiple of L.
        alpha: Zipf exponent, $P_k \propto (k+1)^{-\alpha}$.
    """

    labels: Float[np.ndarray, "l d"]
    classes: Float[np.ndarray, "k d"]
    alpha: float = 0.0

    @classmethod
    def drawn(cls, num_classes: int, num_labels: int, width: int, rng: Generator, alpha: float = 0.0) -> Mixture:
        r"""All vectors from $N(0, I/D)$, labels before classes."""
        labels = rng.normal(size=(num_labels, width)) / np.sqrt(width)
        return cls(labels, rng.normal(size=(num_classes, width)) / np.sqrt(width), alpha)

    @property
    def probabilities(self) -> Float[np.ndarray, "k"]:
        """How often each class comes."""
        weights = np.arange(1.0, len(self.classes) + 1.0) ** -self.alpha
        return weights / weights.sum()

    @property
    def label_of(self) -> Int[np.ndarray, "k"]:
        """The label of each class."""
        return np.arange(len(self.classes)) % len(self.labels)


@dataclass(frozen=True)
class Burst:
    """How sequences are made.

    Args:
        num_pairs: N, items with their labels before the query.
        max_pairs: N_max, which the width of the positions is made for.
        copies: B, a divisor of N and below it: a bursty sequence has N/B classes, each B times. 0 makes none bursty.
        bursty: p_B, the probability of a bursty sequence, whose query is of a class in it.
        fresh: p_C, the probability of a sequence of new classes; such a one is bursty.
        noise: eps, within a class.
        flip: known classes have the next label in the context; the answer asked for stays the old one.
        distinct_labels: the classes of a bursty sequence have different labels.
    """

    num_pairs: int
    max_pairs: int
    copies: int
    bursty: float
    fresh: float
    noise: float
    flip: bool = False
    distinct_labels: bool = False


@dataclass(frozen=True)
class Sequences:
    """Drawn sequences.

    Args:
        inputs: one-hot position, 2 N_max + 1 wide, and content; tokens are item, label, ..., item, label, query.
        label: the label asked for.
        target_class: the query's class, -1 where it is a new one.
        context: the classes of the items, known or new.
    """

    inputs: Float[np.ndarray, "s n p"]
    label: Int[np.ndarray, "s"]
    target_class: Int[np.ndarray, "s"]
    context: Int[np.ndarray, "s pairs"]


def draw_sequences(mixture: Mixture, burst: Burst, count: int, rng: Generator) -> Sequences:
    r"""Sequences of the in-context classification of Reddy (2023), from numpy's old stream in the authors' order.

    That order: new class vectors; known classes of the contexts, shuffled row by row; the same for new classes; the place of the
    query's class in either; which sequences are not bursty, and known classes anew for those, context before query; which
    sequences are of known classes; noise of items and query of known classes and then of new ones, all drawn for every sequence;
    at last where the sequences begin among the positions. An item is $(\mu + \epsilon\eta/\sqrt D)/\sqrt{1+\epsilon^2}$.

    Args:
        mixture: classes and labels.
        burst: how sequences are made.
        count: S.
        rng: where the numbers come from; nothing else is random.
    """
    size, known = mixture.classes.shape[1], mixture
    new = replace(mixture, classes=rng.normal(size=(FRESH, size)) / np.sqrt(size), alpha=0.0)
    copies, bursty = (burst.copies, burst.bursty) if burst.copies else (burst.num_pairs // 2, 0.0)
    context = _bursts(known, burst, count, copies, rng, known.probabilities)
    new_context = _bursts(new, burst, count, copies, rng, None)
    every = np.arange(count)
    query = context[every, rng.choice(burst.num_pairs, size=count)]
    new_query = new_context[every, rng.choice(burst.num_pairs, size=count)]
    loose = rng.uniform(size=count) > bursty
    number = int(loose.sum())
    context[loose] = rng.choice(len(known.classes), size=(number, burst.num_pairs), p=known.probabilities)
    query[loose] = rng.choice(len(known.classes), size=number, p=known.probabilities)
    is_known = rng.uniform(size=count) > burst.fresh
    old = _content(known, context, query, burst.noise, rng, int(burst.flip))
    other = _content(new, new_context, new_query, burst.noise, rng, 0)
    content = np.where(is_known[:, None, None], old, other)
    starts = rng.choice(2 * (burst.max_pairs - burst.num_pairs) + 1, size=count)
    places = starts[:, None] + np.arange(content.shape[1])
    inputs = np.concatenate((np.eye(2 * burst.max_pairs + 1)[places], content), axis=2)
    return Sequences(
        inputs,
        np.where(is_known, known.label_of[query], new.label_of[new_query]),
        np.where(is_known, query, -1),
        np.where(is_known[:, None], context, new_context),
    )


def _bursts(
    mixture: Mixture, burst: Burst, count: int, copies: int, rng: Generator, chances: Float[np.ndarray, "k"] | None
) -> Int[np.ndarray, "s pairs"]:
    """N/B classes a sequence, each B times, in random order."""
    different = burst.num_pairs // copies
    if burst.distinct_labels:
        labels, rounds = len(mixture.labels), len(mixture.classes) // len(mixture.labels)
        rows = []
        for _ in range(count):
            label = rng.choice(labels, size=different, replace=False)
            rows.append(rng.choice(rounds, size=different) * labels + label)
        chosen = np.array(rows)
    else:
        chosen = rng.choice(len(mixture.classes), size=(count, different), p=chances)
    repeated = np.tile(chosen, copies)
    for row in repeated:
        rng.shuffle(row)
    return repeated


def _content(
    mixture: Mixture,
    context: Int[np.ndarray, "s pairs"],
    query: Int[np.ndarray, "s"],
    noise: float,
    rng: Generator,
    flip: int,
) -> Float[np.ndarray, "s n d"]:
    """Items and labels in turn, and the query, without positions."""
    count, pairs = context.shape
    size = mixture.classes.shape[1]

    def items(classes: Int[np.ndarray, "..."]) -> Float[np.ndarray, "... d"]:
        eta = rng.normal(size=(*classes.shape, size))
        return (mixture.classes[classes] + noise * eta / np.sqrt(size)) / np.sqrt(1.0 + noise**2)

    content = np.empty((count, 2 * pairs + 1, size))
    content[:, :-1:2] = items(context)
    content[:, 1::2] = mixture.labels[(mixture.label_of[context] + flip) % len(mixture.labels)]
    content[:, -1] = items(query)
    return content
