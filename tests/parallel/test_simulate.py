"""Sequence parallelism in one process: against LASP-2's equations, against the whole sequence, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import UnsupportedError, create_mixer
from attnlab.core.catalog import mixers
from attnlab.models import create_model
from attnlab.parallel import (
    Traffic,
    create_parallelism,
    list_parallelisms,
    parallelism_info,
    restore,
    simulate,
)
from attnlab.parallel.packing import Kind, pack, unpack
from attnlab.parallel.shards import even_lengths
from attnlab.parallel.simulation import SimulatedRanks
from golden.recording import FOLDER, load

DIM, HEADS = 8, 2
PROVES = pytest.mark.tier("T2", "parallelism:sequence_parallel")


def build(name: str, *, causal: bool = True, **options: object) -> attnlab.Mixer:
    return create_mixer(name, DIM, num_heads=HEADS, causal=causal, dtype=torch.float64, **options)


def heads(x: torch.Tensor) -> torch.Tensor:
    """(b, n, h d) as (b, h, n, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def pieces_of(n: int, cuts: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(sorted({0, n, *cuts}))]


def assert_pieces_are_the_whole(module, inputs, lengths, mask=None) -> None:
    """Outputs and all gradients."""
    floating = inputs.is_floating_point()
    masks = None if mask is None else mask.split(lengths, 1)
    results = []
    weights = torch.randn_like(module(inputs, mask=mask)) * (1 if mask is None else mask[..., None])
    for run in (lambda x: module(x, mask=mask), lambda x: torch.cat(simulate(module, x.split(lengths, 1), masks), 1)):
        x = inputs.detach().requires_grad_(floating)
        leaves = [*([x] if floating else []), *module.parameters()]
        y = run(x) * (weights != 0)
        results.append((y, *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)))
    for whole, parts in zip(*results, strict=True):
        assert (whole is None) == (parts is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)


def definition(q, k, v, lengths, causal) -> torch.Tensor:
    """LASP-2, forward: M_t = K_t^T V_t; O_t = tril(Q_t K_t^T) V_t + Q_t sum_{s<t} M_s, or Q_t sum_s M_s."""
    split = [t.split(lengths, 2) for t in (q, k, v)]
    states = [key.mT @ value for key, value in zip(*split[1:], strict=True)]
    outputs = []
    for t, (query, key, value) in enumerate(zip(*split, strict=True)):
        seen = torch.zeros_like(states[0])
        for s in range(t if causal else len(lengths)):
            seen = seen + states[s]
        inner = (query @ key.mT).tril() @ value if causal else 0.0
        outputs.append(inner + query @ seen)
    return torch.cat(outputs, 2)


def backward_of_the_paper(q, k, v, grad, lengths):
    """LASP-2, backward of the causal form: dM_t = Q_t^T dO_t, prefix sums for dQ, suffix sums of dM for dK and dV."""
    split = list(zip(*(t.split(lengths, 2) for t in (q, k, v, grad)), strict=True))
    states = [key.mT @ value for _, key, value, _ in split]
    changes = [query.mT @ out for query, _, _, out in split]
    results = []
    for t, (query, key, value, out) in enumerate(split):
        before = sum(states[:t], torch.zeros_like(states[0]))
        after = sum(changes[t + 1 :], torch.zeros_like(states[0]))
        reads = (out @ value.mT).tril()
        results.append(
            (
                reads @ key + out @ before.mT,
                reads.mT @ query + value @ after.mT,
                (query @ key.mT).tril().mT @ out + key @ after,
            )
        )
    return [torch.cat(parts, 2) for parts in zip(*results, strict=True)]


@PROVES
@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 7, 1, 3], [12]])
def test_values_and_gradients_are_those_of_lasp2(lengths) -> None:
    mixer = build("lightning", decay="none")
    mixer.out_proj.weight.data = torch.eye(DIM, dtype=torch.float64)
    x = torch.randn(2, 12, DIM, dtype=torch.float64, requires_grad=True)
    weights = mixer.in_proj.weight.detach().chunk(3)
    q, k, v = (heads(x.detach() @ weight.T) for weight in weights)
    mixed = definition(q, k, v, lengths, causal=True).requires_grad_()
    flat = mixed.transpose(1, 2).flatten(2)
    expected = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = torch.cat(simulate(mixer, x.split(lengths, 1)), 1)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(y)
    (of_mixed,) = torch.autograd.grad((expected * upstream).sum(), mixed)
    (of_x,) = torch.autograd.grad((y * upstream).sum(), x)
    by_hand = backward_of_the_paper(q, k, v, of_mixed, lengths)
    wanted = sum(grad.transpose(1, 2).flatten(2) @ weight for grad, weight in zip(by_hand, weights, strict=True))
    torch.testing.assert_close(of_x, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("decay", "key"), [("none", "out/o_no_decay"), ("alibi", "out/o_decay")])
