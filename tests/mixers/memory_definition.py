"""Titans' equations token by token, with every gradient by automatic differentiation, for one example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = {"silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}


class HeadMemory:
    """The network of one head: weights M, surprise S, and the weights at which this chunk takes its gradients."""

    def __init__(self, weights: list[Tensor], chunk: int, activation: str) -> None:
        self.memory, self.surprise = list(weights), [torch.zeros_like(w) for w in weights]
        self.chunk, self.sigma, self.count = chunk, SIGMA[activation], 0

    def apply(self, weights: list[Tensor], x: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = self.sigma(x @ weight)
        return x @ weights[-1]

    def read(self, q: Tensor) -> Tensor:
        return self.apply(self.memory, q)

    def write(self, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor) -> None:
        if self.count % self.chunk == 0:
            self.anchor = list(self.memory)
        weights = [w.clone() for w in self.anchor]  # k and v may depend on the weights themselves: that is no part of the loss
        loss = (self.apply(weights, k) - v).square().sum()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        self.surprise = [eta * s - theta * u for s, u in zip(self.surprise, gradients, strict=True)]
        self.memory = [(1 - alpha) * m + s for m, s in zip(self.memory, self.surprise, strict=True)]
        self.count += 1


def convolved(part, inputs: list[Tensor]) -> list[Tensor]:
    """What a convolved projection makes of the last of ``inputs``, head by head."""
    z = [part.proj.weight @ x for x in inputs]
    if part.conv is not None:
        taps = part.conv.weight.shape[1]
        last = sum(part.conv.weight[:, taps - 1 - j] * z[-1 - j] for j in range(min(taps, len(z))))
    else:
        last = z[-1]
    heads = list(F.silu(last).chunk(part.num_heads))
    return [h / (h.square().sum() + 1e-6).sqrt() for h in heads] if part.normalize else heads


class Store:
    """The neural memory of one example: heads, gates, and the inputs so far."""

    def __init__(self, part) -> None:
        self.part, self.inputs = part, []
        self.heads = [HeadMemory([w[h] for w in part.layers], part.chunk, part.activation) for h in range(part.num_heads)]

    def step(self, x: Tensor) -> list[Tensor]:
        """Write x, and read with it."""
        self.inputs.append(x)
        q, k, v = (convolved(part, self.inputs) for part in (self.part.q, self.part.k, self.part.v))
        gates = {name: torch.sigmoid(gate.weight @ x + gate.bias) for name, gate in self.part.gates.items()}
        none = torch.zeros(self.part.num_heads, dtype=x.dtype)
        alpha, eta = gates.get("alpha", none), gates.get("eta", none)
        theta = self.part.max_step * gates["theta"]
        for h, head in enumerate(self.heads):
            head.write(k[h], v[h], alpha[h], eta[h], theta[h])
        return [head.read(q[h]) for h, head in enumerate(self.heads)]


def persistent_of(mixer) -> list[Tensor]:
    return [] if mixer.persistent is None else list(mixer.persistent)


def rms(x: Tensor, norm) -> Tensor:
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return norm.weight * x / (x.square().mean() + eps).sqrt()


def layer(mixer, store: Store, x: Tensor) -> Tensor:
    """One token through the layer of the neural memory alone."""
    read = torch.cat([rms(y, mixer.out_norm) for y in store.step(x)])
    return mixer.out_proj.weight @ (read * F.silu(mixer.gate_proj.weight @ x))


def product(part, y: Tensor, m: Tensor) -> Tensor:
    """The gate between attention and memory."""
    sigma = {"silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[part.gate]
    return sigma(rms(y, part.attention_norm)) * sigma(rms(m, part.memory_norm))


def attend(part, heads: int, query: Tensor, seen: list[Tensor]) -> Tensor:
    """Softmax attention of one token over some, head by head."""
    q = (part.q_proj.weight @ query).chunk(heads)
    k = [(part.k_proj.weight @ x).chunk(heads) for x in seen]
    v = [(part.v_proj.weight @ x).chunk(heads) for x in seen]
    outputs = []
    for h in range(heads):
        weights = torch.stack([q[h] @ key[h] / len(q[h]) ** 0.5 for key in k]).softmax(0)
        outputs.append(sum(w * value[h] for w, value in zip(weights, v, strict=True)))
    return torch.cat(outputs)


def each_example(one, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``one`` maps the list of an example's real tokens to that of its outputs; masked tokens have zeros."""
    rows = []
    for b, tokens in enumerate(x):
        real = [i for i in range(len(tokens)) if mask is None or mask[b, i]]
        outputs = one([tokens[i] for i in real]) if real else []
        row = [torch.zeros_like(tokens[0])] * len(tokens)
        for i, y in zip(real, outputs, strict=True):
            row[i] = y
        rows.append(torch.stack(row))
    return torch.stack(rows)
