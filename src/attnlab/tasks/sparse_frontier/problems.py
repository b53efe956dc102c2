"""The six problems: facts to be strewn into filler, and the questions about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

ASK, NOTHING, NUM_FILLERS = 0, 1, 8
FILLER = 2
"""Id of the first filler; the symbols of a problem follow the fillers."""
FIRST = FILLER + NUM_FILLERS
"""Id of the first symbol."""


@dataclass(frozen=True)
class Drawn:
    """Facts and questions of a batch of examples.

    Args:
        facts: k of l tokens each.
        questions: what follows the text: the first question, its answer, the next question, ...; without the last answer.
        answers: where an answer comes next, the answer; elsewhere -1.
    """

    facts: Int[Tensor, "b k l"]
    questions: Int[Tensor, "b t"]
    answers: Int[Tensor, "b t"]


@dataclass(frozen=True)
class Problem:
    """One kind of question.

    Args:
        draw: count, facts k, queries q and generator to what is asked.
        fact_tokens: l.
        num_facts: k to the number of facts in the text.
        tail: (k, q) to t.
        symbols: k to the number of symbols.
        candidates: k to the number of symbols in the text that can be an answer by their kind.
        most_queries: k to the most queries.
        ordered: whether the facts keep their order.
    """

    draw: Callable[[int, int, int, torch.Generator], Drawn]
    fact_tokens: int
    num_facts: Callable[[int], int]
    tail: Callable[[int, int], int]
    symbols: Callable[[int], int]
    candidates: Callable[[int], int]
    most_queries: Callable[[int], int]
    ordered: bool


def _orders(count: int, size: int, generator: torch.Generator) -> Int[Tensor, "b s"]:
    return torch.rand(count, size, generator=generator).argsort(1)


def _pairs(asked: Int[Tensor, "b q"], answers: Int[Tensor, "b q"]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Questions one after another, each but the last followed by its answer; and the answers where they are due."""
    mark = torch.full_like(asked[:, :1], ASK)
    questions = torch.cat((mark, torch.stack((asked, answers), 2).flatten(1)[:, :-1]), 1)
    due = torch.full_like(questions, -1)
    due[:, 1::2] = answers
    return questions, due


