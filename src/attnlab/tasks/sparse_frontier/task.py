"""The task of controllable long contexts, after those by which sparse attention was studied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnlab.core.errors import UnknownNameError, nearest
from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.sparse_frontier.problems import FILLER, FIRST, NUM_FILLERS, PROBLEMS, places
from attnlab.tasks.synthetic.answers import answer_scores, frequent
from attnlab.tasks.synthetic.insertion import insert


@tasks.register("sparse_frontier", family="retrieval", paper="sparse-frontier", partial=True)
class SparseFrontier(GeneratedTask):
    """Facts strewn in filler, and questions about them, in six kinds (after Nawrot et al. 2025; RULER: Hsieh et al. 2024).

    =================  =============================================================  ================================
    problem            in the text                                                    asked
    =================  =============================================================  ================================
    niah               k pairs of key and value                                       the values of some keys
    variable_tracking  two chains of k assignments, those of one between the other's  the names that hold a value
    common_words       k words four times, 2 k words once                             the k common words
    story_retrieval    k chapters with what was bought in each                        what was bought in some chapters
    story_filtering    the same, but in a third of them nothing was                   the chapters without a purchase
    story_multi_hop    the same                                                       what was bought before some things
    =================  =============================================================  ================================

    The study asks this of language models, in English, at 16,000 to 128,000 tokens; here facts are one or two symbols and filler
    is symbols of its own, so that a small model can be trained. Its three sets of questions on natural documents (SQuAD, QuALITY,
    TOEFL) are not here. Answers are given token by token, those of a set by rising id. The study's settings of each task are not
    known to us: only what is in the table is its.

    A draw takes the facts and questions, where the facts stand, and the filler.

    Args:
        problem: one of the six.
        seq_len: tokens in all, exactly.
        num_facts: k; in stories at least 3 for filtering and hops.
        num_queries: questions with answers of their own, for "niah", "story_retrieval" and "story_multi_hop"; 1 for the others.
            None asks all that there are.
        dispersion: share of the text over which the facts are spread; 0 puts them side by side somewhere.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        UnknownNameError: for an unknown problem.
        ValueError: for sizes that do not fit.
    """

    kind = "retrieval"
    model = "causal_lm"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40}

    def __init__(
        self,
        problem: str = "niah",
        seq_len: int = 32,
        num_facts: int = 4,
        num_queries: int | None = None,
        dispersion: float = 1.0,
        *,
        eval_examples: int = 256,
        seed: int = 0,
    ) -> None:
        if problem not in PROBLEMS:
            raise UnknownNameError(f"problem: expected one of {tuple(PROBLEMS)}, got {problem!r}{nearest(problem, PROBLEMS)}")
        self.name, self.problem = problem, PROBLEMS[problem]
        self.seq_len, self.num_facts, self.dispersion = seq_len, num_facts, dispersion
        self.num_queries = num_queries = self.problem.most_queries(num_facts) if num_queries is None else num_queries
        least = 3 if problem in ("story_filtering", "story_multi_hop") else 1
        if num_facts < least or not 1 <= num_queries <= self.problem.most_queries(num_facts):
            raise ValueError(
                f"num_facts, num_queries: expected at least {least} facts and from 1 to {self.problem.most_queries(num_facts)} "
                f"queries for {problem!r}, got {num_facts} and {num_queries}"
            )
        taken = self.problem.num_facts(num_facts) * self.problem.fact_tokens + self.problem.tail(num_facts, num_queries)
        self.room = seq_len - taken
        if self.room < 0 or not 0.0 <= dispersion <= 1.0:
            raise ValueError(
                f"seq_len, dispersion: expected at least {taken} tokens and a share from 0 to 1, got {seq_len} and {dispersion}"
            )
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model in which a two-tap convolution ties each token to the one before it."""
        return {"vocab_size": FIRST + self.problem.symbols(self.num_facts), "short_conv": 2, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """10 to 20 seconds on one core at the default sizes."""
        return Budget(steps=400, batch_size=64, learning_rates=(0.01, 0.02), parameters=40_000, depth=1, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples."""
        drawn = self.problem.draw(count, self.num_facts, self.num_queries, generator)
        k = drawn.facts.shape[1]
        where = places(count, k, self.room, self.dispersion, self.problem.ordered, generator)
        filler = torch.randint(FILLER, FILLER + NUM_FILLERS, (count, self.room), generator=generator)
        text = insert(filler, list(drawn.facts.unbind(1)), where)
        answers = drawn.answers.masked_fill(drawn.answers < 0, IGNORE)
        targets = torch.cat((torch.full_like(text, IGNORE), answers), 1)
        return Batch(torch.cat((text, drawn.questions), 1), targets)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of answered tokens that are right, given the right ones before; "answers": of examples in which all are."""
        return answer_scores(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the most frequent answer, and of guessing among what is in the text and could be an answer."""
        return {"frequent": frequent(self.examples(split)), "in_context": 1.0 / self.problem.candidates(self.num_facts)}
