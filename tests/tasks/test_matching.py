"""Models matched by work instead of parameters."""

from __future__ import annotations

import pytest

from attnlab.models.flops import count_flops
from attnlab.tasks import create_task, reference_model


def work(task, model) -> int:
    batch = next(task.eval_batches(1))
    return count_flops(lambda: batch.through(model.eval()))


@pytest.mark.parametrize("mixer", ["linear", "delta_net", "mamba", "sliding_window"])
def test_as_much_work_as_softmax(mixer):
    task = create_task("recall", eval_examples=4)
    softmax = reference_model(task, "softmax", parameters=20_000)
    found = reference_model(task, mixer, parameters=20_000, match="compute")
    assert work(task, found.model) == pytest.approx(work(task, softmax.model), rel=0.02)
    assert abs(found.relative_error) <= 0.02


def test_softmax_itself_stays_as_it_is():
    task = create_task("digits", patch=2)
    one, other = (reference_model(task, "softmax", match=match) for match in ("parameters", "compute"))
    assert (one.width, one.hidden, one.parameters) == (other.width, other.hidden, other.parameters)


def test_the_reference_models_options_can_be_changed():
    task = create_task("recall", eval_examples=4)
    assert reference_model(task, "softmax", dim=8).model.head is None
    assert reference_model(task, "softmax", dim=8, model_options={"tie_embeddings": False}).model.head is not None


def test_an_unknown_way_to_match_is_refused():
    with pytest.raises(ValueError, match="match: expected one of"):
        reference_model(create_task("recall", eval_examples=4), "softmax", match="time")
