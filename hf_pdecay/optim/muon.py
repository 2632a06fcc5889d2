"""Muon for matrices and AdamW for everything else, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .decay_optimizer import evaluate
from .defaults import LAMBDA_P, P_NORM
from .param_groups import is_decayed
from .unit_kinds import ELEMENT, kind_of


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` on matrices and ``torch.optim.AdamW`` on all other parameters.

    Muon (https://kellerjordan.github.io/posts/muon/) is for the hidden matrices of a model: embeddings, heads, norms
    and biases are left to AdamW. A group's ``use_muon`` says which of the two it is for. A group without it is split:
    its matrices are for Muon if p-norm decay acts on it, the rest is for AdamW.

    ``lr`` and ``weight_decay`` (decoupled) are for both, ``betas`` and ``eps`` for AdamW, the others for Muon. With
    ``adjust_lr_fn="match_rms_adamw"`` one rate suits both; the alternative is ``"original"``.

    Raises ImportError if torch has no Muon, ValueError if a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"Muon needs torch 2.9 or later, not {torch.__version__}: pip install -U torch.")
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        only: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        muon = torch.optim.Muon([torch.zeros(1, 1)], adjust_lr_fn=adjust_lr_fn, **only, **both)
        adamw = torch.optim.AdamW([torch.zeros(1)], betas=betas, eps=eps, **both)
        self._own = {True: dict(muon.defaults), False: dict(adamw.defaults)}
        super().__init__(params, both)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds."""
        return {**super().__getstate__(), "_own": self._own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split in two if it has no ``use_muon``; ValueError if Muon would get anything but matrices."""
        for group in by_kind([param_group]):
            for param in group["params"] if group["use_muon"] else ():
                if param.dim() != 2:
                    raise ValueError(
                        f"Muon takes matrices alone, and a group with use_muon=True holds a tensor of shape "
                        f"{tuple(param.shape)}; leave use_muon out, and the group is split."
                    )
            for name, value in self._own[group["use_muon"]].items():
                group.setdefault(name, value)
            super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; return what the closure, which recomputes the loss, returned, or None."""
        loss = evaluate(closure)
        muon, adamw = torch.optim.Muon([torch.zeros(1, 1)]), torch.optim.AdamW([torch.zeros(1)])
        for use_muon, optimizer in ((True, muon), (False, adamw)):
            # Both lend only their step: groups and state are those of this optimizer, as they are now.
            optimizer.param_groups = [group for group in self.param_groups if group["use_muon"] is use_muon]
            optimizer.state = self.state
            if optimizer.param_groups:
                optimizer.step()
        return loss


def by_kind(param_groups: Iterable[Mapping[str, Any] | Tensor]) -> list[dict[str, Any]]:
    """Return copies of param groups in which ``use_muon`` names the optimizer, split where necessary."""
    items = list(param_groups)
    groups = [split for group in items if isinstance(group, Mapping) for split in _split(group)]
    loose = [param for param in items if not isinstance(param, Mapping)]
    return groups + (_split({"params": loose}) if loose else [])


def _split(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if "use_muon" in group:
        return [{**group, "params": params}]
    if kind_of(group) != ELEMENT:
        raise ValueError(
            f"Invalid group: group={kind_of(group)!r} with Muon, which splits the parameters of a group into matrices "
            "and others; take another optimizer, such as adamw_lp."
        )
    decayed = is_decayed({"p_norm": P_NORM, "lambda_p": LAMBDA_P, **group})
    matrices = [param for param in params if decayed and param.dim() == 2]
    chosen = {id(param) for param in matrices}
    others = [param for param in params if id(param) not in chosen]
    splits = ((True, matrices), (False, others))
    return [{**group, "params": tensors, "use_muon": use_muon} for use_muon, tensors in splits if tensors]
