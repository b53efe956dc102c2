"""CCNet's criss-cross attention, one pass and several."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:criss_cross",)


def run(recording: Recording) -> dict[str, Tensor]:
    weights = recording.parameters()
    inner, dim = weights["query_conv.weight"].shape[:2]
    x = recording.leaf("in/x")
    grid = tuple(x.shape[2:])
    found = {}
    for name, passes in (("y", recording.config["recurrence"]), ("y_one_pass", 1)):
        mixer = create_mixer("criss_cross", dim, passes=passes, reduction=dim // inner).to(recording.dtype)
        names = {"query_conv": "q_proj", "key_conv": "k_proj", "value_conv": "v_proj", "gamma": "gamma"}
        fill(mixer, renamed(weights, names))
        found[f"out/{name}"] = mixer(x.flatten(2).mT, grid=grid).mT.unflatten(2, grid)
    (found["out/y"] * recording["in/w"]).sum().backward()
    return found | {"grad/x": x.grad}
