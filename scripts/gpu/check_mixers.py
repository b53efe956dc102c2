"""Mixers on a GPU against themselves on the CPU in float64: output, gradients, padding and pieces; prints JSON.

python scripts/gpu/check_mixers.py
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy

import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.ops.linear_attention import LINEAR_ATTENTION
from attnlab.ops.selective_scan import OP as SELECTIVE_SCAN

for op in (LINEAR_ATTENTION, SELECTIVE_SCAN):  # what "auto" leaves alone until it has passed here
    object.__setattr__(op, "untried", {})

NAMES = ("softmax", "linear", "lightning", "delta_net", "mamba")


def results(mixer: torch.nn.Module, x: Tensor, mask: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and all gradients, on the CPU in float64."""
    leaf = x.detach().requires_grad_()
    out = mixer(leaf, mask=mask)
    wanted = [leaf, *(p for p in mixer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(out, wanted, weight.to(out), allow_unused=True)
    return [out, *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, wanted, strict=True))]


def errors(name: str, device: str, dtype: torch.dtype) -> dict[str, object]:
    """How far a mixer on ``device`` in ``dtype`` is from float64, in the Frobenius norm, and its stream from its one pass."""
    torch.manual_seed(0)
    exact = create_mixer(name, dim=128, num_heads=2, causal=True).double()
    mixer = deepcopy(exact).to(device, dtype)
    x, weight = torch.randn(2, 333, 128).to(dtype), torch.randn(2, 333, 128)
    mask = torch.rand(2, 333) > 0.1
    truth = [r.detach() for r in results(exact, x.double(), mask, weight.double())]
    found = [r.detach().cpu().double() for r in results(mixer, x.to(device), mask.to(device), weight.to(device, dtype))]
    state, pieces = mixer.init_state(2), []
    with torch.no_grad():
        for piece, part in zip(x.to(device).split([1, 200, 132], 1), mask.to(device).split([1, 200, 132], 1), strict=True):
            out, state = mixer.extend(piece, state, mask=part)
            pieces.append(out)
    norms = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, truth, strict=True)]
    stream = float((torch.cat(pieces, 1).cpu().double() - truth[0]).norm() / truth[0].norm())
    padded = bool((found[0][~mask] == 0).all())
    row = {"mixer": name, "device": device, "dtype": str(dtype).removeprefix("torch."), "output": norms[0]}
    return row | {"gradients": max(norms[1:]), "stream": stream, "padding_is_zero": padded}


def main() -> None:
    rows = []
    for name in NAMES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            ours, cpu = errors(name, "cuda", dtype), errors(name, "cpu", dtype)
            # The GPU may be as far from float64 as the CPU in the same dtype, but for another order of its sums.
            keys = ("output", "gradients", "stream")
            ours["as_exact_as_cpu"] = all(ours[key] <= 4 * cpu[key] + 8 * torch.finfo(dtype).eps for key in keys)  # type: ignore[operator]
            ours["cpu_output"], ours["cpu_gradients"] = cpu["output"], cpu["gradients"]
            rows.append(ours)
            print(json.dumps(ours), flush=True)
    if not all(row["as_exact_as_cpu"] and row["padding_is_zero"] for row in rows):
        sys.exit("some mixers differ")


if __name__ == "__main__":
    main()
