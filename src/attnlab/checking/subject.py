"""The mixer under check: a registered name, a class, a factory or an instance, built in every form that is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.info import MixerInfo, Supports, read_options

Target = str | type[Mixer] | Mixer | Callable[..., Mixer]

DIM, NUM_HEADS = 16, 4


class Subject:
    """A target of `attnlab.check`.

    Args:
        target: a registered name, a `Mixer` class, a callable ``(**options) -> Mixer``, or a built mixer (copied, never changed).
        options: for the constructor; they replace those of ``info.example``. Not with a built mixer.

    Raises:
        TypeError: if the target is none of these, has no ``info``, or is built and given options.
        UnknownNameError: for a name that is not registered.
    """

    def __init__(self, target: Target, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        self.registered = target if isinstance(target, str) else None
        self.instance = target if isinstance(target, Mixer) else None
        self.factory: Callable[..., Mixer] | None = None
        if isinstance(target, str):
            self.factory = mixers.get(target).factory
        elif self.instance is None:
            if not callable(target) or (isinstance(target, type) and not issubclass(target, Mixer)):
                raise TypeError(
                    f"target: expected a registered name, a Mixer class, a callable that builds one, or a mixer, got {target!r}"
                )
            self.factory = target
        if self.instance is not None and self.options:
            raise TypeError(f"options: expected none with a built mixer, got {sorted(self.options)}")
        self._built: dict[tuple[bool, int | None], Mixer] = {}
        self._promises: Supports | None = None
        info = getattr(target, "info", None) if self.registered is None else mixers.info(self.registered)
        if isinstance(info, MixerInfo):
            self.options = {**dict(info.example), **self.options}
        elif isinstance(target, (type, Mixer)):
            raise TypeError(
                f"target: {target!r} has no info; register it with @attnlab.core.catalog.mixers.register(name, supports=...)"
            )
        self.name = info.name if isinstance(info, MixerInfo) else getattr(target, "__name__", repr(target))

    @property
    def supports(self) -> Supports:
        """The promises, as the mixer built with the options makes them."""
        if self._promises is None:
            self._promises = self.build().supports
        return self._promises

    @property
    def forms(self) -> tuple[bool, ...]:
        """The values that ``causal`` can have."""
        if self.instance is not None:
            return (self.instance.causal,)
        if "causal" in self.options:
            return (bool(self.options["causal"]),)
        return {"no": (False,), "always": (True,), "optional": (False, True)}[self.supports.causal]

    def mixer(self, causal: bool, tokens: int | None = None) -> Mixer:
        """The form with this causality, in float64 and evaluation mode; built once, not to be changed.

        ``tokens`` sets the option that fixes how many there are, where the subject has one.
        """
        if (causal, tokens) not in self._built:
            chosen: dict[str, Any] = {"causal": causal} if self.supports.causal == "optional" else {}
            if tokens is not None and self.supports.tokens_option is not None:
                chosen[self.supports.tokens_option] = tokens
            self._built[causal, tokens] = self.build(**chosen)
        return self._built[causal, tokens]

    def build(self, *, seed: int = 0, **more: Any) -> Mixer:
        """A new instance in float64 and evaluation mode, with random parameters of its own.

        Every parameter is moved off its initial value, so that no term hides behind a zero or a one. ``more`` options are
        ignored where the target is built already.
        """
        torch.manual_seed(seed)
        mixer = copy.deepcopy(self.instance) if self.instance is not None else self.construct(**more)
        mixer = mixer.to(torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in mixer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.device), alpha=0.1)
        return mixer.eval()

    def construct(self, **more: Any) -> Mixer:
        """What the constructor returns for the subject's options and ``more``; TypeError if it is not a mixer."""
        if self.factory is None:
            raise TypeError(f"{self.name}: a built mixer cannot be constructed anew")
        mixer = self.factory(**{"dim": DIM, "num_heads": NUM_HEADS, **self.options, **more})
        if not isinstance(mixer, Mixer):
            raise TypeError(f"target: expected {self.name} to build an attnlab.Mixer, got {type(mixer).__name__}")
        return mixer

    @property
    def option_names(self) -> set[str]:
        """The constructor's arguments."""
        return {option.name for option in read_options(type(self.build()) if self.factory is None else self.factory)}
