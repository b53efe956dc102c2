r"""A memory whose state is the weights of a small network, written by gradient descent while it is read (Titans).

For one head with network $M$, keys and values of its tokens, and gates $\alpha_t, \eta_t, \theta_t$,

$$\ell(M; x_t) = \| M(k_t) - v_t \|^2, \qquad S_t = \eta_t S_{t-1} - \theta_t \nabla \ell(M_{t'}; x_t), \qquad
M_t = (1 - \alpha_t) M_{t-1} + S_t, \qquad y_t = M_t(q_t) .$$

$t'$ is the last token before the chunk that t belongs to. A chunk of one token gives the recurrence itself; longer ones take
their gradients where the chunk began, which is another function, and by its definition faster. The network is
$x \mapsto \sigma(\cdots \sigma(x W_1) \cdots) W_L$ without biases; one layer is a matrix, and its recurrence a delta rule with
momentum and decay.

Behrouz et al. 2025 (arXiv 2501.00663, equations 8 to 18).
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.errors import UnknownNameError, nearest
from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.neural_memory import eager, reference
from attnlab.ops.neural_memory.alignment import Alignment
from attnlab.ops.neural_memory.memory import ACTIVATIONS, MemoryState, Weights, read_memory

NEURAL_MEMORY = Op("neural_memory", {"reference": reference.neural_memory, "eager": eager.neural_memory})

__all__ = ["ACTIVATIONS", "NEURAL_MEMORY", "Alignment", "MemoryState", "Weights", "neural_memory", "read_memory"]


def neural_memory(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    alpha: Float[Tensor, "b h n"],
    eta: Float[Tensor, "b h n"],
    theta: Float[Tensor, "b h n"],
    state: MemoryState,
    *,
    chunk: int = 1,
    activation: str = "silu",
    mask: Bool[Tensor, "b n"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b h n e"], MemoryState]:
    """What every token reads after its own update, and the memory after the last; any split of a sequence gives the same.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, h, n, d), usually of length 1.
        v: values (b, h, n, e).
        alpha: how much is forgotten (b, h, n), 0 to 1.
        eta: momentum (b, h, n).
        theta: step sizes (b, h, n).
        state: the memory before, `MemoryState.fresh` for the first token; its layers lead from width d to width e.
        chunk: tokens that share the point where gradients are taken, counted from the first token of the sequence.
        activation: sigma: "silu", "gelu" or "tanh".
        mask: (b, n), True marks a real token; the others change nothing, not even the place in the chunk, and read anything.
        backend: "auto", "reference" (token by token, gradients by automatic differentiation) or "eager" (chunks in closed form).

    Returns:
        The output (b, h, n, e) in the dtype of the inputs, and the state after, in float32 for half precisions.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes that do not fit, an empty sequence, or a chunk below 1.
        UnknownNameError: for an unknown activation or backend.
    """
    q, k, v, alpha, eta, theta = common_dtype(q=q, k=k, v=v, alpha=alpha, eta=eta, theta=theta)
    _check(q, k, v, {"alpha": alpha, "eta": eta, "theta": theta}, state, chunk, activation)
    wide = accumulate_dtype(q.dtype)
    memory, momentum, anchor = (tuple(w.to(wide) for w in group) for group in state[:3])
    return NEURAL_MEMORY(backend, q)(
        *(q, k, v, alpha, eta, theta),
        MemoryState(memory, momentum, anchor, state.place),
        chunk=chunk,
        activation=activation,
        mask=mask,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: MemoryState, chunk: int, activation: str) -> None:
    """Raise for what `neural_memory` cannot take; the weights must lead from the queries' width to the values'."""
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q, k, v: expected (b, h, n, d) twice and (b, h, n, e), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] == 0:
        raise ValueError("q, k, v: expected at least one token, got none")
    for name, gate in gates.items():
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name}: expected shape {tuple(q.shape[:3])}, one number a token and head, got {tuple(gate.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if activation not in ACTIVATIONS:
        raise UnknownNameError(
            f"activation: expected one of {list(ACTIVATIONS)}, got {activation!r}{nearest(activation, ACTIVATIONS)}"
        )
    widths = [q.shape[3], *(w.shape[-1] for w in state.memory[:-1]), v.shape[3]]
    expected = [(*q.shape[:2], *pair) for pair in pairwise(widths)]
    for name, group in zip(("memory", "momentum", "anchor"), state[:3], strict=True):
        if [tuple(w.shape) for w in group] != expected:
            raise ValueError(f"state: expected weights {expected} as {name}, got {[tuple(w.shape) for w in group]}")
