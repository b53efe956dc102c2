"""Scans in several orders: a causal mechanism of sequences on grids, or both ways along a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from attnlab.core.catalog import create_mixer, mixer_info, mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.record import Tape, record, recording
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.scan_orders import Path, inverse, scan_paths, visit

MERGES = ("sum", "mean", "concat", "gate")


@mixers.register(
    "multi_scan",
    family="recurrent",
    paper="survey-of-mamba",
    supports=Supports(causal="optional", streaming=True, grid=frozenset({1, 2}), mixing_matrix=True, state="bounded", cost=1.0),
    example={"mixer_options": {"state_dim": 4}},
)
class MultiScan(StreamingMixer):
    r"""A causal mechanism along several paths over the tokens (Qu et al. 2024, A Survey of Mamba, scanning modes).

    With K permutations $P_k$ of the tokens, of a named order, and the mechanism f with weights $\theta_k$ for each of them,

    $$y = \mathrm{merge}_k\left(P_k^{-1} f_{\theta_k}(P_k x)\right)$$

    Masks go along with the tokens. Time and memory are K times those of f. The mixing matrix has the heads of all paths, K times
    those of f, before the merge; each is lower triangular in the order of its path.

    Args:
        dim: width of the tokens.
        num_heads: of the mechanism.
        causal: a single forward path, which also streams; with order "raster", or with rank 1.
        mixer: name of the mechanism, which has to have a causal form.
        mixer_options: its own options.
        order: "raster", "cross" (VMamba: rows and columns), "continuous" (rows and columns as snakes), "hilbert", "windows"
            (LocalMamba: rows and columns within windows), or "spectral_spatial" (rank 3, bands first).
        bidirectional: every path backwards too, where not causal. Without it a sequence is refused: its one path would be causal.
        window: side of a window.
        rank: of the grids that the paths are laid over; to one of a lower rank, such as a sequence, sides of 1 are prepended.
        merge: "sum", "mean", "concat" (and a linear layer), or "gate" (a sigmoid of the token for each path, then the sum).
        shared: whether all paths have the same weights.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True`` where a path leaves the order of the tokens.
        ValueError: for an unknown order or merge, a rank other than 1, 2 and 3, a mechanism without a causal form, or one path in
            the order of the tokens without ``causal=True``.
        UnknownNameError: for an unknown mechanism or option of it.

    Differs from the paper: which is a survey. Here the whole mechanism runs along each path, its projections, convolutions and
    gates included; VMamba and Vim share some of these between the paths. ``shared`` shares all.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        mixer: str = "mamba",
        mixer_options: Mapping[str, Any] | None = None,
        order: str = "raster",
        bidirectional: bool = True,
        window: int = 7,
        rank: int = 2,
        merge: str = "sum",
        shared: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank not in (1, 2, 3):
            raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
        if merge not in MERGES:
            raise ValueError(f"merge: expected one of {MERGES}, got {merge!r}")
        both = bidirectional and not causal
        count = len(scan_paths(order, (1,) * rank, window=window, bidirectional=both))
        in_order = order == "raster" or rank == 1
        if in_order and not bidirectional and not causal:
            raise ValueError("bidirectional: a single path in the order of the tokens is causal; build it with causal=True")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        _demand_causal_form(mixer)
        options = {"causal": True, **place, **(mixer_options or {})}
        scans = [create_mixer(mixer, dim, num_heads, **options) for _ in range(1 if shared else count)]
        self._promises = _promises(scans[0], range(1 if bidirectional or in_order else 2, rank + 1), in_order=in_order)
        super().__init__(dim, num_heads, causal=causal)
        self.scans = nn.ModuleList(scans)
        self.order, self.bidirectional, self.window, self.rank, self.merge = order, both, window, rank, merge
        self.join = nn.Linear(count * dim, dim, **place) if merge == "concat" else None
        self.gate = nn.Linear(dim, count, **place) if merge == "gate" else None

    @property
    def supports(self) -> Supports:
        """Those of the mechanism, as far as they outlive the paths."""
        return self._promises

    def paths(self, grid: Grid, device: torch.device | None = None) -> list[Path]:
        """The permutations for ``grid``: the k-th token on path p is token ``paths[p][k]`` of the sequence."""
        lifted = (1,) * (self.rank - len(grid)) + tuple(grid)
        found = scan_paths(self.order, lifted, window=self.window, bidirectional=self.bidirectional)
        return [path.to(device) for path in found]

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Permute, scan, permute back, merge."""
        paths = self.paths(grid, x.device)
        with record(self.scans, only=("values", "mixed")) if recording() else nullcontext() as tape:
            outputs = self._along(paths, x, masks.query, lambda scan, *given: scan.mix(*given))
        if tape is not None:
            self._show(tape, paths)
        return self._merge([visit(y, inverse(path)) for y, path in zip(outputs, paths, strict=True)], x)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """Those along the paths, with rows and columns back in the order of the tokens."""
        paths = self.paths(grid, x.device)
        found = self._along(paths, x, masks.query, lambda scan, *given: scan.matrix(*given))
        back = [inverse(path) for path in paths]
        return torch.cat([m.index_select(2, p).index_select(3, p) for m, p in zip(found, back, strict=True)], 1)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty state of the only path."""
        return self._only.begin(batch_size, device, dtype)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """The only path goes on."""
        y, state = self._only.advance(x, state, mask=mask)
        return self._merge([y], x), state

    @property
    def _only(self) -> StreamingMixer:
        return cast("StreamingMixer", self.scans[0])

    def _along(self, paths: Sequence[Path], x: Tensor, mask: Tensor | None, run: Callable[..., Tensor]) -> list[Tensor]:
        """What ``run`` gives for each path; paths of shared weights are one batch."""
        tokens = [visit(x, path) for path in paths]
        real = [None if mask is None else visit(mask, path) for path in paths]
        grid = (x.shape[1],)
        if len(self.scans) == len(paths):
            return [run(scan, t, None, Masks(m, m), grid) for scan, t, m in zip(self.scans, tokens, real, strict=True)]
        whole = None if mask is None else torch.cat(cast("list[Tensor]", real))
        return list(run(self.scans[0], torch.cat(tokens), None, Masks(whole, whole), grid).chunk(len(paths)))

    def _merge(self, outputs: Sequence[Float[Tensor, "b n c"]], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        if self.join is not None:
            return self.join(torch.cat(list(outputs), -1))
        gates = None if self.gate is None else self.gate(x).sigmoid().split(1, dim=-1)
        if gates is not None:
            outputs = [gate * y for gate, y in zip(gates, outputs, strict=True)]
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total / len(outputs) if self.merge == "mean" else total

    def _show(self, tape: Tape, paths: Sequence[Path]) -> None:
        """Emit "values" and "mixed" of all paths, in the order of the tokens, where the mechanism does."""
        for name in ("values", "mixed"):
            keys = [f"{index}/{name}" for index in range(len(self.scans))]
            if all(key in tape for key in keys):
                self.emit(name, lambda keys=keys: self._heads([tape[key] for key in keys], paths))

    @staticmethod
    def _heads(found: Sequence[Shaped[Tensor, "..."]], paths: Sequence[Path]) -> Shaped[Tensor, "..."]:
        parts = found if len(found) == len(paths) else found[0].chunk(len(paths))
        return torch.cat([part.index_select(2, inverse(path)) for part, path in zip(parts, paths, strict=True)], 1)


def _demand_causal_form(mixer: str) -> None:
    have = mixer_info(mixer).supports
    if have.causal == "no" or 1 not in have.grid:
        raise ValueError(f"mixer: expected one with a causal form on sequences, such as 'mamba' or 'delta_net', got {mixer!r}")


def _promises(scan: Mixer, ranks: Iterable[int], *, in_order: bool) -> Supports:
    have = scan.supports
    if scan.fixed_tokens is not None or scan.num_prefix or not scan.causal:
        raise ValueError("mixer_options: expected a causal mechanism for any number of tokens, without tokens outside the grid")
    streams = in_order and have.streaming
    return Supports(
        causal="optional" if in_order else "no",
        mask=have.mask,
        streaming=streams,
        grid=frozenset(ranks),
        mixing_matrix=have.mixing_matrix,
        batch_coupled=have.batch_coupled,
        state=have.state if streams else "none",
        discontinuous=have.discontinuous,
        cost=have.cost,
    )
