"""The step of AdamWLp as a function of lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import foreach
from .backends import Backend
from .distributed import local
from .dormancy import wake
from .tensor_step import Hyperparameters, TensorStep


def adamw_lp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    dormants: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    p_norm: float,
    lambda_p: float,
    keep_zeros: bool,
    maximize: bool,
    finite: bool | Tensor = True,
    capturable: bool | None = None,
    backend: str | Backend = "auto",
) -> None:
    """Functional of :class:`AdamWLp`: one step on lists of tensors, in place.

    Args:
        params: Weights, of any shapes.
        grads: Gradients of the same shapes.
        exp_avgs: First moments of the same shapes.
        exp_avg_sqs: Second moments of the same shapes.
        steps: 0-dim float32 counters on the devices of the weights.
        dormants: For each tensor None, or a 0-dim bool that is true while a tensor that began wholly zero still is.
        lr: Learning rate α.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: λ₂.
        p_norm: p.
        lambda_p: λ_p.
        keep_zeros: Whether weights that are zero stay zero.
        maximize: Whether to maximise.
        finite: Whether the gradients are finite; where not, nothing is written.
        capturable: Whether all scalars stay on the device, so that the host never waits. By default that is left to the
            backend, which does so everywhere but on a CPU, where there is nothing to wait for; given, the step is done
            by plain torch operations.
        backend: As of the class, or the :class:`~hf_pdecay.optim.backends.Backend` that made an earlier choice.
    """
    hyper = Hyperparameters(lr, beta1, beta2, eps, weight_decay, p_norm, lambda_p, keep_zeros, maximize)
    tensor_steps = []
    lists = zip(params, grads, exp_avgs, exp_avg_sqs, steps, dormants, strict=True)
    for index, (param, grad, exp_avg, exp_avg_sq, step, dormant) in enumerate(lists):
        awake = True if dormant is None else wake(param, dormant, capturable)
        moments = local(exp_avg), local(exp_avg_sq)
        tensor_steps.append(TensorStep(local(param), local(grad), *moments, step, awake, hyper, index))
    if capturable is None:
        for part in (backend if isinstance(backend, Backend) else Backend(backend)).assign(tensor_steps):
            part.run(finite)
    else:
        foreach.step(tensor_steps, finite, capturable)
