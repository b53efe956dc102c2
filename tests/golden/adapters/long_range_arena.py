"""The generators of ListOps and Pathfinder, the learning rates, and the table of positions."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from attnlab.models.embedding import interleaved_sinusoids
from attnlab.tasks.lra.canvas import Canvas
from attnlab.tasks.lra.contours import end_points, end_weights
from attnlab.tasks.lra.drawing import Pen, disc
from attnlab.tasks.lra.listops_trees import ListOpsSettings, accepted_trees, source_text
from attnlab.tasks.lra.pathfinder_images import PathfinderGenerator
from attnlab.tasks.lra.pathfinder_settings import PATHFINDER
from attnlab.training.rates import cosine_cycle_factor, rsqrt_factor
from golden.recording import Recording, codes

PROVES = ("task:listops", "task:pathfinder")
RATES = {
    "listops": lambda step: 0.05 * rsqrt_factor(step, 1000),
    "text_matching": lambda step: 0.05 * rsqrt_factor(step, 8000),
    "cifar": lambda step: 0.0005 * cosine_cycle_factor(step, 175, 35_000),
    "pathfinder32": lambda step: 0.001 * cosine_cycle_factor(step, 312, 62_400),
}
LINE_ANGLES = {"open": 0.9, "held": -2.1}


def _listops(recording: Recording, name: str) -> dict[str, Tensor]:
    seed, count, *sizes = recording[f"in/{name}_args"].tolist()
    trees = list(islice(accepted_trees(random.Random(seed), ListOpsSettings(*sizes)), count))
    ids = torch.zeros(count, max(len(tree) for tree, _ in trees), dtype=torch.uint8)
    for row, (tree, _) in zip(ids, trees, strict=True):
        row[: len(tree)] = torch.tensor(tree)
    results = {
        f"out/{name}_ids": ids,
        f"out/{name}_len": torch.tensor([len(tree) for tree, _ in trees]),
        f"out/{name}_label": torch.tensor([value for _, value in trees]),
    }
    if f"out/{name}_source" in recording:
        results[f"out/{name}_source"] = codes([source_text(tree) for tree, _ in trees])
    return results


def _images(recording: Recording, name: str) -> dict[str, Tensor]:
    seed, size = int(recording[f"in/{name}_seed"]), int(name.removeprefix("pathfinder"))
    generator, numbers, shuffler = PathfinderGenerator(PATHFINDER[size]), np.random.RandomState(seed), random.Random(seed)
    drawn = [generator.draw(numbers, shuffler) for _ in recording[f"out/{name}_label"]]
    return {
        f"out/{name}_image": torch.from_numpy(np.stack([image for image, _ in drawn])),
        f"out/{name}_label": torch.tensor([label for _, label in drawn]),
    }


def _parts(recording: Recording) -> dict[str, Tensor]:
    points, angles = end_points((16, 15), 3, 32)
    taken = np.zeros((32, 32))
    taken[10:14, 10:14] = 1.0
    weights = end_weights(angles, 1.0 - taken[points[:, 0], points[:, 1]], 0.4, 1.0)
    assert weights is not None
    pen = Pen(2, 0.5, 1, 2)
    canvas, stroke = Canvas(32, pen, 1), pen.stroke(LINE_ANGLES[recording.name])
    canvas.draw(stroke, (15, 17), 1.5)
    mask = np.zeros((32, 32))
    mask[15 - pen.half : 16 + pen.half, 17 - pen.half : 18 + pen.half] = stroke.mask
    arrays = {"cmf_coords": points, "cmf_orient": angles, "cmf_pmf": weights, "line_image": canvas.image, "line_mask": mask}
    return {f"out/{key}": torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def _sinusoids(key: str, dtype: torch.dtype) -> Tensor:
    length, dim = (int("".join(filter(str.isdigit, part))) for part in key.split("_")[-2:])
    return interleaved_sinusoids(torch.arange(length)[None], dim, dtype)[0]


def run(recording: Recording) -> dict[str, Tensor]:
    results = _parts(recording)
    for key in recording.tensors:
        name = key.partition("_")[2]
        if key.startswith("out/disc_margin"):
            results[key] = torch.from_numpy(disc(int(key.removeprefix("out/disc_margin"))))
        elif key.startswith("out/lr_"):
            results[key] = torch.tensor([RATES[name](step) for step in recording["in/steps"].tolist()], dtype=recording.dtype)
        elif key.startswith("out/sinusoid"):
            results[key] = _sinusoids(key, recording.dtype)
        elif key.startswith("in/listops") and key.endswith("_args"):
            results |= _listops(recording, key.removeprefix("in/").removesuffix("_args"))
        elif key.startswith("in/pathfinder"):
            results |= _images(recording, key.removeprefix("in/").removesuffix("_seed"))
    return results
