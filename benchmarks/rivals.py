"""The rivals of AdamWLp: the authors' algorithm, and thin constructors of the others.

Each is built on the fastest AdamW of torch, so that only the decay differs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class AuthorsAdamW(AdamW):
    """The algorithm of https://huggingface.co/papers/2404.10824 as its authors compute it, from its description.

    Clone the weights, let torch's AdamW step, and multiply each weight by a factor from its clone: a loop over the
    tensors, in plain operations that allocate.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: AdamW's own decay.
        p_norm: p.
        lambda_: Their λ, which is AdamWLp's ``lambda_p`` divided by p.
        fused: Whether the AdamW below is torch's fused one; None, as theirs is, leaves it to torch.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        p_norm: float = 0.8,
        lambda_: float = 0.0125,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self.p_norm = p_norm
        self.lambda_ = lambda_

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        before = [[param.clone() for param in params] for _, params in groups]
        loss = super().step(closure)
        for (group, params), clones in zip(groups, before, strict=True):
            alpha_lambda = group["lr"] * self.p_norm * self.lambda_
            for param, old in zip(params, clones, strict=True):
                size = old.abs().pow(2 - self.p_norm)
                param.mul_(size / (size + alpha_lambda))
        return loss


class CheckedAdamW(AdamW):
    """torch's fused AdamW that skips a step with NaN or infinite gradients, with torch's own means.

    Before the step ``torch.amp.GradScaler`` has one operation look at all gradients (and unscale them, here by 1). It
    leaves its result at the optimizer, as ``found_inf``. Without a scaler both are done here.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step, unless a gradient is not finite."""
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        found_inf = torch.zeros((), device=grads[0].device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, torch.ones_like(found_inf))
        self.grad_scale, self.found_inf = None, found_inf
        return super().step(closure)


def torch_adamw(params: Sequence[Tensor], lr: float, *, fused: bool) -> AdamW:
    """Return torch's AdamW, fused or foreach, without decay."""
    return AdamW(params, lr=lr, weight_decay=0.0, fused=fused, foreach=not fused)


def checked_adamw(params: Sequence[Tensor], lr: float) -> CheckedAdamW:
    """Return torch's fused AdamW, without decay, that checks the gradients as AdamWLp does."""
    return CheckedAdamW(params, lr=lr, weight_decay=0.0, fused=True)


def authors_adamw(
    params: Sequence[Tensor], lr: float, p_norm: float, lambda_p: float, fused: bool | None = None
) -> AuthorsAdamW:
    """Return the authors' algorithm for a λ_p as AdamWLp means it."""
    return AuthorsAdamW(params, lr=lr, p_norm=p_norm, lambda_=lambda_p / p_norm, fused=fused)


def prune_optimizer(params: Sequence[Tensor], lr: float) -> Any:
    """Return torchao's PruneOptimizer, which soft-thresholds each weight (p = 1), around torch's fused AdamW.

    Its threshold grows with the sum of the learning rates; the strength is so low that no weight of a benchmark dies.
    """
    from torchao.prototype.pat.optim import PruneOptimizer

    group = {"params": list(params), "prox_type": "ProxLasso", "group_type": "ElemGrouper"}
    return PruneOptimizer(AdamW([group], lr=lr, weight_decay=0.0, fused=True), reg_lambda=1e-3)


def optimi_adamw(params: Sequence[Tensor], lr: float) -> Any:
    """Return optimi's AdamW, which uses Triton if possible, else foreach."""
    import optimi

    return optimi.AdamW(params, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def missing(module: str) -> str | None:
    """Return why a package cannot be measured here, or None."""
    return None if importlib.util.find_spec(module) is not None else "not installed"


class InductorAdamWLp:
    """The step of AdamWLp from its formulas, as one function of all tensors that ``torch.compile`` fuses.

    The numbers that change from step to step are 0-dim tensors, so that nothing is compiled again.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, p_norm: float, lambda_p: float) -> None:
        self._params = list(params)
        self._weights = [param.detach() for param in params]
        self.state = {
            param: {name: torch.zeros_like(param.detach()) for name in ("exp_avg", "exp_avg_sq")} for param in params
        }
        self._lr, self._steps, self._betas = lr, 0, (0.9, 0.999)
        beta1, beta2 = self._betas

        def step(params: Any, grads: Any, firsts: Any, seconds: Any, step_size: Tensor, root: Tensor) -> None:
            for w, g, m, v in zip(params, grads, firsts, seconds, strict=True):
                s = torch.exp2(torch.log2(w.abs()) * (2 - p_norm))
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                result = w - step_size * m / (v.sqrt() * root + 1e-8)
                w.copy_(result * (s / (s + lr * lambda_p)))

        self._step = torch.compile(step, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        """Do one step."""
        self._steps += 1
        beta1, beta2 = self._betas
        moments = [[state[name] for state in self.state.values()] for name in ("exp_avg", "exp_avg_sq")]
        numbers = self._lr / (1 - beta1**self._steps), (1 - beta2**self._steps) ** -0.5
        step_size, root = (torch.full((), number, device=self._weights[0].device) for number in numbers)
        grads = [param.grad for param in self._params]
        self._step(self._weights, grads, moments[0], moments[1], step_size, root)
