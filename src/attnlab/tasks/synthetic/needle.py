"""A needle in a haystack: a key and its value hidden in real text, asked for at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.corpus import load_corpus
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.synthetic.answers import answer_scores, frequent
from attnlab.tasks.synthetic.insertion import insert

_LETTERS, _DIGITS = ord("A"), ord("0")


def _bytes(text: str, count: int) -> Int[Tensor, "b t"]:
    return torch.tensor(list(text.encode())).expand(count, -1)


@tasks.register("needle", family="retrieval")
class Needle(GeneratedTask):
    r"""Find the value of a key in a text (Kamradt 2023, "needle in a haystack"), in bytes.

    The text is Python source, of the training files in training and of others in evaluation. Into it go ``num_needles`` lines
    "#KEY=VALUE", with keys of capital letters, different in an example, and values of digits; the end asks for the first of them,
    "#KEY=", and gives its value, at whose bytes the answer counts. One needle can be found by its form alone; several ask for
    the key.

    A draw takes the windows of text, keys (as numbers without repeat), values, and the needles' places where ``depth`` is None.

    Args:
        seq_len: bytes in all, needles and question included.
        num_needles: lines with keys and values.
        depth: the asked line's place in the text, 0 (first) to 1 (last, just before the question); None is anywhere. The other
            lines are anywhere.
        key_length: letters of a key, 1 to 3.
        value_length: digits of a value.
        max_bytes: size of the corpus, as for "stdlib_text".
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes that do not fit.
    """

    kind = "retrieval"
    model = "causal_lm"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40, "max_bytes": 1_500_000}

    def __init__(
        self,
        seq_len: int = 48,
        num_needles: int = 1,
        depth: float | None = None,
        *,
        key_length: int = 2,
        value_length: int = 2,
        max_bytes: int = 4_000_000,
        eval_examples: int = 256,
        seed: int = 0,
    ) -> None:
        self.line = key_length + value_length + 4  # newlines around it, "#" and "="
        self.room = seq_len - num_needles * self.line - key_length - value_length - 1
        if num_needles < 1 or value_length < 1 or not 1 <= key_length <= 3 or num_needles > 26**key_length or self.room < 1:
            raise ValueError(
                "seq_len, num_needles, key_length, value_length: expected needles and question to leave room for text, 1 to 3 "
                f"letters a key and at least one digit a value, got {seq_len}, {num_needles}, {key_length} and {value_length}"
            )
        if depth is not None and not 0.0 <= depth <= 1.0:
            raise ValueError(f"depth: expected a number from 0 to 1 or None, got {depth}")
        self.seq_len, self.num_needles, self.depth = seq_len, num_needles, depth
        self.key_length, self.value_length = key_length, value_length
        self.corpus = load_corpus(max_bytes)
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model over bytes in which a four-tap convolution gives every mixer a token's neighbours."""
        return {"vocab_size": 256, "short_conv": 4, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """5 to 15 seconds on one core at the default sizes."""
        return Budget(steps=300, batch_size=32, learning_rates=(0.01, 0.02), parameters=40_000, depth=2, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples in text of the training files."""
        return self._draw(count, generator, "train")

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Examples in text of the split's files."""
        return self._draw(count, generator, split)

    def _draw(self, count: int, generator: torch.Generator, split: Literal["train", "valid", "test"]) -> Batch:
        hay = self._text(self.corpus.splits[split], count, generator)
        numbers = torch.rand(count, 26**self.key_length, generator=generator).argsort(1)[:, : self.num_needles]
        powers = 26 ** torch.arange(self.key_length)
        keys = _LETTERS + numbers[..., None] // powers % 26
        values = _DIGITS + torch.randint(10, (count, self.num_needles, self.value_length), generator=generator)
        # the line that is asked for is the first; what order the lines have in the text their places say
        places = torch.randint(self.room + 1, (count, self.num_needles), generator=generator)
        if self.depth is not None:
            places[:, 0] = round(self.depth * self.room)
        before, equals, after = _bytes("\n#", count), _bytes("=", count), _bytes("\n", count)
        lines = [torch.cat((before, keys[:, i], equals, values[:, i], after), 1) for i in range(self.num_needles)]
        text = insert(hay, lines, places)
        sequence = torch.cat((text, _bytes("#", count), keys[:, 0], equals, values[:, 0]), 1)
        targets = torch.full((count, self.seq_len), IGNORE)
        targets[:, -self.value_length :] = values[:, 0]
        return Batch(sequence[:, : self.seq_len].contiguous(), targets)

    def _text(self, text: UInt8[Tensor, "_"], count: int, generator: torch.Generator) -> Int[Tensor, "b t"]:
        starts = torch.randint(len(text) - self.room, (count, 1), generator=generator)
        return text[starts + torch.arange(self.room)].long()

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of the answers' bytes that are right, given the right ones before; "answers": of whole answers."""
        return answer_scores(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing a digit, of the most frequent, and of reading the value of any needle."""
        any_needle = {} if self.num_needles == 1 else {"any_needle": (1.0 + 0.1 * (self.num_needles - 1)) / self.num_needles}
        return {"any_digit": 0.1, "frequent": frequent(self.examples(split)), **any_needle}
