"""What a step shares with the one before it: computed once, and checked by addresses before each step.

To assign tensors to backends costs the host several times what the step itself does. For models of many small
tensors, and on a GPU, that is the time of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_lambda_p, check_p_norm
from .backends import Share
from .bases import holds_unchanged
from .distributed import Owners, is_dtensor, parts_here
from .moments import address
from .tensor_step import Hyperparameters, TensorStep, alpha_lambda_p
from .unit_kinds import ELEMENT, kind_of
from .unit_tables import UnitTables


_STATE = ("exp_avg", "exp_avg_sq", "step")
_HYPERPARAMETERS = ("lr", "eps", "weight_decay", "p_norm", "lambda_p", "keep_zeros", "maximize", "skip_nonfinite")


def hyper_of(group: Mapping[str, Any]) -> Hyperparameters:
    """Return the hyperparameters of a param group; ValueError if p or λ_p is out of its range."""
    check_p_norm(group["p_norm"])
    check_lambda_p(group["lambda_p"])
    beta1, beta2 = group["betas"]
    same = {name: group[name] for name in _HYPERPARAMETERS}
    return Hyperparameters(beta1=beta1, beta2=beta2, rounds="phase" in group, **same)


class StepCache:
    """Which backend does which tensors of a step; ``lasts`` if the next step may do the same with the same tensors.

    ``owners`` are the processes that hold sharded parameters, or None. All of them follow their caches or none does,
    except for addresses, on which no communication depends.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Any]],
        hypers: list[Hyperparameters],
        steps: Sequence[TensorStep],
        shares: list[Share],
        lasts: bool,
        tables: Sequence[tuple[UnitTables, Hyperparameters]],
    ) -> None:
        self.shares = shares
        self._hypers = hypers
        self._tables = tables
        params = _params(groups)
        sharded = [param for param in params if is_dtensor(param)]
        self.owners = Owners.of(sharded)
        here = self._here(params) if lasts and all(share.backend.repeats for share in shares) else None
        self.lasts = here is not None and _are_plain(*here)
        if here is not None and self.lasts:
            self._places, self._grads = _places(params, here[0], state), _addresses(here[1])
            self.lasts = self._places is not None  # else no comparison would show a change
        # Backends that repeat hold addresses alone. Gradients that are not the parameters' own must outlive the step.
        self._alive = () if self.lasts else steps
        if self.lasts:
            # Copies, as units may be changed in place.
            self._flags = copy.deepcopy([_flags(group, hyper) for group, hyper in zip(groups, hypers, strict=True)])

    def _here(self, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Return the parts of parameters and gradients on this process; None if a step would have to move data."""
        grads = [param.grad for param in params]
        return (list(params), grads) if self.owners is None else parts_here(params, grads)

    def follow(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Take over what may change from one step to the next, and return whether everything else is the same."""
        if not self.lasts or len(groups) != len(self._hypers):
            return False
        for group, hyper, flags in zip(groups, self._hypers, self._flags, strict=True):
            fresh = hyper_of(group)
            if _flags(group, fresh) != flags:
                return False
            hyper.update(fresh)
        params = _params(groups)
        here = self._here(params)
        if here is None:
            return False
        weights, grads = here
        if any(grad is not None and grad.is_sparse for grad in grads):
            return False
        addresses = _addresses(grads)
        if addresses == self._grads:
            same = _are_contiguous(grads)
        else:
            there = [address < 0 for address in addresses] == [address < 0 for address in self._grads]
            same = there and _are_plain(weights, grads)
        if not same or _places(params, weights, state) != self._places:
            return False
        if self.owners is not None:
            # Autograd looks at the DTensors; the step changes the shards that they hold.
            torch.autograd.graph.increment_version([param for param in params if param.grad is not None])
        if addresses != self._grads:
            stepped = [grad for grad in grads if grad is not None]
            for share in self.shares:
                share.backend.point([stepped[index].data_ptr() for index in share.indices])
            self._grads = addresses
        for tables, hyper in self._tables:
            tables.norms()
            tables.fill(hyper.p_norm, alpha_lambda_p(hyper.lr, hyper.lambda_p, tables.device))
        return True


def _flags(group: Mapping[str, Any], hyper: Hyperparameters) -> tuple[Any, ...]:
    """What decides which backend does a step, and in which shares."""
    structure = None
    if kind_of(group) != ELEMENT:
        structure = kind_of(group), group.get("units"), [param.shape for param in group["params"]]
    return (
        group.get("still"),
        holds_unchanged(group),
        structure,
        hyper.decays,
        hyper.keep_zeros,
        hyper.skip_nonfinite,
        isinstance(hyper.lr, Tensor),
    )


def _params(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _addresses(grads: Sequence[Tensor | None]) -> list[int]:
    return [-1 if grad is None else grad.data_ptr() for grad in grads]


def _places(
    params: Sequence[Tensor], here: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]
) -> list[int] | None:
    """Return which parameters exist, and where they and the optimizer's state lie; None where state is missing.

    ``here`` is the part of each parameter on this process. Its number of weights and dtype count too, as
    ``param.data = param.data[:n]`` does not change the addresses.
    """
    if not all(param.is_contiguous() for param in here):
        return None
    try:
        moments = [address(entry[name]) for entry in state.values() if "step" in entry for name in _STATE]
        moments += [address(entry["base"]) for entry in state.values() if "base" in entry]
    except (KeyError, AttributeError):
        return None
    whose = [id(param) for param in params] + [param.data_ptr() for param in here] + moments
    return whose + [param.numel() for param in here] + [hash(param.dtype) for param in here]


def _are_contiguous(grads: Sequence[Tensor | None]) -> bool:
    return all(grad is None or (grad.is_contiguous() and not grad.is_neg() and not grad.is_conj()) for grad in grads)


def _are_plain(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
    """Whether the addresses of gradients say everything about them."""
    return _are_contiguous(grads) and all(
        param.is_contiguous() and grad.dtype == param.dtype and grad.shape == param.shape
        for param, grad in zip(params, grads, strict=True)
        if grad is not None
    )
