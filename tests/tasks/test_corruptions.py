"""Corruptions: in range, from the generator alone, stronger with severity, and the errors that they cause."""

from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import UnknownNameError
from attnlab.tasks import corruptions as C
from attnlab.tasks import create_task, reference_model


def images(channels=1, count=4):
    """Smooth blobs and an edge, where every corruption has something to change."""
    place = torch.linspace(0, 1, 16)
    blob = torch.exp(-8 * ((place[:, None] - 0.4) ** 2 + (place - 0.6) ** 2))
    edge = (place > 0.5).float().expand(16, 16)
    both = torch.stack([0.6 * blob + 0.3 * edge, 0.8 * edge * blob + 0.1])[torch.arange(count) % 2]
    return both[:, None].repeat(1, channels, 1, 1)


def changed(name, severity, x, seed=0):
    return C.corrupt(x, name, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", C.SETTINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_images_and_repeat_with_the_generator(name, channels):
    if name == "jpeg":
        pytest.importorskip("PIL")
    x = images(channels)
    before = x.clone()
    y = changed(name, 3, x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.min() >= 0 and y.max() <= 1
    assert torch.equal(x, before) and not torch.equal(x, y)
    assert torch.equal(y, changed(name, 3, x))


@pytest.mark.parametrize("name", sorted({*C.SETTINGS} - {"glass_blur", "elastic", "pixelate", "jpeg"}))
def test_the_severest_is_stronger_than_the_mildest(name):
    x = images(count=32)
    mild, severe = ((changed(name, level, x) - x).square().mean() for level in (1, 5))
    assert severe > mild > 0 or (name == "defocus_blur" and severe > mild)


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur", "contrast", "pixelate", "glass_blur", "elastic"])
def test_flat_images_have_nothing_to_blur(name):
    flat = torch.full((3, 1, 16, 16), 0.4)
    torch.testing.assert_close(changed(name, 5, flat), flat, rtol=1e-5, atol=1e-6)


def test_noise_has_the_strength_of_its_setting():
    grey = torch.full((8, 1, 64, 64), 0.5)
    assert changed("gaussian_noise", 5, grey).std() == pytest.approx(0.10, rel=0.05)
    assert changed("shot_noise", 5, grey).std() == pytest.approx((0.5 / 50) ** 0.5, rel=0.05)
    hit = changed("impulse_noise", 5, grey) != 0.5
    assert hit.float().mean() == pytest.approx(0.07, rel=0.1)


def test_simple_corruptions_by_hand():
    x = torch.tensor([[0.0, 0.5], [0.25, 0.25]]).view(1, 1, 2, 2)
    torch.testing.assert_close(changed("contrast", 2, x), torch.tensor([[0.125, 0.375], [0.25, 0.25]]).view(1, 1, 2, 2))
    torch.testing.assert_close(changed("brightness", 2, x), x + 0.1)
    colour = torch.tensor([0.4, 0.2, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(changed("brightness", 4, colour), colour * 1.5)


def test_glass_only_moves_pixels_where_it_hardly_blurs():
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = changed("glass_blur", 1, x)
    assert torch.allclose(x.flatten(1).sort().values, y.flatten(1).sort().values) and not torch.equal(x, y)


def test_plasma_is_smoother_with_more_decay_and_spans_its_range():
    def roughness(decay):
        maps = C.plasma(50, 32, decay, torch.Generator().manual_seed(0))
        assert maps.shape == (50, 32, 32) and maps.amin() == 0 and maps.amax() == 1
        return (maps - maps.roll(1, 2)).abs().mean()

    assert roughness(3.0) < roughness(1.75)


def test_errors_of_a_model_at_five_severities():
    task = create_task("digits", patch=2)
    model = reference_model(task, "softmax", dim=8, depth=1).model
    errors = C.corruption_errors(model, task, names=["gaussian_noise", "contrast"])
    assert {name: len(values) for name, values in errors.items()} == {"clean": 1, "gaussian_noise": 5, "contrast": 5}
    wrong = sum(float((model(batch.inputs).argmax(-1) != batch.targets).sum()) for batch in task.eval_batches(64, "test"))
    assert errors["clean"][0] == pytest.approx(wrong / 360, abs=1.1 / 360)
    assert errors == C.corruption_errors(model, task, names=["gaussian_noise", "contrast"])


def test_the_mean_is_relative_to_a_baseline():
    errors = {"clean": [0.1], "fog": [0.2] * 5, "jpeg": [0.3] * 5}
    baseline = {"clean": [0.2], "fog": [0.4] * 5, "jpeg": [0.3] * 5}
    assert C.mean_corruption_error(errors, baseline)[0] == pytest.approx((0.5 + 1.0) / 2)
    assert C.mean_corruption_error(errors, baseline, relative=True)[1] == pytest.approx({"fog": 0.5, "jpeg": 2.0})
    with pytest.raises(ValueError, match="expected the same corruptions"):
        C.mean_corruption_error(errors, {"clean": [0.1]})
    with pytest.raises(ValueError, match="expected errors to compare with under 'fog'"):
        C.mean_corruption_error(errors, {**baseline, "fog": [0.0] * 5})


def test_bad_input():
    with pytest.raises(UnknownNameError, match="'contrast'"):
        changed("contrst", 1, images())
    with pytest.raises(ValueError, match="severity: expected 1 to 5, got 0"):
        changed("fog", 0, images())
