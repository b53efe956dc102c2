"""The contract of an objective: what a model recorded in a forward pass, to a scalar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.info import Info
from attnlab.core.record import Tape


class Objective(nn.Module):
    r"""A scalar to be added to a task's loss, read from what mixers emit; a subclass implements `measure`.

    ::

        objective = attnlab.objectives.create_objective("attention_diversity")
        with attnlab.record(model, only=[objective.reads]) as tape:
            loss = task_loss(model(x, mask=mask)) + 1.0 * objective(tape, mask=mask)
        loss.backward()

    The tensors keep their history, so that the gradient reaches the parameters that made them. ``reads`` is the name under
    which mixers emit what the objective is about.
    """

    info: ClassVar[Info]
    reads: ClassVar[str] = "attention"

    def forward(self, recorded: Tape | Sequence[Tensor], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        """The objective over all layers.

        Args:
            recorded: what `attnlab.record` collected, or the tensors themselves, one a layer.
            mask: (b, n), True marks a real token, as the model had it.

        Raises:
            ValueError: if there is nothing to read, or the recording was detached and so has no gradient.
        """
        if isinstance(recorded, Tape):
            if recorded.detach:
                raise ValueError("recorded: expected a recording with detach=False, whose tensors have a gradient")
            layers = collected(recorded, self.reads)
        else:
            layers = list(recorded)
        if not layers:
            raise ValueError(f"recorded: expected {self.reads!r} of at least one layer, got none")
        return self.measure(layers, mask)

    def measure(self, layers: Sequence[Tensor], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        """The objective on what was read, at least one tensor."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement measure")


def collected(tape: Tape, name: str) -> list[Tensor]:
    """All tensors that were emitted under ``name``, whatever the path, in the order of the paths' first appearance."""
    return [tensor for key, tensors in tape.items.items() if key.rpartition("/")[2] == name for tensor in tensors]