def test_operators_are_those_that_the_authors_of_lightning_attention_recorded(decay, key) -> None:
    recording = load("lightning-attention-2", FOLDER / "lightning-attention-2" / "open.npz")
    n, width = recording["in/q"].shape[2], recording["in/q"].shape[1] * recording["in/q"].shape[3]
    assert n == width, "tokens are unit vectors, so that projections can be what was recorded"
    for example, expected in enumerate(recording[key]):
        mixer = create_mixer("lightning", width, num_heads=len(expected), decay=decay, dtype=torch.float64)
        flat = [recording[f"in/{name}"][example].transpose(0, 1).flatten(1) for name in ("q", "k", "v")]
        mixer.in_proj.weight.data = torch.cat([t.T for t in flat])
        with attnlab.record(mixer, only=["mixed"]) as tape:
            simulate(mixer, torch.eye(n, dtype=torch.float64)[None].split([10, 1, 15, 6], 1))
        mixed = torch.cat(tape.items["mixed"], 2)[0]
        bound = 8 * recording.rounding[key] * float(expected.abs().max())
        torch.testing.assert_close(mixed, expected, rtol=0.0, atol=bound)


@PROVES
@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_with_a_denominator_is_that_of_lasp2_with_ones(causal) -> None:
    mixer, lengths = build("linear", causal=causal, feature_map="relu"), [3, 1, 5]
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    q, k, v = (heads(layer(x)) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    sums = definition(q.relu(), k.relu(), torch.cat((v, torch.ones_like(v[..., :1])), -1), lengths, causal)
    mixed = torch.where(sums[..., -1:] == 0, 0.0, sums[..., :-1] / sums[..., -1:].clamp_min(1e-300))
    expected = mixer.out_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat(simulate(mixer, x.split(lengths, 1)), 1), expected, rtol=1e-9, atol=1e-10)


@PROVES
def test_softmax_layers_are_those_of_lasp2h() -> None:
    mixer, lengths = build("softmax"), [2, 1, 4]
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    q, k, v = (heads(layer(x)) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    rows = []
    for i in range(7):
        weights = (q[:, :, i : i + 1] @ k[:, :, : i + 1].mT * (DIM // HEADS) ** -0.5).softmax(-1)
        rows.append(weights @ v[:, :, : i + 1])
    expected = mixer.out_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat(simulate(mixer, x.split(lengths, 1)), 1), expected, rtol=1e-9, atol=1e-10)


COMBINABLE = mixers.names(associative=True)


@pytest.mark.parametrize("name", COMBINABLE)
def test_every_mixer_that_sums_up_pieces_can_be_split(name) -> None:
    info = mixers.info(name)
    options = {"dim": DIM, "num_heads": HEADS, **dict(info.example), "dtype": torch.float64}
    if info.supports.causal == "optional":
        options["causal"] = True
    mixer = mixers.create(name, **options).eval()
    x = torch.randn(2, 14, DIM, dtype=torch.float64)
    assert_pieces_are_the_whole(mixer, x, [5, 1, 1, 7])
    if info.supports.mask:
        assert_pieces_are_the_whole(mixer, x, [5, 1, 1, 7], torch.rand(2, 14) > 0.4)


@settings(max_examples=40)
@given(
    name=st.sampled_from(["linear", "lightning", "delta_net", "mamba", "softmax", "sliding_window"]),
    cuts=st.lists(st.integers(1, 16), max_size=6),
    masked=st.booleans(),
)
def test_any_split_gives_the_same(name, cuts, masked) -> None:
    mixer, x = build(name), torch.randn(2, 17, DIM, dtype=torch.float64)
    mask = torch.rand(2, 17) > 0.4 if masked else None
    lengths = pieces_of(17, cuts)
    parts = simulate(mixer, x.split(lengths, 1), None if mask is None else mask.split(lengths, 1))
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x, mask=mask), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softmax", {"position": "rotary", "num_kv_heads": 1}),
        ("softmax", {"position": "learned", "position_options": {"max_length": 12}}),
        ("softmax", {"normalizer": "softmax_plus_one"}),
        ("linear", {}),
        ("taylor_softmax", {}),
    ],
)
def test_positions_begin_where_the_piece_does_with_and_without_causality(name, options, causal) -> None:
    mixer, x = build(name, causal=causal, **options), torch.randn(2, 12, DIM, dtype=torch.float64)
    for mask in (None, torch.rand(2, 12) > 0.3):
        assert_pieces_are_the_whole(mixer, x, [4, 1, 7], mask)


