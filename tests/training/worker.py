"""A training run, in one process or as one of several that torchrun starts: ``worker.py OUT CHECKPOINT NAME=VALUE ...``."""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.nn.functional as F

from attnlab.tasks import create_task, reference_model
from attnlab.tasks.contract import IGNORE
from attnlab.training import train
from attnlab.training.distributed import make_accelerator


def ragged(task):
    """The task with a loss in the dtype of the model, on fewer targets in some examples than in others."""

    class Ragged(type(task)):
        def loss(self, logits, batch):
            return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORE)

        def train_batches(self, batch_size, generator):
            for batch in super().train_batches(batch_size, generator):
                targets = batch.targets.clone()
                targets[: batch_size // 2, targets.shape[1] // 2 :] = IGNORE
                targets[0] = IGNORE  # a piece of one example has none at all
                yield type(batch)(batch.inputs, targets, batch.mask)

    task.__class__ = Ragged
    return task


def main(out, checkpoint, slow=0.0, dtype="float32", drop=0.0, **options):
    torch.set_num_threads(1)
    accelerator = make_accelerator(cpu=True) if "LOCAL_RANK" in os.environ else None
    task = ragged(create_task("recall", seq_len=16, num_pairs=2, vocab_size=16, eval_examples=20))
    rank = 0 if accelerator is None else accelerator.process_index
    # Another seed on every rank: all begin as the main process does.
    model = reference_model(task, "linear", dim=16, depth=2, seed=rank, dtype=getattr(torch, dtype)).model
    for block in model.blocks:
        block.mixer_residual.drop_path = drop
    if "autocast" in options:
        options["autocast"] = getattr(torch, options["autocast"])
    found = train(
        model,
        task,
        **{"steps": 24, "batch_size": 32, "learning_rate": 1e-2, "log_every": 1, "eval_batch_size": 6, **options},
        checkpoint=None if checkpoint == "-" else checkpoint,
        callback=lambda row: time.sleep(slow),
        accelerator=accelerator,
    )
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, f"{out}.{rank}.pt")
    facts = {
        "status": found.status,
        "losses": [row.loss for row in found.history],
        "norms": [row.gradient_norm for row in found.history],
        "metrics": found.metrics,
    }
    with open(f"{out}.{rank}.json", "w", encoding="utf-8") as file:
        json.dump(facts, file)
    if accelerator is not None:
        accelerator.end_training()


def parse(text):
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], **dict(map(parse, sys.argv[3:])))
