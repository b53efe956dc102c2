"""A whole model over a sequence whose pieces lie on several ranks: every mixer in it, and what else reads other tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.channel_mixers import ChannelMixer
from attnlab.core.contract import Mixer
from attnlab.core.errors import UnsupportedError
from attnlab.core.grid import Grid
from attnlab.core.info import Info
from attnlab.core.masks import check_mask, token_positions, zero_masked
from attnlab.core.tokens import Tokens
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.models.block import Block
from attnlab.models.embedding import PositionEmbedding
from attnlab.models.language import CausalLM
from attnlab.models.norms import Norm
from attnlab.parallel.layout import Layout, checksum, compare, describe, find_layout, shared_layout
from attnlab.parallel.mixer import SequenceParallel, require_combinable
from attnlab.parallel.processes import ProcessRanks
from attnlab.parallel.ranks import Ranks, Traffic


def parallelize(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, size: int | None = None, traffic: Traffic | None = None
) -> nn.Module:
    """Let ``model(x)`` take this rank's tokens and give what the model makes of the whole sequence there.

    model = attnlab.parallel.parallelize(attnlab.models.create_model("causal_lm", ...))
    logits = model(attnlab.parallel.split(ids))

    Every mixer in it becomes `SequenceParallel`, each by its own mechanism, so that hybrids need nothing more; of a
    `CausalLM` positions and the convolution after the embedding go on from the ranks before too, and one header a pass serves
    all layers. Parameters, their names and the state dict stay as they are; `restore` undoes it. Modules of other makes are
    taken to treat each token by itself.

    Args:
        model: a "causal_lm", a `Block` or several, or any module that holds them; it is changed in place.
        group: of torch.distributed; None is all processes.
        size: how many ranks are expected; None takes as many as there are.
        traffic: counts what is sent, if given.

    Returns:
        ``model``.

    Raises:
        RuntimeError: without a process group; it says how to start one.
        ValueError: for a group of another size, a model without mixers, or one that is parallel already.
        UnsupportedError: for a mixer that cannot sum up pieces, and for what else couples tokens: pooling, norms over tokens,
            convolutions between them, stochastic depth (ranks would draw differently).
    """
    parts = list(_parts(model, ""))  # what cannot be done is refused before anything is changed
    spread(model, parts, ProcessRanks(group, size=size, traffic=traffic))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `parallelize`: ``model`` again takes whole sequences.

    Raises:
        ValueError: if it is not parallel.
    """
    changed = [module for module in model.modules() if isinstance(vars(module).get("forward"), _Forward)]
    if not changed:
        raise ValueError("model: expected one that parallelize has changed, got a plain one")
    for module in changed:
        for name in ("forward", "packed", "mixing_matrix"):
            vars(module).pop(name, None)
    return model


def parts_of(model: nn.Module) -> list[Mixer | CausalLM]:
    """What `spread` changes.

    Raises:
        ValueError: if there is no mixer, or one that is parallel already.
        UnsupportedError: for what cannot be split.
    """
    return list(_parts(model, ""))


def spread(model: nn.Module, parts: list[Mixer | CausalLM], ranks: Ranks) -> None:
    """`parallelize` for any ranks."""
    if not any(isinstance(part, Mixer) for part in parts):
        raise ValueError(f"model: expected mixers in it, got {type(model).__name__} without any")
    if any(isinstance(vars(part).get("forward"), _Forward) for part in parts):
        raise ValueError("model: expected a plain one, got one that is parallel already; attnlab.parallel.restore undoes it")
    for part in parts:
        if isinstance(part, CausalLM):
            vars(part)["forward"] = _LanguageForward(part, ranks)
            continue
        vars(part)["forward"] = _MixerForward(part, ranks)
        for name in ("packed", "mixing_matrix"):
            vars(part)[name] = _refuse(part, name)


class _Forward:
    """Stands in for a module's ``forward``."""


class _MixerForward(_Forward):
    """`Mixer.forward` of a piece."""

    def __init__(self, mixer: Mixer, ranks: Ranks) -> None:
        self.piece = SequenceParallel(mixer, ranks)

    def __call__(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "b n c"]:
        given = {"context": context, "context_mask": context_mask, "pair_mask": pair_mask}
        for name, value in given.items():
            if value is not None:
                raise UnsupportedError(self.piece.mixer.info.name, f"{name} in sequence parallelism", "it has no other tokens")
        if grid is not None and len(grid) > 1:
            raise UnsupportedError(self.piece.mixer.info.name, "a grid in sequence parallelism", "pieces are of a sequence")
        return self.piece(x, mask=mask)