def test_a_mask_on_one_rank_alone_leaves_the_others_real() -> None:
    mixer, x = build("mamba"), torch.randn(2, 9, DIM, dtype=torch.float64)
    own = torch.tensor([[True, False, True], [False, True, True]])
    whole = torch.cat((torch.ones(2, 3, dtype=torch.bool), own, torch.ones(2, 3, dtype=torch.bool)), 1)
    parts = simulate(mixer, x.split(3, 1), [None, own, None])
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x, mask=whole), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("layers", "position"),
    [
        ({"mixer": ["lightning", "softmax", "delta_net", "mamba"], "short_conv": 4}, "none"),
        ({"schedule": "quarter_softmax", "mixer_options": {"softmax": {"position": "rotary"}}}, "sinusoidal"),
        ({"schedule": "delta_hybrid", "mixer_options": {"sliding_window": {"window": 3}}, "parallel": True}, "learned"),
    ],
)
def test_a_model_of_any_layers_takes_pieces(layers, position) -> None:
    model = create_model(
        "causal_lm",
        vocab_size=11,
        dim=DIM,
        depth=4,
        num_heads=HEADS,
        position=position,
        max_length=16,
        dtype=torch.float64,
        **layers,
    )
    before = {**model.state_dict()}
    ids = torch.randint(11, (2, 14))
    assert_pieces_are_the_whole(model, ids, [5, 1, 1, 7])
    assert_pieces_are_the_whole(model, ids, [5, 1, 1, 7], torch.rand(2, 14) > 0.3)
    assert before.keys() == model.state_dict().keys()
    assert not any("forward" in vars(part) for part in model.modules())


def test_one_header_a_pass_serves_all_layers_of_a_model() -> None:
    model = create_model("causal_lm", vocab_size=11, dim=DIM, depth=3, num_heads=HEADS, mixer="lightning")
    simulate(model, torch.randint(11, (1, 8)).split(4, 1), traffic=(traffic := Traffic()))
    assert (traffic.calls("header"), traffic.calls("summary")) == (2 * 2, 3 * 2)  # parameters are compared once more


