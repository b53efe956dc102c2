"""Agent attention: a few pooled queries read the sequence by softmax and hand it on by softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.pooled.agent_bias import AgentBias
from attnlab.mixers.pooled.agents import LearnedAgents, PooledAgents
from attnlab.ops.attention import attention


@mixers.register(
    "agent",
    family="pooled",
    paper="agent-attention",
    supports=Supports(cross=True, grid=frozenset({1, 2}), mixing_matrix=True, cost=1.0),
    example={"num_agents": 4},
)
class AgentAttention(AttentionMixer):
    r"""Attention in two steps through ``num_agents`` pooled queries (Han et al. 2023, equations 3 to 6).

    For one head with queries $Q \in \mathbb{R}^{n \times d}$, keys and values $K, V$, agents $A = \mathrm{pool}(Q) \in
    \mathbb{R}^{a \times d}$ and $s = d^{-1/2}$:

    $$V_A = \mathrm{softmax}(s\,A K^\top + B_1)\,V, \qquad O = \mathrm{softmax}(s\,Q A^\top + B_2)\,V_A + \mathrm{DWC}(V) + k V$$

    Time O((n + m) a d), memory O((n + m) d). Masked tokens take no part in the pooling, in either softmax, or in DWC. The mixing
    matrix is the product of the two softmax maps, plus k on its diagonal; DWC is outside of it. Without biases, DWC and k V it is
    linear attention with the features softmax(s Q A^T) of queries and softmax(s A K^T) of keys.

    Args:
        dim: width of the tokens.
        num_heads: heads; each has its own agents.
        num_agents: a; on a 2-D grid a square number.
        bias_grid: sides of the tokens' grid for the authors' learned biases B1, B2, which fix the grid; None: no biases.
        agents: "pool" (the authors'), "learned" (the same for every input), or a module that is called with queries (b, h, n, d),
            mask (b, n) and grid, and gives agents (b, h, a, d) and which of them stand for any token (b, a), None for all.
        dwc: the 3 x 3 depthwise convolution on V (self-attention alone); a sequence is a grid of height 1.
        value_scale: k, adds k V (self-attention alone): what takes DWC's place where nothing is trained; see `from_attention`.
        reduction: side of the cells to which a strided convolution and a LayerNorm shrink the keys' and values' source (the
            authors' pyramid models); needs a 2-D grid.
        class_token: the first token is outside the grid, is no part of agents and DWC, and is key and query. The grid is that
            of ``bias_grid`` if it is not given.
        **options: those of `AttentionMixer`.

    Raises:
        UnsupportedError: with ``causal=True`` (agents pool over the future), and for a grid other than ``bias_grid``.
        ValueError: for agents that are no square on a 2-D grid, grouped or resized heads, or a position.

    Differs from the paper: on a sequence agents are means of adaptive segments of the real tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_agents: int = 49,
        bias_grid: Grid | None = None,
        agents: str | nn.Module = "pool",
        dwc: bool = True,
        value_scale: float | int = 0.0,
        reduction: int = 1,
        class_token: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        # nothing then tells one token from another by its place
        alike = agents == "learned" and not (dwc or bias_grid or class_token or reduction > 1)
        self._promises = replace(self.info.supports, permutation_equivariant=alike)
        super().__init__(dim, num_heads, **options)
        if num_agents < 1 or reduction < 1:
            raise ValueError(f"num_agents, reduction: expected at least 1, got {num_agents} and {reduction}")
        if self.num_kv_heads != num_heads or self.num_heads * self.head_dim != dim:
            raise ValueError("num_kv_heads, head_dim: expected the defaults, since DWC and the pooling take all dim channels")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}; bias_grid gives the authors' biases")
        if class_token and reduction > 1:
            raise ValueError(f"reduction: expected 1 with class_token=True, got {reduction}")
        if value_scale and reduction > 1:
            raise ValueError(f"value_scale: expected 0 with reduction={reduction}, where tokens have no value of their own")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        if isinstance(agents, str) and agents not in ("pool", "learned"):
            raise ValueError(f"agents: expected 'pool', 'learned' or a module, got {agents!r}")
        self.agents: nn.Module
        if isinstance(agents, nn.Module):
            self.agents = agents
        elif agents == "learned":
            self.agents = LearnedAgents(num_heads, num_agents, self.head_dim, **place)
        else:
            self.agents = PooledAgents(num_agents)
        self.value_scale = value_scale
        self.num_agents, self.bias_grid, self.reduction = num_agents, bias_grid, reduction
        self.num_prefix = int(class_token)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **place) if dwc else None
        self.shrink = nn.Conv2d(dim, dim, reduction, stride=reduction, **place) if reduction > 1 else None
        self.shrink_norm = nn.LayerNorm(dim, **place) if reduction > 1 else None
        self.key_bias = self.query_bias = None
        if bias_grid is not None:
            keys = (bias_grid[0] // reduction, bias_grid[1] // reduction)
            self.key_bias = AgentBias(num_heads, num_agents, keys, num_prefix=self.num_prefix, **place)
            self.query_bias = AgentBias(num_heads, num_agents, bias_grid, num_prefix=self.num_prefix, **place)

    @property
    def supports(self) -> Supports:
        """Learned agents with nothing local make it permutation equivariant."""
        return self._promises

    @classmethod
    def from_attention(cls, mixer: AttentionMixer, *, num_agents: int = 49, value_scale: float | int = 0.075) -> AgentAttention:
        r"""Agent attention in the place of trained attention, without training (Agent Stable Diffusion).

        Projections are those of ``mixer``, agents its pooled queries, and k V is added in place of a convolution. The authors use
        it in the first steps of denoising, on tokens that were merged.

        Args:
            mixer: softmax attention without causality, grouped heads, or a position.
            num_agents: a.
            value_scale: k.

        Raises:
            ValueError: for a form of attention that this has no place for.
        """
        if mixer.causal or mixer.position_name != "none" or not isinstance(mixer.q_norm, nn.Identity):
            raise ValueError("mixer: expected attention that is not causal, without a position and norms of queries and keys")
        weight = mixer.q_proj.weight
        own = cls(
            mixer.dim,
            mixer.num_heads,
            num_agents=num_agents,
            dwc=False,
            value_scale=value_scale,
            num_kv_heads=mixer.num_kv_heads,
            head_dim=mixer.head_dim,
            context_dim=mixer.context_dim,
            qkv_bias=mixer.q_proj.bias is not None,
            out_bias=mixer.out_proj.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(own, name).load_state_dict(getattr(mixer, name).state_dict())
        return own.train(mixer.training)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Agents read the keys, queries read the agents."""
        prefix, real = self.num_prefix, masks.query
        agents, alive = self.agents(q[:, :, prefix:], None if real is None else real[:, prefix:], grid)
        bias_k = None if self.key_bias is None else self.key_bias()
        bias_q = None if self.query_bias is None else self.query_bias().transpose(-1, -2)
        summary = attention(agents, k, v, bias=bias_k, key_mask=masks.key)
        # Without any key the summaries are zero, and so is what queries read.
        return attention(q, agents, summary, bias=bias_q, key_mask=alive)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Both steps, the local term, the output projection."""
        grid = self._check_grid(grid)
        source, masks = self._source(x, context, masks, grid)
        q, k, v = self.project(x, source)
        heads = self._with_values(self.attend(q, k, v, masks, grid), v, context)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._map(q, k, context, masks, grid))
        y = rearrange(heads, "b h n d -> b n (h d)")
        if self.dwc is not None and context is None:
            y = y + self._local(rearrange(v, "b h m d -> b m (h d)"), masks.key, grid)
        return self.out_proj(y)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The product of the two softmax maps."""
        grid = self._check_grid(grid)
        source, masks = self._source(x, context, masks, grid)
        q, k, _ = self.project(x, source)
        return self._map(q, k, context, masks, grid)

    def _map(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], context: Tensor | None, masks: Masks, grid: Grid
    ) -> Float[Tensor, "b h n m"]:
        identity = self.identity(k)
        return self._with_values(self.attend(q, k, identity, masks, grid), identity, context)

    def _with_values(self, heads: Tensor, v: Tensor, context: Tensor | None) -> Float[Tensor, "b h n e"]:
        """The head outputs and k times the token's own values, which a context does not hold."""
        return heads + self.value_scale * v if self.value_scale and context is None else heads

    def _check_grid(self, grid: Grid) -> Grid:
        if self.bias_grid is None:
            return grid
        if len(grid) == 1 and math.prod(self.bias_grid) == grid[0]:
            return self.bias_grid
        if tuple(grid) != tuple(self.bias_grid):
            raise self._refusal(f"the grid {grid}", f"its biases were built for bias_grid={tuple(self.bias_grid)}")
        return grid

    def _source(self, x: Tensor, context: Tensor | None, masks: Masks, grid: Grid) -> tuple[Float[Tensor, "b m c"] | None, Masks]:
        """Where keys and values come from if not from x itself, and the masks that go with it."""
        if context is not None or self.shrink is None or self.shrink_norm is None:
            return context, masks
        if len(grid) != 2:
            raise self._refusal("reduction on a sequence", "the strided convolution needs a grid of rank 2")
        small = self.shrink_norm(from_grid(self.shrink(to_grid(x, grid))))
        if masks.query is None:
            return small, masks
        real = to_grid(masks.query.unsqueeze(-1).to(x.dtype), grid)
        real = F.max_pool2d(real, self.reduction, stride=self.reduction).flatten(1) > 0
        return small, masks._replace(key=real)

    def _local(self, v: Float[Tensor, "b m c"], key_mask: Bool[Tensor, "b m"] | None, grid: Grid) -> Float[Tensor, "b n c"]:
        """DWC of the values on the full grid; tokens in front of the grid get nothing."""
        prefix = self.num_prefix
        v = zero_masked(v, key_mask)[:, prefix:]
        image_grid = (1, *grid) if len(grid) == 1 else grid
        if self.reduction > 1:
            small = (grid[0] // self.reduction, grid[1] // self.reduction)
            image = F.interpolate(to_grid(v, small), size=grid, mode="bilinear", align_corners=False)
        else:
            image = to_grid(v, image_grid)
        return F.pad(from_grid(self.dwc(image)), (0, 0, prefix, 0))  # type: ignore[misc]
