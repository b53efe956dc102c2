"""Bigram-backcopy as a task: the toy language on which attention sinks form."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.tasks.bigram_backcopy.language import BigramLanguage, Sequences, backcopy_sequences, following, read_text
from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks

_FITTED_ON = 2000  # sequences that the baselines count on


@tasks.register("bigram_backcopy", family="language", paper="active-dormant-bb")
class BigramBackcopy(GeneratedTask):
    r"""Predict the next token of a bigram language whose triggers call the token before them again (Guo et al. 2024).

    After a trigger $x_i$ comes $x_{i-1}$, otherwise a draw from $P_{x_i}$: a head must look one token back at triggers and has
    nothing to do elsewhere, where it becomes an attention sink. As published: ``seq_len=256`` with 3 or 5 triggers over the
    characters of tiny-Shakespeare, which ``path`` may point at; without it $P$ is counted on the sources of Python's standard
    library. The interpolated task has ``mix_p`` below 1.

    Draw order: one integer from the torch generator seeds numpy's ``default_rng``, and `backcopy_sequences` draws from that.

    Args:
        seq_len: n, tokens that the model reads.
        num_triggers: k, the most frequent characters.
        mix_p: probability of copying after a trigger.
        path: a text file in UTF-8 to count on.
        eval_examples: sequences in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes or probabilities out of range.
    """

    kind = "language"
    model = "causal_lm"
    metric = "bits_per_token"
    higher_is_better = False
    small: ClassVar[Mapping[str, Any]] = {"seq_len": 16, "eval_examples": 20}

    def __init__(
        self,
        seq_len: int = 32,
        num_triggers: int = 3,
        *,
        mix_p: float = 1.0,
        path: str | os.PathLike[str] | None = None,
        eval_examples: int = 256,
        seed: int = 0,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len: expected at least 2, got {seq_len}")
        if not 0.0 <= mix_p <= 1.0:
            raise ValueError(f"mix_p: expected a probability, got {mix_p}")
        self.seq_len, self.mix_p = seq_len, float(mix_p)
        self.language = BigramLanguage.of_text(read_text(path), num_triggers)
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model with learned positions and no convolution: looking one token back is what is asked."""
        return {"vocab_size": self.language.vocab_size, "position": "learned", "max_length": self.seq_len}

    @property
    def default_budget(self) -> Budget:
        """Some 10 seconds on one core."""
        return Budget(steps=400, batch_size=16, learning_rates=(0.01, 0.02), parameters=60_000, depth=2, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Inputs are all tokens but the last, targets all but the first."""
        tokens = torch.from_numpy(self._sequences(count, generator))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _sequences(self, count: int, generator: torch.Generator) -> Sequences:
        seed = int(torch.randint(2**62, (), generator=generator))
        return backcopy_sequences(self.language, count, self.seq_len, np.random.default_rng(seed), self.mix_p)

    def metrics(self, logits: Float[Tensor, "b n v"], batch: Batch) -> dict[str, tuple[float, float]]:
        """``bits_per_token``; the ``loss`` in nats, and the same after triggers (``copy_loss``) and elsewhere."""
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
        after = torch.from_numpy(self.language.is_trigger(batch.inputs.cpu().numpy())).flatten().to(losses.device)
        count, copies = float(len(losses)), float(after.sum())
        total, copied = float(losses.sum()), float(losses[after].sum())
        return {
            "bits_per_token": (total / math.log(2.0), count),
            "loss": (total, count),
            "copy_loss": (copied, copies),
            "bigram_loss": (total - copied, count - copies),
        }

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Bits a token of the same examples: of no knowledge; of token and pair frequencies in other sequences of the language,
        which is what a model without attention can know; and ``source``, of the probabilities that they were drawn with.
        """
        batch = self.examples(split)
        tokens = torch.cat((batch.inputs[:, :1], batch.targets), 1).numpy()
        size = self.language.vocab_size
        others = self._sequences(_FITTED_ON, torch.Generator().manual_seed(4 * self.seed + 3))
        unigram = (np.bincount(others[:, 1:].ravel(), minlength=size) + 1.0) / (others[:, 1:].size + size)
        codes = (others[:, :-1] * size + others[:, 1:]).ravel()
        pairs = np.bincount(codes, minlength=size**2).reshape(size, size) + unigram
        bigram = pairs / pairs.sum(1, keepdims=True)
        now, then = tokens[:, :-1], tokens[:, 1:]
        return {
            "uniform": math.log2(size),
            "unigram": float(-np.log2(unigram[then]).mean()),
            "bigram": float(-np.log2(bigram[now, then]).mean()),
            "source": float(-np.log2(following(self.language, tokens, self.mix_p)).mean()),
        }

    def fingerprint(self) -> str:
        """Hash of the language and of both evaluation splits."""
        return hashlib.sha256(self.language.transitions.tobytes() + super().fingerprint().encode()).hexdigest()
