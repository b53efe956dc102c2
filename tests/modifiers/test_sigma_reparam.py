"""SigmaReparam by its definition, and what it does to a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnlab import apply_modifier, create_mixer, list_modifiers, modifier_info
from attnlab.core.errors import UnknownNameError
from attnlab.models import create_model

D = torch.float64


def _by_hand(weight: Tensor, gamma: Tensor, u: Tensor) -> tuple[Tensor, list[float], float]:
    """The effective weight, the next u and sigma, from one power iteration in plain numbers."""
    rows = weight.detach().flatten(1).tolist()
    v = [sum(w * x for w, x in zip(row, u.tolist(), strict=True)) for row in rows]
    length = sum(x * x for x in v) ** 0.5
    v = [x / length for x in v]
    new = [sum(rows[o][i] * v[o] for o in range(len(rows))) for i in range(len(u))]
    length = sum(x * x for x in new) ** 0.5
    new = [x / length for x in new]
    sigma = sum(v[o] * weight.flatten(1)[o, i] * new[i] for o in range(len(rows)) for i in range(len(u)))
    return gamma / sigma * weight, new, float(sigma.detach())


def _stir(layer: nn.Module) -> nn.Module:
    """Weights off their start, so that u is no singular vector and gamma no norm."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.tier("T2", "modifier:sigma_reparam")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_the_weight_is_its_definition(kind, training):
    layer, x, run = {
        "linear": (nn.Linear(5, 4, dtype=D), torch.randn(3, 5, dtype=D), F.linear),
        "conv1d": (nn.Conv1d(2, 4, 3, dtype=D), torch.randn(3, 2, 6, dtype=D), F.conv1d),
        "conv2d": (nn.Conv2d(4, 6, 2, groups=2, dtype=D), torch.randn(2, 4, 5, 4, dtype=D), F.conv2d),
    }[kind]
    apply_modifier(layer, "sigma_reparam")
    _stir(layer).train(training)
    part, raw = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    x.requires_grad_()
    before = part.u.clone(), part.sigma.clone()
    weight, u, sigma = _by_hand(raw, part.gamma, part.u)
    extra = {"groups": 2} if kind == "conv2d" else {}
    theirs, ours = run(x, weight, layer.bias, **extra), layer(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    leaves, direction = [x, raw, part.gamma, layer.bias], torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    stored = (torch.tensor(u, dtype=D), torch.tensor(sigma, dtype=D)) if training else before
    torch.testing.assert_close((part.u, part.sigma), stored, rtol=1e-12, atol=1e-14)


def test_keep_changes_nothing_at_the_start_and_follows_the_true_norm():
    model = nn.Sequential(nn.Linear(6, 8, dtype=D), nn.Tanh(), nn.Linear(8, 3, dtype=D))
    x = torch.randn(4, 6, dtype=D)
    before = model(x)
    assert apply_modifier(model, "sigma_reparam") is model
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    _stir(model)
    for _ in range(300):
        model(x)
    for layer in (model[0], model[2]):
        part, raw = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        true = torch.linalg.matrix_norm(raw, 2)
        torch.testing.assert_close(part.sigma, true.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), part.effective_norm.abs(), rtol=1e-9, atol=0)


def test_paper_starts_at_norm_one():
    layer = apply_modifier(nn.Linear(50, 40), "sigma_reparam", init="paper", init_std=0.02)
    raw = layer.parametrizations.weight.original
    assert float(raw.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, rel=1e-5)


def test_stats_only_tracks_and_leaves_the_weight():
    layer = apply_modifier(nn.Linear(6, 5, dtype=D), "sigma_reparam", stats_only=True)
    part, raw = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    with torch.no_grad():
        raw.mul_(3.0)
    old = part.sigma.clone()
    assert torch.equal(layer.weight, raw)
    torch.testing.assert_close(part.sigma, 3.0 * old, rtol=1e-12, atol=0)
    assert not list(part.parameters())


def test_one_power_iteration_a_training_step_and_none_in_evaluation():
    layer = _stir(apply_modifier(nn.Linear(6, 5, dtype=D), "sigma_reparam"))
    part, x = layer.parametrizations.weight[0], torch.randn(2, 6, dtype=D)
    seen = [part.u.clone()]
    layer.eval()
    first = layer(x)
    assert torch.equal(part.u, seen[0]) and torch.equal(layer(x), first)
    layer.train()
    for _ in range(2):
        _, u, _ = _by_hand(layer.parametrizations.weight.original, part.gamma, part.u)
        layer(x)
        torch.testing.assert_close(part.u, torch.tensor(u, dtype=D), rtol=1e-12, atol=1e-14)


