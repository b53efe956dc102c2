"""CAB's index of each pattern and its efficiency length."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.tasks.cab.index import LOWER_IS_BETTER, PATTERNS, compositional_index, efficiency_length, index_columns
from golden.recording import Recording

PROVES = ("task:cab_ns", "task:cab_nc", "task:cab_cc")


def run(recording: Recording) -> dict[str, Tensor]:
    """Both from the recorded scores and costs, the constants being the recorded ones."""
    results = {}
    for pattern in PATTERNS:
        values, scores, columns = recording[f"in/{pattern}"].tolist(), {}, index_columns(pattern)
        metrics = [(name, *constants) for task in columns.values() for name, constants in task.items()]
        for place, what in ((1, "mu"), (2, "sigma")):
            ours = torch.tensor([metric[place] for metric in metrics], dtype=recording.dtype)
            torch.testing.assert_close(ours, recording[f"param/{what}_{pattern}"], rtol=1e-6, atol=0.0)
        signs = [-1 if name.split()[-1] in LOWER_IS_BETTER else 1 for name, *_ in metrics]
        assert signs == recording[f"param/sign_{pattern}"].tolist()
        for task, own in columns.items():
            scores[task], values = values[: len(own)], values[len(own) :]
        found = compositional_index(pattern, scores)
        results[f"out/{pattern}_avg"] = torch.tensor(found.pop("average"), dtype=recording.dtype)
        results[f"out/{pattern}"] = torch.tensor(list(found.values()), dtype=recording.dtype)
    lengths, softmax, candidate = (recording[f"in/{name}"].tolist() for name in ("lengths", "cost_vanilla", "cost_efficient"))
    for style, skip in (("memory", 0), ("time", 1)):
        length = efficiency_length(lengths, softmax, candidate, skip=skip)
        results[f"out/efficiency_length_{style}_style"] = torch.tensor(length, dtype=recording.dtype)
    return results
