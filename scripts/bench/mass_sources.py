"""What `attention_mass.py` trains, and on what: text to be continued, text and photographs with holes to be filled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.channel_mixers import create_channel_mixer
from attnlab.core.grid import Grid
from attnlab.core.tokens import Tokens
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.dense.softmax import SoftmaxAttention
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.models import Block
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.norms import create_norm
from attnlab.tasks.contract import IGNORE
from attnlab.tasks.corpus import load_corpus

DIM, HEADS, DEPTH = 64, 4, 2
TONES = 16
"""Levels of grey."""
PASSAGE = 32
"""Bytes of Python source that stand together; passages come again, so that there is something to find, near and far."""

Examples = tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]
Draw = Callable[[str, int, int, torch.Generator], Examples]
"""From a split, a number of examples, their tokens and a generator to ids and targets."""


def passages(split: str, count: int, tokens: int, generator: torch.Generator) -> Int[Tensor, "{count} {tokens}"]:
    """Bytes of passages: a quarter are new, the others come again after a distance whose logarithm is uniform."""
    text = load_corpus(4_000_000).splits[split]
    room = -(-tokens // PASSAGE)
    starts = torch.randint(len(text) - PASSAGE, (count, room), generator=generator)
    back = torch.rand(count, room, generator=generator)
    again = torch.rand(count, room, generator=generator) < 0.75
    for place in range(1, room):
        origin = place - place ** back[:, place : place + 1]  # from 0 to the one before
        starts[:, place] = torch.where(again[:, place], starts.gather(1, origin.long())[:, 0], starts[:, place])
    places = starts[..., None] + torch.arange(PASSAGE)
    return text[places.flatten(1)[:, :tokens]].long()


def hide(ids: Int[Tensor, "b n"], share: float, symbol: int, generator: torch.Generator) -> Examples:
    """Ids with a share of them hidden behind a symbol; only these are asked for."""
    hidden = torch.rand(ids.shape, generator=generator) < share
    return ids.masked_fill(hidden, symbol), ids.masked_fill(~hidden, IGNORE)


def next_byte(split: str, count: int, tokens: int, generator: torch.Generator) -> Examples:
    """Each byte's next."""
    ids = passages(split, count, tokens + 1, generator)
    return ids[:, :-1], ids[:, 1:]


def hidden_bytes(split: str, count: int, tokens: int, generator: torch.Generator) -> Examples:
    """A sixth of the bytes hidden."""
    return hide(passages(split, count, tokens, generator), 1 / 6, 0, generator)


@lru_cache(maxsize=1)
def photographs() -> tuple[Int[Tensor, "h w"], ...]:
    """Scikit-learn's two photographs in grey, at half their size. Pillow opens them."""
    from sklearn.datasets import load_sample_images

    grey = [torch.tensor(image).float().mean(-1) / 256 for image in load_sample_images().images]
    return tuple((F.avg_pool2d(image[None], 2)[0] * TONES).long() for image in grey)


def hidden_pixels(split: str, count: int, tokens: int, generator: torch.Generator) -> Examples:
    """Square crops with half of the pixels hidden; two thirds of each photograph train, the rest is held out."""
    side, crops = math.isqrt(tokens), []
    for _ in range(count):
        image = photographs()[int(torch.randint(2, (), generator=generator))]
        edge = image.shape[1] * 2 // 3
        part = image[:, :edge] if split == "train" else image[:, edge:]
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in part.shape)
        crops.append(part[top : top + side, left : left + side].flatten())
    return hide(torch.stack(crops), 1 / 2, TONES, generator)


@dataclass(frozen=True)
class Source:
    """A model's task, its sizes and its training.

    Args:
        says: what the model does, for the reader.
        draw: examples.
        vocabulary: ids and logits.
        tokens: of the sequences that are measured.
        causal: whether the model is.
        grid: sides; None for a sequence.
        stages: tokens, batch size and steps of the stages of training; short sequences first, which cost little.
        rate: peak learning rate.
        std: of embeddings and learned positions at first.
    """

    says: str
    draw: Draw
    vocabulary: int
    tokens: int
    causal: bool
    grid: Grid | None
    stages: tuple[tuple[int, int, int], ...]
    rate: float
    std: float


_SHORT = ((64, 32, 400), (256, 8, 700))
SOURCES = {
    "text": Source("the next byte of Python source", next_byte, 256, 2048, True, None, (*_SHORT, (2048, 1, 80)), 0.01, 1.0),
    "hidden_text": Source(
        "hidden bytes of Python source", hidden_bytes, 256, 1024, False, None, (*_SHORT, (1024, 2, 80)), 0.01, 1.0
    ),
    "photographs": Source("hidden pixels", hidden_pixels, TONES + 1, 1024, False, (32, 32), ((1024, 2, 1000),), 0.006, DIM**-0.5),
}


class Reader(nn.Module):
    """Ids to logits of ids at the same places: embedding, blocks of softmax attention and an MLP, head."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        causal = source.causal
        self.embedding = nn.Embedding(source.vocabulary, DIM)
        nn.init.normal_(self.embedding.weight, std=source.std)
        self.taps = ShortConvolution(DIM, 4) if source.grid is None else None
        self.position = PositionEmbedding("sinusoidal" if source.grid is None else "learned", DIM, source.tokens, std=source.std)
        self.blocks = nn.ModuleList(
            Block(DIM, SoftmaxAttention(DIM, HEADS, causal=causal), create_channel_mixer("mlp", DIM)) for _ in range(DEPTH)
        )
        self.norm = create_norm("rms_norm", DIM, causal=causal)
        self.head = nn.Linear(DIM, source.vocabulary, bias=False)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """Logits."""
        x = self.embedding(ids)
        x = x if self.taps is None else x + self.taps(x)[0]
        tokens = Tokens(self.position(x, torch.arange(ids.shape[1], device=ids.device)[None]))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens.x, None))

    def loss(self, examples: Examples) -> Float[Tensor, ""]:
        """Bits an id that is asked for."""
        ids, targets = examples
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE) / math.log(2)


def train(source: Source, seed: int) -> Reader:
    """A model after its stages: AdamW, the rate up over a tenth of the steps and down along a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Reader(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=source.rate, betas=(0.9, 0.98), weight_decay=0.01)
    sizes = [(tokens, count) for tokens, count, steps in source.stages for _ in range(steps)]
    for step, (tokens, count) in enumerate(sizes):
        done = step / len(sizes)
        optimizer.param_groups[0]["lr"] = (
            source.rate * min(1.0, 10 * (done + 1 / len(sizes))) * (1 + math.cos(math.pi * done)) / 2
        )
        optimizer.zero_grad()
        model.loss(source.draw("train", count, tokens, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def trained_layers(source: Source, seed: int) -> tuple[list[tuple[AttentionMixer, Float[Tensor, "1 n c"]]], float]:
    """Each mixer of a trained model with what it sees of a held-out example, and the loss there in bits."""
    model = train(source, seed)
    seen: list[tuple[AttentionMixer, Tensor]] = []
    mixers = [module for module in model.modules() if isinstance(module, AttentionMixer)]
    handles = [mixer.register_forward_pre_hook(lambda module, given: seen.append((module, given[0]))) for mixer in mixers]
    with torch.no_grad():
        bits = float(model.loss(source.draw("valid", 1, source.tokens, torch.Generator().manual_seed(seed))))
    for handle in handles:
        handle.remove()
    return seen, bits