def _chain(start: Int[Tensor, "b s"], answers: Int[Tensor, "b q"]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """One question with several answers in a row."""
    questions = torch.cat((start, answers[:, :-1]), 1)
    due = torch.full_like(questions, -1)
    due[:, start.shape[1] - 1 :] = answers
    return questions, due


def _lookup(keys: Tensor, values: Tensor, count: int, queries: int, generator: torch.Generator) -> Drawn:
    chosen = _orders(count, keys.shape[1], generator)[:, :queries]
    return Drawn(torch.stack((keys, values), 2), *_pairs(keys.gather(1, chosen), values.gather(1, chosen)))


def _needles(count: int, k: int, queries: int, generator: torch.Generator) -> Drawn:
    """Keys and values of 2 k symbols each."""
    keys, values = (FIRST + shift + _orders(count, 2 * k, generator)[:, :k] for shift in (0, 2 * k))
    return _lookup(keys, values, count, queries, generator)


def _chapters(count: int, k: int) -> Int[Tensor, "b k"]:
    return (FIRST + torch.arange(k)).expand(count, -1)


def _story_retrieval(count: int, k: int, queries: int, generator: torch.Generator) -> Drawn:
    """What was bought in a chapter? Chapters come in order, k of 2 k things are bought."""
    return _lookup(_chapters(count, k), FIRST + k + _orders(count, 2 * k, generator)[:, :k], count, queries, generator)


def _purchases(count: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Things bought in each chapter or `NOTHING`, the chapters without a purchase, and those with one, in order."""
    order = _orders(count, k, generator)
    empty, full = order[:, : k // 3].sort(1).values, order[:, k // 3 :].sort(1).values
    things = FIRST + k + _orders(count, 2 * k, generator)[:, :k]
    return things.scatter(1, empty, NOTHING), empty, full


def _story_filtering(count: int, k: int, queries: int, generator: torch.Generator) -> Drawn:
    """In which chapters was nothing bought? A third of them, in order."""
    things, empty, _ = _purchases(count, k, generator)
    facts = torch.stack((_chapters(count, k), things), 2)
    return Drawn(facts, *_chain(torch.full((count, 1), ASK), FIRST + empty))


def _story_multi_hop(count: int, k: int, queries: int, generator: torch.Generator) -> Drawn:
    """What was bought last before a thing was?"""
    things, _, full = _purchases(count, k, generator)
    bought = things.gather(1, full)
    later = 1 + _orders(count, bought.shape[1] - 1, generator)[:, :queries]
    facts = torch.stack((_chapters(count, k), things), 2)
    return Drawn(facts, *_pairs(bought.gather(1, later), bought.gather(1, later - 1)))


def _variable_tracking(count: int, k: int, queries: int, generator: torch.Generator) -> Drawn:
    """Two chains of k assignments, name and source; which names hold the value that begins one of them, from it on?"""
    names = FIRST + _orders(count, 4 * k, generator)[:, : 2 * k].view(count, 2, k)
    values = FIRST + 4 * k + _orders(count, 4, generator)[:, :2]
    sources = torch.cat((values[..., None], names[..., :-1]), 2)
    facts = torch.stack((sources, names), 3).transpose(1, 2).flatten(1, 2)  # the chains alternate
    mark = torch.full((count, 1), ASK)
    return Drawn(facts, *_chain(torch.cat((mark, values[:, :1]), 1), names[:, 0]))


def _common_words(count: int, k: int, queries: int, generator: torch.Generator) -> Drawn:
    """Of 3 k words, k come four times and the others once; which are the k, by their ids?"""
    words = FIRST + _orders(count, 6 * k, generator)[:, : 3 * k]
    common = words[:, :k].sort(1).values
    text = torch.cat((common.repeat(1, 4), words[:, k:]), 1)
    text = text.gather(1, _orders(count, 6 * k, generator))
    return Drawn(text[..., None], *_chain(torch.full((count, 1), ASK), common))


def _problem(
    draw: Callable[[int, int, int, torch.Generator], Drawn],
    *,
    candidates: Callable[[int], int],
    symbols: Callable[[int], int] = lambda k: 3 * k,
    tail: Callable[[int, int], int] = lambda k, q: 2 * q,
    most_queries: Callable[[int], int] = lambda k: 1,
    num_facts: Callable[[int], int] = lambda k: k,
    fact_tokens: int = 2,
    ordered: bool = True,
) -> Problem:
    return Problem(draw, fact_tokens, num_facts, tail, symbols, candidates, most_queries, ordered)


PROBLEMS = {
    "niah": _problem(_needles, candidates=lambda k: k, symbols=lambda k: 4 * k, most_queries=lambda k: k, ordered=False),
    "variable_tracking": _problem(
        _variable_tracking,
        candidates=lambda k: 2 * k,
        symbols=lambda k: 4 * k + 4,
        tail=lambda k, q: k + 1,
        num_facts=lambda k: 2 * k,
    ),
    "common_words": _problem(
        _common_words,
        candidates=lambda k: 3 * k,
        symbols=lambda k: 6 * k,
        tail=lambda k, q: k,
        num_facts=lambda k: 6 * k,
        fact_tokens=1,
    ),
    "story_retrieval": _problem(_story_retrieval, candidates=lambda k: k, most_queries=lambda k: k),
    "story_filtering": _problem(_story_filtering, candidates=lambda k: k, tail=lambda k, q: k // 3),
    "story_multi_hop": _problem(_story_multi_hop, candidates=lambda k: k - k // 3, most_queries=lambda k: k - k // 3 - 1),
}
"""By name."""


def places(count: int, facts: int, room: int, dispersion: float, ordered: bool, generator: torch.Generator) -> Int[Tensor, "b k"]:
    """Before which of ``room`` fillers each fact stands: anywhere in a window that has ``dispersion`` of the text's length."""
    width = dispersion * room
    start: Float[Tensor, "b 1"] = torch.rand(count, 1, generator=generator) * (room - width)
    found = (start + torch.rand(count, facts, generator=generator) * (width + 1)).long().clamp(max=room)
    return found.sort(1).values if ordered else found
