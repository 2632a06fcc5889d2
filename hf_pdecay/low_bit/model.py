"""A model whose weights are rounded in its forward passes, while its parameters stay what the optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..names import clean_name
from ..optim.distributed import is_dtensor, local, span_of
from ..optim.shards import settle
from .grid import Grid
from .layers import roundable
from .transform import Layout, round_blocks


class RoundedModel:
    """Rounds the weights of a model in its forward passes, until :meth:`end` makes the rounded weights its parameters.

    Hooks around a layer's forward pass put the rounded weight in the way of the parameter, so the model keeps its
    modules, parameters and names. What the parameters hold in between are the latent weights.

    Args:
        model: A model, which may be sharded by FSDP2.
        grids: The codes of each weight, by the clean name of its parameter; see :func:`.layers.roundable`.
        watched: Names of further parameters whose layers must be called, for :meth:`find_bypassed`.

    Attributes:
        exact: Whether codes with ``nonzero`` are taken so. Until a run has made its zeros it must not be: in a block
            with one large weight most others have code 0, and as many of the code next to it would drown the rest.
    """

    def __init__(self, model: nn.Module, grids: Mapping[str, Grid], watched: Iterable[str] = ()) -> None:
        self._model = model
        self._places: dict[str, _Place] = {}
        self._handles: list[Any] = []
        self._switch = _Switch()
        hooks: dict[int, tuple[nn.Module, _Hook]] = {}
        self._unused: dict[str, list[_Hook]] = {}
        able = roundable(model)
        for name in dict.fromkeys((*grids, *watched)):
            for use in able[name].uses if name in able else ():
                _, hook = hooks.setdefault(id(use.module), (use.module, _Hook(self._switch)))
                self._unused.setdefault(name, []).append(hook)
                if name in grids:
                    loose = replace(grids[name], nonzero=False)
                    place = self._places[name] = _Place(able[name].layout, grids[name], loose)
                    hook.places.append((use.holder, use.attribute, place))
        for module, hook in hooks.values():
            self._handles.append(module.register_forward_pre_hook(hook.before))
            self._handles.append(module.register_forward_hook(hook.after, always_call=True))

    @property
    def exact(self) -> bool:
        """See the class."""
        return self._switch.exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        self._switch.exact = exact

    @torch.no_grad()
    def vanishing(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give parameters whose codes are to be exact, and which of the weights here are not 0 and have code 0."""
        names = [name for name, place in self._places.items() if place.grid.nonzero]
        before, self.exact = self.exact, False
        try:
            params = self.parameters()
            for name, weights, rounded in self._pairs(names):
                yield params[name], (rounded == 0) & (weights != 0)
        finally:
            self.exact = before

    def parameters(self) -> dict[str, Tensor]:
        """Return the model's parameters that are rounded, by clean name; they are latent outside :meth:`rounded`."""
        return self._named(self._places)

    @torch.no_grad()
    def end(self) -> None:
        """Make the rounded weights the parameters and remove the hooks; a second call does nothing."""
        if not self._handles:
            return
        for _, weights, rounded in self._pairs():
            weights.copy_(rounded)
        self.let_go()

    def let_go(self) -> None:
        """Remove the hooks; the parameters keep what they hold."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def latent_alone(self) -> Iterator[None]:
        """Have the model compute with the latent weights for a while."""
        before, self._switch.on = self._switch.on, False
        try:
            yield
        finally:
            self._switch.on = before

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Have the parameters hold the rounded weights for a while; the latent ones wait in the host's memory."""
        if not self._handles or not self._switch.on:
            yield
            return
        kept: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for name, weights, rounded in self._pairs():
                    kept[name] = weights.to("cpu", copy=True)
                    weights.copy_(rounded)
            with self.latent_alone():
                yield
        finally:
            with torch.no_grad():
                for name, param in self.parameters().items():
                    if name in kept:
                        local(param.detach()).copy_(kept[name])

    def rounded_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield by clean name what the parameters would hold if they were rounded: what this process has of them."""
        if self._handles and self._switch.on:
            for name, _, rounded in self._pairs():
                yield name, rounded

    def _pairs(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The weights that this process holds of each parameter, which share its memory, and the same rounded."""
        for name, param in self._named(self._places if names is None else names).items():
            under = self._places[name].under(self._switch)
            if not is_dtensor(param):
                yield name, param.detach(), round_blocks(param.detach(), *under)
                continue
            here = local(param.detach())
            whole = round_blocks(cast(Any, param).full_tensor().detach(), *under)
            span = span_of(param)
            yield name, here, whole if span is None else whole.narrow(span.dim, span.start, here.shape[span.dim])

    def find_bypassed(self) -> str | None:
        """Return the name of a weight that has a gradient although its layer was never called; None without one.

        Weights that are known to be used are not looked at again.
        """
        if not self._unused:
            return None
        self._unused = {name: hooks for name, hooks in self._unused.items() if not all(hook.called for hook in hooks)}
        for name, param in self._named(self._unused).items() if self._unused else ():
            called = any(hook.called for hook in self._unused[name])
            if not called and param.grad is not None and local(param.grad).any():
                return name
        return None

    def _named(self, names: Iterable[str]) -> dict[str, Tensor]:
        settle(self._model)
        params = {clean_name(name): param for name, param in self._model.named_parameters()}
        return {name: params[name] for name in names}


class _Place(NamedTuple):
    layout: Layout
    grid: Grid
    loose: Grid  # the same, in which small weights may have code 0

    def under(self, switch: _Switch) -> tuple[Layout, Grid]:
        """Return the layout and the codes."""
        return self.layout, self.grid if switch.exact else self.loose


class _Switch:
    """Whether the hooks round, and to codes that are exact."""

    def __init__(self) -> None:
        self.on = self.exact = True


class _Hook:
    """Rounds the weights that a module multiplies by, around its forward pass."""

    def __init__(self, switch: _Switch) -> None:
        self.switch = switch
        self.places: list[tuple[str, str, _Place]] = []
        self.called = False

    def before(self, module: nn.Module, args: Any) -> None:
        """Put rounded weights into the module, where they are found before its parameters."""
        if not self.switch.on:
            return
        self.called = True
        for holder, attribute, place in self.places:
            part = getattr(module, holder) if holder else module
            part.__dict__[attribute] = round_blocks(getattr(part, attribute), *place.under(self.switch))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take them out again."""
        for holder, attribute, _ in self.places:
            part = getattr(module, holder) if holder else module
            if attribute in part.__dict__:
                del part.__dict__[attribute]