def test_saved_loaded_copied_and_folded():
    mixer = _stir(apply_modifier(create_mixer("softmax", 8, 2), "sigma_reparam"))
    x = torch.randn(2, 5, 8)
    mixer(x)
    mixer.eval()
    other = apply_modifier(create_mixer("softmax", 8, 2), "sigma_reparam").eval()
    other.load_state_dict(mixer.state_dict(), strict=True)
    expected = mixer(x)
    assert torch.equal(other(x), expected) and torch.equal(copy.deepcopy(mixer)(x), expected)
    names = {name for name in mixer.state_dict() if name.startswith("q_proj.")}
    inside = {"original", "0.gamma", "0.u", "0.sigma"}
    assert names == {f"q_proj.parametrizations.weight.{name}" for name in inside}
    for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(mixer(x), expected)


def test_sigma_is_computed_in_float32_under_autocast():
    layer = _stir(apply_modifier(nn.Linear(64, 48), "sigma_reparam")).eval()
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, plain)
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


def test_half_precision_and_the_meta_device():
    half = apply_modifier(nn.Linear(6, 5, dtype=torch.bfloat16), "sigma_reparam")
    assert half(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert apply_modifier(nn.Linear(6, 5, device="meta"), "sigma_reparam")(torch.empty(2, 6, device="meta")).shape == (2, 5)


def test_norms_go_and_stay_as_asked():
    options = {"qk_norm": "layer_norm"}
    model = create_model(
        "encoder", mixer="softmax", dim=8, depth=2, num_heads=2, num_classes=3, vocab_size=5, max_length=4, mixer_options=options
    )

    def norms() -> set[str]:
        return {name for name, part in model.named_modules() if type(part).__name__ == "LayerNorm"}

    mixers = {name for name in norms() if name.endswith(("q_norm", "k_norm"))}
    assert mixers and norms() > mixers
    assert apply_modifier(model, "remove_norms", keep=("*.q_norm", "*.k_norm")) is model
    assert norms() == mixers
    apply_modifier(model, "remove_norms")
    assert norms() == set()


@pytest.mark.tier("T2", "modifier:remove_norms")
def test_without_norms_the_input_passes():
    plain = nn.Sequential(nn.LayerNorm(4), nn.ModuleList([nn.RMSNorm(4), nn.BatchNorm1d(4)]))
    apply_modifier(plain, "remove_norms")
    x = torch.randn(2, 3, 4)
    assert torch.equal(plain[0](x), x) and torch.equal(plain[1][0](x), x)
    assert isinstance(plain[1][1], nn.BatchNorm1d)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.equal(plain[0](x, mask), x * mask[..., None])
    assert torch.equal(apply_modifier(nn.LayerNorm(4), "remove_norms")(x), x)


def test_the_registry_and_its_refusals():
    assert {"sigma_reparam", "remove_norms"} <= set(list_modifiers())
    assert modifier_info("sigma_reparam").paper == "sigma-reparam"
    with pytest.raises(UnknownNameError, match="'sigma_reparam'"):
        apply_modifier(nn.Linear(2, 2), "sigma_repram")
    with pytest.raises(UnknownNameError, match="'init_std'"):
        apply_modifier(nn.Linear(2, 2), "sigma_reparam", std=1.0)
    with pytest.raises(TypeError, match="module"):
        apply_modifier("model", "sigma_reparam")
    with pytest.raises(ValueError, match="init: expected 'keep' or 'paper', got 'random'"):
        apply_modifier(nn.Linear(2, 2), "sigma_reparam", init="random")
    with pytest.raises(ValueError, match="init_std: expected a positive number"):
        apply_modifier(nn.Linear(2, 2), "sigma_reparam", init="paper", init_std=0.0)
    with pytest.raises(ValueError, match="module: expected a linear or convolutional layer"):
        apply_modifier(nn.Tanh(), "sigma_reparam")
    with pytest.raises(ValueError, match="module: expected plain weights"):
        apply_modifier(apply_modifier(nn.Linear(2, 2), "sigma_reparam"), "sigma_reparam")
