"""What a step has in common with the one before it: found out once, and checked by addresses before each step.

Finding out which backend does which tensor costs the host several times what the step itself costs it. For models of
many small tensors, and on a GPU, that is what a step takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_lambda_p, check_p_norm
from .backends import Part
from .cpu.units import UnitDivisors
from .distributed import Owners, is_dtensor, parts_here
from .moments import address
from .tensor_step import Hyperparameters, alpha_lambda_p
from .units import ELEMENT, kind_of


if TYPE_CHECKING:
    from .gpu.units import UnitFactors


_STATE = ("exp_avg", "exp_avg_sq", "step")


def hyper_of(group: Mapping[str, Any]) -> Hyperparameters:
    """Return the hyperparameters of a param group, after a look at those that may have changed.

    Raises:
        ValueError: If p or λ_p is out of its range.
    """
    check_p_norm(group["p_norm"])
    check_lambda_p(group["lambda_p"])
    beta1, beta2 = group["betas"]
    return Hyperparameters(
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        group["p_norm"],
        group["lambda_p"],
        group["keep_zeros"],
        group["maximize"],
        group["skip_nonfinite"],
        rounds="phase" in group,
    )


class StepCache:
    """Which backend does which tensors of a step.

    Args:
        groups: The optimizer's param groups.
        state: Its state.
        hypers: The hyperparameters of each group, which the parts look at in each step.
        parts: What the backends do.
        lasts: Whether the next step may be done by the same parts, if it has the same tensors.
        tables: What groups of weights are divided by, and the hyperparameters of their param group.
        done: By the index of a param group the indices of its parameters whose structured decay the parts do.

    Attributes:
        owners: Who holds the parameters whose shards lie on several processes; None if there are none. All of these
            processes follow their plans or none does, but for addresses, of which no communication depends.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Any]],
        hypers: list[Hyperparameters],
        parts: list[Part],
        lasts: bool,
        tables: Sequence[tuple[UnitDivisors | UnitFactors, Hyperparameters]],
        done: Mapping[int, set[int]],
    ) -> None:
        self.parts = parts
        self.done = done
        self._hypers = hypers
        self._tables = tables
        params = _params(groups)
        sharded = [param for param in params if is_dtensor(param)]
        self.owners = Owners.of(sharded)
        here = self._here(params) if lasts and all(part.batch for part in parts) else None
        self.lasts = here is not None and _are_plain(*here)
        if here is not None and self.lasts:
            self._places, self._grads = _places(params, here[0], state), _addresses(here[1])
            self.lasts = self._places is not None  # else nothing would tell of a change
        if self.lasts:
            # Copies, as units may be changed in place.
            self._flags = copy.deepcopy([_flags(group, hyper) for group, hyper in zip(groups, hypers, strict=True)])
            # These are the parameters' own.
            for part in parts:
                part.release()

    def _here(self, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Return parameters and gradients as they are on this process; None where a step would have to move some."""
        grads = [param.grad for param in params]
        return (list(params), grads) if self.owners is None else parts_here(params, grads)

    def follow(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Take over what may change from one step to the next, and return whether all else is as it was.

        Args:
            groups: The optimizer's param groups.
            state: Its state.
        """
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
        some, grads = here
        if any(grad is not None and grad.is_sparse for grad in grads):
            return False
        addresses = _addresses(grads)
        if addresses == self._grads:
            same = _are_contiguous(grads)
        else:
            there = [address < 0 for address in addresses] == [address < 0 for address in self._grads]
            same = there and _are_plain(some, grads)
        if not same or _places(params, some, state) != self._places:
            return False
        if self.owners is not None:
            # Autograd looks at the DTensors; the step changes the shards that they hold.
            torch.autograd.graph.increment_version([param for param in params if param.grad is not None])
        if addresses != self._grads:
            stepped = [grad for grad in grads if grad is not None]
            for part in self.parts:
                if part.batch is not None:
                    part.batch.point([stepped[index].data_ptr() for index in part.indices])
            self._grads = addresses
        self._fill_tables()
        return True

    def _fill_tables(self) -> None:
        for tables, hyper in self._tables:
            tables.norms()
            tables.fill(hyper.p_norm, alpha_lambda_p(hyper.lr, hyper.lambda_p, tables.device))


def _flags(group: Mapping[str, Any], hyper: Hyperparameters) -> tuple[Any, ...]:
    """What decides who does a step, and how it is parted."""
    structure = None
    if kind_of(group) != ELEMENT:
        structure = kind_of(group), group.get("units"), [param.shape for param in group["params"]]
    return structure, hyper.decays, hyper.keep_zeros, hyper.skip_nonfinite, isinstance(hyper.lr, Tensor)


def _params(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _addresses(grads: Sequence[Tensor | None]) -> list[int]:
    return [-1 if grad is None else grad.data_ptr() for grad in grads]


def _places(
    params: Sequence[Tensor], here: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]
) -> list[int] | None:
    """Which parameters there are, and where they and the state of the optimizer lie; None where state is missing.

    ``here`` has of each parameter what is on this process. How many weights that are, of which dtype, and whether in
    the order of memory, is a part of it, as ``param.data = param.data[:n]`` leaves the addresses as they are.
    """
    if not all(param.is_contiguous() for param in here):
        return None
    try:
        moments = [address(each[name]) for each in state.values() if each for name in _STATE]
    except (KeyError, AttributeError):
        return None
    whose = [id(param) for param in params] + [param.data_ptr() for param in here] + moments
    return whose + [param.numel() for param in here] + [hash(param.dtype) for param in here]


def _are_contiguous(grads: Sequence[Tensor | None]) -> bool:
    return all(grad is None or (grad.is_contiguous() and not grad.is_neg()) for grad in grads)


def _are_plain(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients are such that their addresses say all of them."""
    return _are_contiguous(grads) and all(
        param.is_contiguous() and grad.dtype == param.dtype and grad.shape == param.shape
        for param, grad in zip(params, grads, strict=True)
        if grad is not None
    )
