"""NATTEN's operators at stride 1, with grouped keys, and the merge of partial attentions."""

from __future__ import annotations

from functools import reduce

from torch import Tensor

from attnlab.ops.partial_attention import Partial, merge
from golden.neighborhoods import run_operator
from golden.recording import Recording

PROVES = ("mixer:neighborhood",)


def _merged(recording: Recording) -> dict[str, Tensor]:
    count = sum(key.startswith("in/merge.out") for key in recording.tensors)
    parts = [
        Partial(recording[f"in/merge.out{j}"].transpose(1, 2), recording[f"in/merge.lse{j}"].transpose(1, 2))
        for j in range(count)
    ]
    whole = reduce(merge, parts)
    return {"out/merge.out": whole.output.transpose(1, 2), "out/merge.lse": whole.lse.transpose(1, 2)}


def run(recording: Recording) -> dict[str, Tensor]:
    """Every recorded configuration, and the merge."""
    results = _merged(recording) if "in/merge.out0" in recording else {}
    for name, config in recording.config.items():
        if f"in/{name}.q" in recording:
            results |= run_operator(recording, name, config)
    return results
