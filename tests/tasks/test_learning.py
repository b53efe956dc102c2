"""At its default budget a task tells mechanisms from guessing, and every mixer fits its reference model."""

from __future__ import annotations

import pytest
import torch

import attnlab
from attnlab.core.errors import UnsupportedError
from attnlab.models import count_parameters
from attnlab.tasks import create_task, list_tasks, reference_model, tasks
from attnlab.training import train

# baselines that are no guesses: a model may be behind them
NOT_TRIVIAL = {
    "cab_nc": {"season"},
    "bigram_backcopy": {"source"},
    "in_context_regression": {"gradient_step", "debiased_gradient_step", "softmax_heads", "ridge"},
    "digits": {"nearest_centroid"},
}
# how far from the best trivial baseline towards a perfect score, at least
PART_OF_THE_WAY = {"gcog": 0.15, "listops": 0.1, "cab_ns": 0.1, "bigram_backcopy": 0.2, "stdlib_text": 0.05, "digits": 0.5}
GENERATED = [name for name in list_tasks() if not tasks.get(name).factory.source]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer", [pytest.param(name, marks=pytest.mark.tier("T5", f"mixer:{name}")) for name in ("softmax", "delta_net", "mamba")]
)
@pytest.mark.parametrize("name", GENERATED)
def test_the_default_budget_suffices_to_beat_guessing(name, mixer):
    task = create_task(name)
    budget = task.default_budget
    if "context_depth" in task.model_options and not attnlab.mixer_info(mixer).supports.cross:
        with pytest.raises(UnsupportedError, match="a second sequence"):
            reference_model(task, mixer)
        return
    model = reference_model(task, mixer).model
    result = train(
        model,
        task,
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rates[0],
        weight_decay=budget.weight_decay,
        warmup=budget.warmup,
        eval_split="test",
    )
    baselines = task.baselines("test")
    trivial = [value for key, value in baselines.items() if key not in NOT_TRIVIAL.get(name, ())]
    best, perfect = (max(trivial), 1.0) if task.higher_is_better else (min(trivial), 0.0)
    reached = (result.metrics[task.metric] - best) / (perfect - best)
    assert result.status == "finished"
    assert reached > PART_OF_THE_WAY.get(name, 0.3), (result.metrics, baselines)


# weights of each token's own, or tables: no width that the heads allow meets the budget
BEYOND = {
    "recall": {"heterogeneous", "hiformer", "extractor", "memoryformer"},
    "digits": {
        "heterogeneous",
        "hiformer",
        "extractor",
        "memoryformer",
        "kolmogorov_arnold",
        "tanh_map",
        "grassmann",
        "hyena",
        "morpmamba",
        "local_implicit",
        "short_context",
    },
    "stdlib_text": {"extractor"},
}


@pytest.mark.parametrize("mixer", attnlab.list_mixers())
@pytest.mark.parametrize("name", ["recall", "stdlib_text", "digits"])
def test_every_mixer_fits_the_reference_model_or_is_refused(name, mixer):
    task = create_task(name)
    if task.model == "causal_lm" and attnlab.mixer_info(mixer).supports.causal == "no":
        with pytest.raises(UnsupportedError, match=f"'{mixer}' does not support a causal language model"):
            reference_model(task, mixer)
        return
    if mixer in BEYOND[name]:
        with pytest.raises(ValueError, match="target: no width"):
            reference_model(task, mixer)
        return
    match = reference_model(task, mixer)
    batch = next(task.eval_batches(2))
    with torch.no_grad():
        logits = batch.through(match.model)
    assert torch.isfinite(logits).all()
    assert match.parameters == count_parameters(match.model)
    assert abs(match.relative_error) <= 0.02
