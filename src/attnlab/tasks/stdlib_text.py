"""Byte-level language modelling on the source code of Python's standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split, Task
from attnlab.tasks.corpus import load_corpus
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import bits_per_byte


def _windows(text: UInt8[Tensor, "_"], starts: Int[Tensor, "b"], length: int) -> Batch:
    """Windows of ``length`` bytes as inputs, the bytes one further as targets."""
    found = text[starts[:, None] + torch.arange(length + 1)].long()
    return Batch(found[:, :-1].contiguous(), found[:, 1:].contiguous())


@tasks.register("stdlib_text", family="language")
class StdlibText(Task):
    r"""Predict the next byte of Python source; files are split into train, valid and test by a hash of their path.

    The metric is bits per byte, $-\frac1N \sum_t \log_2 p(x_{t+1} \mid x_{\le t})$ within windows of ``seq_len`` bytes.

    Args:
        seq_len: bytes a window.
        max_bytes: size of the corpus, all splits together.
        eval_windows: windows in each evaluation split, spread evenly over it.

    Raises:
        ValueError: if a split has fewer bytes than a window.
    """

    kind = "language"
    model = "causal_lm"
    metric = "bits_per_byte"
    higher_is_better = False
    small: ClassVar[Mapping[str, Any]] = {"max_bytes": 1_500_000, "eval_windows": 20}

    def __init__(self, seq_len: int = 128, *, max_bytes: int = 4_000_000, eval_windows: int = 128) -> None:
        if seq_len < 1 or eval_windows < 1:
            raise ValueError(f"seq_len, eval_windows: expected positive integers, got {seq_len} and {eval_windows}")
        self.seq_len, self.eval_windows = seq_len, eval_windows
        self.corpus = load_corpus(max_bytes)
        for name, text in self.corpus.splits.items():
            if len(text) <= seq_len:
                raise ValueError(f"seq_len: expected less than the {len(text)} bytes of split {name!r}, got {seq_len}")

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model over bytes in which a four-tap convolution gives every mixer a token's neighbours."""
        return {"vocab_size": 256, "short_conv": 4, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """2 to 5 seconds on one core at the default sizes."""
        return Budget(steps=200, batch_size=8, learning_rates=(0.01, 0.02), parameters=60_000, depth=2, num_heads=2)

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Windows that start anywhere in the training split."""
        text = self.corpus.splits["train"]
        while True:
            starts = torch.randint(len(text) - self.seq_len, (batch_size,), generator=generator)
            yield _windows(text, starts, self.seq_len)

    def eval_batches(self, batch_size: int, split: Split = "valid") -> Iterator[Batch]:
        """The evenly spread windows of a split."""
        text, starts = self.corpus.splits[split], self._starts(split)
        for some in starts.split(batch_size):
            yield _windows(text, some, self.seq_len)

    def _starts(self, split: Split) -> Int[Tensor, "w"]:
        last = len(self.corpus.splits[split]) - self.seq_len - 1
        return torch.linspace(0, last, min(self.eval_windows, last + 1), dtype=torch.float64).long()

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Bits per byte."""
        return bits_per_byte(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Bits per byte on the same windows of no knowledge, byte frequencies, and byte pairs counted on the training split."""
        batches = list(self.eval_batches(self.eval_windows, split))
        before = torch.cat([batch.inputs.flatten() for batch in batches])
        after = torch.cat([batch.targets.flatten() for batch in batches])
        unigram, bigram = _ngrams(self.corpus.splits["train"])
        return {
            "uniform": 8.0,
            "unigram": float(-unigram[after].log2().mean()),
            "bigram": float(-bigram[before, after].log2().mean()),
        }

    def fingerprint(self) -> str:
        """Hash of the corpus and the sizes."""
        sizes = f"{self.corpus.sha256} {self.seq_len} {self.eval_windows}"
        return hashlib.sha256(sizes.encode()).hexdigest()


def _ngrams(text: UInt8[Tensor, "_"]) -> tuple[Float[Tensor, "256"], Float[Tensor, "256 256"]]:
    """Byte and byte-pair probabilities: one more count a byte, and one a first byte, shared out by frequency."""
    codes = text.long()
    unigram = torch.bincount(codes, minlength=256).double() + 1.0
    unigram /= unigram.sum()
    pairs = torch.bincount(codes[:-1] * 256 + codes[1:], minlength=256 * 256).double().view(256, 256) + unigram
    return unigram, pairs / pairs.sum(1, keepdim=True)
