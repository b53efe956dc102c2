"""Stand-ins on real text: masked bytes for noncausal self attention, reversed text for causal cross attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.corpus import load_corpus
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import bits_per_byte

SPECIAL = 256
"""The token that hides a byte, or begins an answer."""


class _TextTask(GeneratedTask):
    """Windows of the corpus of `stdlib_text`, drawn anywhere in a split's text."""

    metric = "bits_per_byte"
    higher_is_better = False
    small: ClassVar[Mapping[str, Any]] = {"max_bytes": 1_500_000, "eval_examples": 20}

    def __init__(self, seq_len: int, max_bytes: int, eval_examples: int, seed: int) -> None:
        self.corpus = load_corpus(max_bytes)
        shortest = min(len(text) for text in self.corpus.splits.values())
        if not 2 <= seq_len < shortest:
            raise ValueError(f"seq_len: expected 2 to {shortest - 1}, the bytes of the shortest split, got {seq_len}")
        self.seq_len = seq_len
        super().__init__(eval_examples, seed)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Windows of the training text."""
        return self._asked(self._windows("train", count, generator), generator)

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Windows of the split's own text."""
        return self._asked(self._windows(split, count, generator), generator)

    def _windows(self, split: str, count: int, generator: torch.Generator) -> Int[Tensor, "b n"]:
        text = self.corpus.splits[split]
        starts = torch.randint(len(text) - self.seq_len + 1, (count,), generator=generator)
        return text[starts[:, None] + torch.arange(self.seq_len)].long()

    @abstractmethod
    def _asked(self, windows: Int[Tensor, "b n"], generator: torch.Generator) -> Batch:
        """What is asked of these windows."""

    def metrics(self, logits: Float[Tensor, "b n k"], batch: Batch) -> dict[str, tuple[float, float]]:
        """Bits per byte that is asked for."""
        return bits_per_byte(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Bits per byte on the same examples of no knowledge, of byte frequencies, and of bytes after the one before them in the
        order of the answer (which may be hidden); both counted on the training text.
        """
        batch = self.examples(split)
        unigram, bigram = self._counted()
        asked = batch.targets != IGNORE
        before = self._before(batch)[asked]
        after = batch.targets[asked]
        return {
            "uniform": 8.0,
            "unigram": float(-unigram[after].log2().mean()),
            "bigram": float(-bigram[before, after].log2().mean()),
        }

    @abstractmethod
    def _before(self, batch: Batch) -> Int[Tensor, "b n"]:
        """What stands before each answer."""

    def _counted(self) -> tuple[Float[Tensor, "257"], Float[Tensor, "257 257"]]:
        batch = self.draw(20_000, torch.Generator().manual_seed(4 * self.seed + 3))
        asked = batch.targets != IGNORE
        before, after = self._before(batch)[asked], batch.targets[asked]
        unigram = torch.bincount(after, minlength=257).double() + 1.0
        unigram /= unigram.sum()
        pairs = torch.bincount(before * 257 + after, minlength=257**2).double().view(257, 257) + unigram
        return unigram, pairs / pairs.sum(1, keepdim=True)


@tasks.register("cab_ns", family="language", paper="cab")
class MaskedText(_TextTask):
    """Fill in hidden bytes of Python source: CAB's noncausal self attention, of which masked language modelling is one task.

    A byte is hidden with probability ``hidden``, and then always replaced by the special token. The published task is PG-19 in
    windows of 2,048 tokens. The pattern's causal counterpart is the task `stdlib_text`.

    Draw order: where the windows begin, then which bytes are hidden.

    Args:
        seq_len: bytes a window.
        hidden: probability.
        max_bytes: size of the corpus, all splits together.
        eval_examples: windows in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for a window longer than a split, or a probability not in (0, 1).
    """

    kind = "language"
    model = "tagger"

    def __init__(
        self,
        seq_len: int = 48,
        *,
        hidden: float = 0.15,
        max_bytes: int = 4_000_000,
        eval_examples: int = 256,
        seed: int = 0,
    ) -> None:
        if not 0.0 < hidden < 1.0:
            raise ValueError(f"hidden: expected a probability in (0, 1), got {hidden}")
        self.hidden = hidden
        super().__init__(seq_len, max_bytes, eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A tagger that sees the whole window; a four-tap convolution gives every mixer the bytes before one."""
        return {"num_outputs": 257, "vocab_size": 257, "short_conv": 4, "max_length": self.seq_len}

    @property
    def default_budget(self) -> Budget:
        """Some 20 seconds on one core."""
        return Budget(steps=500, batch_size=32, learning_rates=(0.005, 0.01), parameters=80_000, depth=2, num_heads=2)

    def _asked(self, windows: Int[Tensor, "b n"], generator: torch.Generator) -> Batch:
        hidden = torch.rand(windows.shape, generator=generator) < self.hidden
        return Batch(windows.masked_fill(hidden, SPECIAL), windows.masked_fill(~hidden, IGNORE))

    def _before(self, batch: Batch) -> Int[Tensor, "b n"]:
        return torch.nn.functional.pad(batch.inputs[:, :-1], (1, 0), value=SPECIAL)


@tasks.register("cab_cc", family="language", paper="cab")
class ReversedText(_TextTask):
    """Write a piece of Python source backwards while reading it: CAB's causal cross attention.

    The decoder reads what it has written so far, and through the mixer, as cross attention, the encoded piece. The published
    tasks of this pattern are speech synthesis and summarisation.

    Draw order: where the windows begin.

    Args:
        seq_len: bytes a piece.
        max_bytes: size of the corpus, all splits together.
        eval_examples: pieces in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for a piece longer than a split.
    """

    kind = "language"
    model = "tagger"

    def __init__(self, seq_len: int = 12, *, max_bytes: int = 4_000_000, eval_examples: int = 256, seed: int = 0) -> None:
        super().__init__(seq_len, max_bytes, eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A causal tagger whose mixer reads the piece."""
        return {
            "num_outputs": 257,
            "causal": True,
            "vocab_size": 257,
            "context_vocab_size": 257,
            "position": "learned",
            "max_length": self.seq_len,
            "context_depth": 1,
        }

    @property
    def default_budget(self) -> Budget:
        """Some 20 seconds on one core."""
        return Budget(steps=600, batch_size=32, learning_rates=(0.005, 0.01), parameters=80_000, depth=1, num_heads=4)

    def _asked(self, windows: Int[Tensor, "b n"], generator: torch.Generator) -> Batch:
        answer = windows.flip(1)
        return Batch(torch.nn.functional.pad(answer[:, :-1], (1, 0), value=SPECIAL), answer, context=windows)

    def _before(self, batch: Batch) -> Int[Tensor, "b n"]:
        return batch.inputs  # type: ignore[return-value]
