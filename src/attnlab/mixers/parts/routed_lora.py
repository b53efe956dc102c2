"""Linear layers with several low-rank experts on top, mixed token by token by a router that layers can share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.mixers.parts.routing import top_k_mask


class LoraRouter(nn.Module):
    r"""The weights of E experts for a token: $p = \mathrm{softmax}(W x)$ in training, its ``top_k`` largest in evaluation.

    Inside `known_tasks` the weight is 1 for the expert of the example's task and 0 for the others, in both modes.

    Args:
        dim: width of the tokens.
        num_experts: E.
        top_k: experts that an evaluated token uses; None for all.
        renormalize: divide the weights that stay by their sum.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int | None = 3,
        renormalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts: expected a positive integer, got {num_experts}")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: expected 1 to num_experts={num_experts}, or None, got {top_k}")
        self.num_experts, self.top_k, self.renormalize = num_experts, top_k, renormalize
        self.tasks: Int[Tensor, " b"] | None = None
        self.proj = nn.Linear(dim, num_experts, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.proj.weight, std=0.02)

    def scores(self, x: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n e"]:
        """p."""
        return self.proj(x).softmax(dim=-1)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        """The weights of the experts."""
        if self.tasks is not None:
            if len(self.tasks) != len(x):
                raise ValueError(f"tasks: expected one an example, {len(x)}, got {len(self.tasks)}")
            return F.one_hot(self.tasks, self.num_experts).to(x.dtype)[:, None].expand(-1, x.shape[1], -1)
        scores = self.scores(x)
        if self.training or self.top_k is None:
            return scores
        kept = scores.masked_fill(~top_k_mask(scores, self.top_k), 0.0)
        return kept / kept.sum(dim=-1, keepdim=True) if self.renormalize else kept

    def specialisation_loss(
        self,
        x: Float[Tensor, "b n c"],
        mask: Bool[Tensor, "b n"] | None,
        *,
        balance: float | int = 1.0,
        entropy: float | int = 0.1,
    ) -> Float[Tensor, ""]:
        r"""$\alpha \sum_e \bar p_e \bar f_e + \lambda\, \mathrm{mean}_x H(p(x))$ over real tokens.

        $\bar p$ is the mean of p, $\bar f_e$ the share of tokens that have e among their ``top_k`` largest, divided by its sum.

        Args:
            x: what the router reads.
            mask: (b, n), True marks a real token.
            balance: $\alpha$.
            entropy: $\lambda$; negative rewards entropy.
        """
        scores = self.scores(x)
        real = torch.ones_like(scores[..., 0]) if mask is None else mask.to(scores.dtype)
        weight = (real / real.sum().clamp(min=1)).unsqueeze(-1)
        k = self.num_experts if self.top_k is None else self.top_k
        shares = (top_k_mask(scores, k).to(scores.dtype) * weight).sum(dim=(0, 1)) / k
        disorder = -torch.xlogy(scores, scores).sum(dim=-1, keepdim=True)
        return balance * ((scores * weight).sum(dim=(0, 1)) * shares).sum() + entropy * (disorder * weight).sum()


class RoutedLora(nn.Linear):
    r"""A linear layer with E low-rank experts: $y = W x + b + \frac{\alpha}{r} \sum_e g_e(x)\, A_e B_e x$.

    It stands where an `nn.Linear` stood: same names of weight and bias, same call. $A_e$ begins as zero, so that it changes
    nothing, $B_e$ with variance 1/r.

    Args:
        base: the layer that it replaces; its parameters are taken over, not copied.
        router: gives g; several layers may share it.
        rank: r.
        alpha: $\alpha$; None for r.
    """

    def __init__(self, base: nn.Linear, router: LoraRouter, *, rank: int = 8, alpha: float | int | None = None) -> None:
        if rank < 1:
            raise ValueError(f"rank: expected a positive integer, got {rank}")
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        place: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        experts = router.num_experts
        self.router, self.rank, self.scale = router, rank, 1.0 if alpha is None else alpha / rank
        self.lora_a = nn.Parameter(torch.zeros(experts, base.out_features, rank, **place))
        self.lora_b = nn.Parameter(torch.randn(experts, rank, base.in_features, **place) * rank**-0.5)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n o"]:
        """The base layer and the experts that the router weighs."""
        inner = F.linear(x, self.lora_b.flatten(0, 1)).unflatten(-1, (self.router.num_experts, self.rank))
        inner = (inner * self.router(x).unsqueeze(-1)).flatten(-2)
        return super().forward(x) + self.scale * F.linear(inner, self.lora_a.transpose(0, 1).flatten(1))


def route_projections(
    module: nn.Module,
    groups: Sequence[Sequence[str]] = (("q_proj", "k_proj", "v_proj"), ("out_proj",)),
    *,
    num_experts: int = 4,
    rank: int = 8,
    alpha: float | int | None = None,
    top_k: int | None = 3,
    renormalize: bool = True,
) -> list[LoraRouter]:
    """Give the linear layers of ``module`` experts, in place, one router a group; the output does not change yet.

    Layers of a group that read another width than its first get a router of their own.

    Args:
        module: any attention mixer, or another module with linear layers of these names.
        groups: names of the layers that share a router.
        num_experts: of every layer.
        rank: of an expert.
        alpha: factor of the experts times ``rank``; None for ``rank``.
        top_k: experts that an evaluated token uses; None for all.
        renormalize: divide their weights by their sum.

    Returns:
        The routers of the groups, each that of its first layer.

    Raises:
        ValueError: if a name is no linear layer, or for counts that do not fit.
    """
    firsts = []
    for group in groups:
        routers: dict[int, LoraRouter] = {}
        for name in group:
            base = getattr(module, name, None)
            if not isinstance(base, nn.Linear):
                raise ValueError(f"groups: expected names of linear layers, got {name!r}, which is {type(base).__name__}")
            width, weight = base.in_features, base.weight
            if width not in routers:
                place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
                routers[width] = LoraRouter(width, num_experts, top_k=top_k, renormalize=renormalize, **place)
            setattr(module, name, RoutedLora(base, routers[width], rank=rank, alpha=alpha))
        firsts.append(next(iter(routers.values())))
    return firsts


@contextmanager
def known_tasks(module: nn.Module, tasks: Int[Tensor, " b"]) -> Iterator[None]:
    """Inside the block every router in ``module`` gives each example the expert of its task, (b,), and no other."""
    routers = [part for part in module.modules() if isinstance(part, LoraRouter)]
    before = [router.tasks for router in routers]
    for router in routers:
        router.tasks = tasks
    try:
        yield
    finally:
        for router, tasks_before in zip(routers, before, strict=True):
            router.tasks = tasks_before


def preservation_loss(module: nn.Module, start: Mapping[str, Tensor], experts: Sequence[int]) -> Float[Tensor, ""]:
    r"""$\sum_e \lVert \theta_e - \theta_e^{(0)} \rVert^2$ over the low-rank matrices of the chosen experts.

    Args:
        module: has `RoutedLora` layers.
        start: its ``state_dict`` of when they were worth preserving (a copy: a state dict shares memory with its module).
        experts: which of them.

    Raises:
        ValueError: if there is no such layer.
    """
    chosen, names = list(experts), ("lora_a", "lora_b")
    moved = [(p[chosen] - start[name][chosen]) for name, p in module.named_parameters() if name.rpartition(".")[2] in names]
    if not moved:
        raise ValueError(f"module: expected layers with experts in it, got {type(module).__name__} without any")
    return torch.stack([difference.square().sum() for difference in moved]).sum()
