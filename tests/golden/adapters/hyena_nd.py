"""Hyena N-D on images, with its filters."""

from __future__ import annotations

from torch import Tensor

from attnlab import create_mixer
from golden.recording import Recording, fill, renamed

PROVES = ("mixer:hyena",)

_WINDOWS = {"standard": "standard", "learn": "learn", "symettric": "symmetric", "symmetric": "symmetric", "no": "none"}


def _network(weights: dict[str, Tensor], name: str, ours: str) -> dict[str, Tensor]:
    """A sine network: linear layers at even places, of which the last has no bias, and the frequencies between."""
    count = len([key for key in weights if key.startswith(f"{name}.") and key.endswith(".freq")])
    found = renamed(weights, {f"{name}.{2 * layer}": f"{ours}.layers.{layer}" for layer in range(count)})
    return found | renamed(weights, {f"{name}.{2 * count}": f"{ours}.last"}) | {f"{ours}.frequency": weights[f"{name}.1.freq"]}


def _window(weights: dict[str, Tensor], name: str, ours: str) -> dict[str, Tensor]:
    rates = [weights[f"{name}.{part}"] for part in ("deltas", "Xdeltas", "Ydeltas") if f"{name}.{part}" in weights]
    found = {f"{ours}.rates": _stack(rates)} if rates else {}
    return found | renamed(weights, {f"{name}.shift": f"{ours}.shift"})


def _stack(rates: list[Tensor]) -> Tensor:
    return rates[0].new_tensor([rate.flatten().tolist() for rate in rates])


def _filter(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"z": weights["filter_fn.pos_emb.z"]}
    parts = ("X", "Y") if any("Ximplicit" in key for key in weights) else ("",)
    for index, part in enumerate(parts):
        found |= _network(weights, f"filter_fn.{part}implicit_filter", f"networks.{index}")
        found |= _window(weights, f"filter_fn.{part}modulation", f"windows.{index}")
    return {f"filter.{key}": value for key, value in found.items()}


def _run(recording: Recording, case: str, config: dict) -> dict[str, Tensor]:
    weights = recording.parameters(f"{case}.")
    networks = [key for key in weights if key.endswith(".freq")]
    mixer = create_mixer(
        "hyena",
        config["d_model"],
        order=config.get("order", 2),
        directions=config.get("directional_mode", "standard"),
        max_side=config["l_max"],
        filter_kind="full" if config.get("hyena2d_filter") else "product",
        window=_WINDOWS[config.get("window_mode", "standard")],
        sqrt_window=config.get("sqrt_decay", False),
        emb_dim=weights["filter_fn.pos_emb.z"].shape[-1],
        filter_width=weights[networks[0]].shape[-1],
        num_inner=config.get("num_inner_mlps", 2),
    ).to(recording.dtype)
    same = {"in_proj": "in_proj", "out_proj": "out_proj", "linear_mix": "copies", "filter_fn.bias": "skip"}
    same |= {"short_filter.weight": "short_weight", "short_filter.bias": "short_bias"}
    fill(mixer, renamed(weights, same) | _filter(weights))
    x = recording.leaf(f"in/{case}_x")
    grid = tuple(x.shape[1:3])
    y = mixer(x.flatten(1, 2), grid=grid).unflatten(1, grid)
    (y * recording[f"in/{case}_w"]).sum().backward()
    found = mixer.filter(grid).movedim(0, -1)[None]
    results = {f"out/{case}": y, f"grad/{case}_x": x.grad, f"out/{case}_filter": found}
    return {key: value for key, value in results.items() if key in recording}


def run(recording: Recording) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for case, config in recording.config.items():
        results |= _run(recording, case, config)
    return results
