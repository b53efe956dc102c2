"""Matrices of trained models as small images."""

from __future__ import annotations

import base64

import numpy as np
import torch

from attnlab.compare.matrices import LARGEST, matrices
from attnlab.tasks import create_task, reference_model


def decoded(image):
    values = np.frombuffer(base64.b64decode(image["data"]), dtype=np.int8).reshape(image["rows"], image["columns"])
    return values * image["largest"] / 127


def model_and_batch(mixer, seq_len=24, **options):
    task = create_task("recall", seq_len=seq_len, eval_examples=2)
    return reference_model(task, mixer, dim=8, depth=2, **options).model.eval(), next(task.eval_batches(1))


def test_every_layer_has_its_matrix():
    model, batch = model_and_batch("softmax")
    found = matrices(model, batch)
    assert [image["layer"] for image in found] == ["blocks.0.mixer", "blocks.1.mixer"]
    for image in found:
        values = decoded(image)
        assert image["group"] == 1 and values.shape == (24, 24)
        np.testing.assert_allclose(values.sum(1), 1.0, atol=0.15)
        assert (np.triu(values, 1) == 0).all()


def test_it_is_the_matrix_that_the_layer_uses():
    model, batch = model_and_batch("delta_net")
    seen = {}
    hook = model.blocks[0].mixer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    batch.through(model)
    hook.remove()
    with torch.no_grad():
        expected = model.blocks[0].mixer.mixing_matrix(seen["x"])[0].mean(0).numpy()
    np.testing.assert_allclose(decoded(matrices(model, batch)[0]), expected, atol=np.abs(expected).max() / 127)


def test_long_sequences_are_shown_in_groups_whose_rows_keep_their_sums():
    model, batch = model_and_batch("softmax", seq_len=200)
    image = matrices(model, batch)[0]
    assert image["group"] == 4 and image["rows"] == image["columns"] == 50 <= LARGEST
    np.testing.assert_allclose(decoded(image).sum(1), 1.0, atol=0.3)


def test_without_a_matrix_there_is_no_image():
    task = create_task("digits", patch=2)
    model = reference_model(task, "focal_modulation", dim=8, depth=1).model.eval()
    batch = next(task.eval_batches(1))
    assert not model.blocks[0].mixer.supports.mixing_matrix and matrices(model, batch) == []