class _LanguageForward(_Forward):
    """`CausalLM.forward` of a piece."""

    def __init__(self, model: CausalLM, ranks: Ranks) -> None:
        self.model, self.ranks, self.compared = model, ranks, False

    def __call__(self, tokens: Int[Tensor, "b n"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n v"]:
        model = self.model
        layout = find_layout(self.ranks, tokens, mask, model, _problem(tokens, mask), describe(model))
        if not self.compared:
            compare(self.ranks, {"parameters": checksum(model)})
            self.compared = True
        model.position.check_length(sum(layout.lengths))
        mask = layout.mask_of(mask, tuple(tokens.shape), tokens.device)
        start = layout.real_before(tokens.shape[0], tokens.device)
        positions = token_positions(*tokens.shape, mask, start=start, device=tokens.device)
        embedded, _ = model._embed(tokens, mask, self._window(layout, tokens, mask))
        carried = Tokens(model.position(embedded, positions), mask)
        with shared_layout(layout):
            for block in model.blocks:
                carried = block(carried)
        return model._logits(carried.x, mask)

    def _window(self, layout: Layout, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """The embedded tokens before the piece that the convolution reads: ids are sent, and embedded here."""
        if self.model.short_conv is None:
            return None
        width = self.model.short_conv.weight.shape[1] - 1
        batch, n = tokens.shape
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        have = min(width, n)
        ids, known = (t.new_zeros(batch, width) for t in (tokens, real))
        ids[:, width - have :], known[:, width - have :] = tokens[:, n - have :], real[:, n - have :]
        pieces = self.ranks.gather("halo", [ids, known]).pieces[: layout.rank]
        joined = [torch.zeros_like(ids), torch.zeros_like(known)]
        for piece, length in zip(pieces, layout.lengths, strict=False):
            kept = width - min(width, length)
            joined = [
                torch.cat((old, new[:, kept:]), dim=1)[:, old.shape[1] - kept :] for old, new in zip(joined, piece, strict=True)
            ]
        return zero_masked(self.model.embedding(joined[0]), joined[1])


def _problem(tokens: Tensor, mask: Tensor | None) -> Exception | None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 1:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        return ValueError(f"tokens: expected ids (batch, n) with n >= 1, got {got}")
    try:
        check_mask("mask", mask, tuple(tokens.shape))
    except (TypeError, ValueError) as error:
        return error
    return None


def _refuse(mixer: Mixer, name: str) -> Callable[..., Tensor]:
    def refuse(*given: object, **named: object) -> Tensor:
        raise UnsupportedError(mixer.info.name, f"{name} in sequence parallelism", "a rank has a piece; restore the model first")

    return refuse


def _parts(module: nn.Module, path: str) -> Iterator[Mixer | CausalLM]:
    """The outermost mixers and language models in ``module``; UnsupportedError for what couples tokens in another way."""
    if isinstance(module, Mixer):
        require_combinable(module)
        yield module
        return
    if isinstance(module, CausalLM):
        yield module
        yield from _parts(module.blocks, f"{path}.blocks")
        return
    _check(module, path.lstrip(".") or type(module).__name__)
    for name, child in module.named_children():
        yield from _parts(child, f"{path}.{name}")


def _check(module: nn.Module, path: str) -> None:
    """UnsupportedError if a module's tokens depend on each other, or on their place, without a mixer."""
    info = getattr(module, "info", None)
    why = ""
    if isinstance(info, Info) and info.kind == "model":
        why = "its output is of all tokens; parallelize its blocks, and gather before it pools"
    elif isinstance(module, Block) and module.between is not None:
        why = "what stands between mixer and channel mixer changes the tokens"
    elif isinstance(module, Block) and max(module.mixer_residual.drop_path, module.channel_residual.drop_path) > 0.0:
        why = "each rank would draw its own stochastic depth; build it with drop_path=0"
    elif isinstance(module, ChannelMixer | Norm) and not module.per_token:
        why = "it reads a token's neighbours, or all tokens"
    elif isinstance(module, ShortConvolution) or (isinstance(module, PositionEmbedding) and module.name != "none"):
        why = "outside of a causal_lm nobody tells it where the piece begins"
    if why:
        raise UnsupportedError(path, "sequence parallelism", why)