def test_bytes_do_not_depend_on_the_length_but_for_softmax() -> None:
    sent = {}
    for name, n in itertools.product(("linear", "delta_net", "mamba", "softmax"), (8, 64)):
        simulate(build(name), torch.randn(1, n, DIM, dtype=torch.float64).split(n // 4, 1), traffic=(traffic := Traffic()))
        sent[name, n] = traffic.bytes("summary") + traffic.bytes("halo")
    for name in ("linear", "delta_net", "mamba"):
        assert sent[name, 8] == sent[name, 64]
    assert sent["softmax", 64] == 8 * sent["softmax", 8] == 4 * 3 * 2 * 16 * DIM * 8  # ranks, receivers, k and v
    # 4 ranks hand 3 others two states (4, 5) of 8 bytes, as the card's B h d^2 W says
    assert sent["linear", 8] == 4 * 3 * HEADS * 4 * 5 * 8


def test_dtypes_and_autocast_are_carried_as_they_are() -> None:
    tensors = [
        torch.randn(3, 2).bfloat16(),
        torch.randn(2, 5).T,
        torch.tensor([True, False]),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.zeros(2, 0),
        torch.tensor(7),
    ]
    message = pack(tensors, torch.device("cpu"))
    for got, expected in zip(unpack(message, [Kind.of(t) for t in tensors], torch.device("cpu")), tensors, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected.resolve_conj())
    mixer, x = create_mixer("linear", DIM, num_heads=HEADS, causal=True), torch.randn(1, 6, DIM)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole, parts = mixer(x), torch.cat(simulate(mixer, x.split(2, 1)), 1)
    assert parts.dtype == whole.dtype == torch.bfloat16 and not parts.requires_grad
    torch.testing.assert_close(parts, whole, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("pooling", {"causal": False}, "depends on the state before it.*Mechanisms that do: .*"),
        ("softmax", {"causal": False, "position": "alibi"}, "pairs of a query and a key.*'rotary'"),
        ("softmax", {"causal": False, "position": "lepe", "position_options": {"rank": 1}}, "pairs of a query and a key"),
        ("sliding_window", {"causal": False}, "keys must stand in order.*Mechanisms that do: "),
    ],
)
def test_what_cannot_be_split_is_refused(name, options, why) -> None:
    mixer = create_mixer(name, DIM, num_heads=HEADS, **options)
    with pytest.raises(UnsupportedError, match=f"sequence parallelism.*{why}"):
        simulate(mixer, torch.randn(1, 4, DIM).split(2, 1))


def test_a_mixer_whose_pieces_do_not_make_the_whole_without_causality_is_refused() -> None:
    class Centred(mixers.get("softmax").factory):
        """Softmax attention on tokens without their mean, which no summary holds."""

        def mix(self, x, context, masks, grid):
            return super().mix(x if self.causal else x - x.mean(1, keepdim=True), context, masks, grid)

    x = torch.randn(1, 4, DIM)
    assert len(simulate(Centred(DIM, HEADS, causal=True), x.split(2, 1))) == 2
    with pytest.raises(UnsupportedError, match="not that of sums over pieces"):
        simulate(Centred(DIM, HEADS), x.split(2, 1))


def language_model(**options: object) -> torch.nn.Module:
    return create_model("causal_lm", vocab_size=5, dim=DIM, depth=2, num_heads=HEADS, mixer="lightning", **options)


def test_what_couples_tokens_in_a_model_is_refused() -> None:
    ids = torch.randint(5, (1, 4)).split(2, 1)
    encoder = create_model("encoder", num_classes=2, dim=DIM, depth=1, mixer="linear", vocab_size=5, max_length=4)
    with pytest.raises(UnsupportedError, match="its output is of all tokens"):
        simulate(encoder, ids)
    with pytest.raises(UnsupportedError, match=r"'blocks.1' does not support.*stochastic depth"):
        simulate(language_model(drop_path=0.2), ids)
    with pytest.raises(UnsupportedError, match="reads a token's neighbours, or all tokens"):
        simulate(torch.nn.Sequential(encoder.blocks[0].mixer, create_group_norm()), ids)
    with pytest.raises(ValueError, match="expected mixers in it, got Linear without any"):
        simulate(torch.nn.Linear(2, 2), ids)
    with pytest.raises(ValueError, match="expected one that parallelize has changed"):
        restore(encoder)
    assert "forward" not in vars(encoder.blocks[0].mixer)


def create_group_norm() -> torch.nn.Module:
    from attnlab.models import create_norm

    return create_norm("group_norm", DIM)


def test_errors_of_one_rank_end_all_of_them() -> None:
    mixer, x = build("linear"), torch.randn(2, 6, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x: expected width 8, got 7 .*on rank 1 of 2"):
        simulate(mixer, [x, x[..., :7]])
    with pytest.raises(ValueError, match="batch: expected the same on every rank, got 2 on rank 0, 1 on rank 1"):
        simulate(mixer, [x, x[:1]])
    with pytest.raises(ValueError, match="pieces: expected at least one"):
        simulate(mixer, [])
    with pytest.raises(ValueError, match="masks: expected 2, one a piece, got 1"):
        simulate(mixer, x.split(3, 1), [None])
    with pytest.raises(ValueError, match=r"tokens: expected ids \(batch, n\)"):
        simulate(language_model(), [torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)])
    ranks: SimulatedRanks[int] = SimulatedRanks(2)
    with pytest.raises(RuntimeError, match=r"expected all at the same collective, got \['the end', 'a'\]"):
        ranks.run([lambda: 1, lambda: len(ranks.gather("a", []).pieces)])
    with pytest.raises(ValueError, match="at least a token for each of 3 ranks, got 2"):
        even_lengths(2, 3)


def test_a_parallel_layer_of_a_model_refuses_what_it_would_get_wrong() -> None:
    from attnlab.parallel.model import parts_of, spread

    model = language_model()
    copied = copy.deepcopy(model)
    spread(model, parts_of(model), SimulatedRanks(1))
    with pytest.raises(ValueError, match="parallel already"):
        spread(model, parts_of(model), SimulatedRanks(1))
    mixer, x = model.blocks[0].mixer, torch.randn(1, 4, DIM)
    with pytest.raises(UnsupportedError, match="mixing_matrix in sequence parallelism"):
        mixer.mixing_matrix(x)
    with pytest.raises(UnsupportedError, match="packed in sequence parallelism"):
        mixer.packed(x[0], torch.tensor([0, 4]))
    with pytest.raises(UnsupportedError, match="pair_mask in sequence parallelism"):
        mixer(x, pair_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="a grid in sequence parallelism"):
        mixer(x, grid=(2, 2))
    ids = torch.randint(5, (1, 4))
    torch.testing.assert_close(restore(model)(ids), copied(ids) if same_weights(model, copied) else None)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_registry_knows_it() -> None:
    assert list_parallelisms("seq*") == ["sequence_parallel"]
    assert parallelism_info("sequence_parallel").paper == "lasp2"
    with pytest.raises(RuntimeError, match="torchrun"):
        create_parallelism("sequence_parallel", build("linear"))
