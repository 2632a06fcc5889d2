"""AdamW with weight decay for any p norm: the optimizer and its functional."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..decay import check_lambda_p, check_p_norm
from . import kernels
from .rounding import LOW_PRECISION
from .validation import ADAMW_ONLY, check_hyperparameters, check_state_dict


class AdamWLp(Optimizer):
    r"""AdamW with decoupled weight decay for any p norm.

    Each step is AdamW's, followed by a shrink of every weight whose factor comes from the weight before the step:

        w_{n+1} = w' · s / (s + α λ_p),   s = |w_n|^(2-p)

    with w' the result of ``torch.optim.AdamW`` (https://huggingface.co/papers/2404.10824, algorithm 1). For p < 2 small
    weights reach exact zero in a few steps. ``lambda_p=0`` is ``torch.optim.AdamW`` to the bit; ``weight_decay`` keeps
    its meaning, and both together are the elastic net.

    - Zero absorbs: a weight of exact zero stays zero while α λ_p > 0. A tensor that is wholly zero at its first step
      (LoRA's B, a zero-initialised head) is left undecayed until it has become non-zero.
    - bfloat16 and float16 weights that decay are computed in float32 and rounded stochastically. The random bits come
      from a generator of its own whose place is kept in ``state_dict``, so runs resume exactly and replicas agree.
    - A step with a NaN or infinite gradient is skipped and counted, see :attr:`skipped_steps`.

    Every hyperparameter lives in ``param_groups``, so a group may have its own and a scheduler may move them.

    Args:
        params: Parameters, or dicts of param groups.
        lr: Learning rate α, a float or a one-element tensor, at least 0.
        betas: Decay of the first and the second moment, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: λ₂, the decoupled L2 decay of AdamW, at least 0.
        p_norm: p, above 0. Below 2 weights become exactly zero, and the smaller p, the sharper the choice.
        lambda_p: λ_p, at least 0. The penalty minimised is (λ_p / p) ‖w‖_p^p.
        keep_zeros: Whether weights that are zero stay zero, also where λ_p or the learning rate is 0.
        maximize: Whether to maximise the objective.
        skip_nonfinite: Whether a NaN or infinite gradient in any group with this set skips the step of all of them.

    Raises:
        ValueError: If a hyperparameter is out of its range or a parameter is complex.

    Example:
        >>> optimizer = AdamWLp(model.parameters(), lr=1e-3, p_norm=0.8, lambda_p=0.01)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        p_norm: float = 0.8,
        lambda_p: float = 0.01,
        keep_zeros: bool = False,
        maximize: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "p_norm": p_norm,
            "lambda_p": lambda_p,
            "keep_zeros": keep_zeros,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
            # Counters, kept here so that a checkpoint carries them.
            "skipped_steps": 0,
            "rounding_seed": 0,
        }
        check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose missing hyperparameters are the optimizer's defaults.

        Raises:
            ValueError: If a hyperparameter is out of its range or a parameter is complex.
        """
        check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                group = self.param_groups.pop()
                raise ValueError(
                    f"AdamWLp takes real floating-point parameters, not {param.dtype} (shape {tuple(param.shape)}, "
                    f"group of {len(group['params'])}); leave it out, or split a complex one by torch.view_as_real."
                )

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for NaN or infinite gradients. Reading it synchronises with the device."""
        return max((int(group["skipped_steps"]) for group in self.param_groups), default=0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint, also one of an older version."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of ``torch.optim.AdamW``.

        What the checkpoint does not name, such as ``p_norm`` in one of AdamW, stays as it is in each group.

        Args:
            state_dict: What ``state_dict()`` of either optimizer returned.

        Raises:
            ValueError: If the groups or the shapes are those of another model, or it is an AMSGrad checkpoint.
        """
        check_state_dict(state_dict, self.param_groups)
        before = self.param_groups
        groups = [{**ours, **theirs} for ours, theirs in zip(before, state_dict["param_groups"], strict=False)]
        for group in groups:
            for key in ADAMW_ONLY:
                group.pop(key, None)
            check_hyperparameters(group)
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param in group["params"]:
                state = self.state.get(param)
                if not state:
                    continue
                if not isinstance(state["step"], Tensor):
                    state["step"] = torch.tensor(float(state["step"]))
                if "dormant" in state:
                    # torch casts all state but the step to the dtype of the parameter.
                    state["dormant"] = state["dormant"].bool()
                elif "lambda_p" not in theirs:
                    # AdamW does not say which tensors have been zero from the start: those that still are.
                    _mark_dormant(param, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: Recomputes the loss and returns it, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group(group)
        finite = _all_finite(
            param.grad for group in self.param_groups if group["skip_nonfinite"] for param in group["params"]
        )
        for index, group in enumerate(self.param_groups):
            if not group["skip_nonfinite"]:
                self._step_group(index, group, True)
            elif isinstance(finite, Tensor):
                group["skipped_steps"] = (~finite).to(torch.int64).add_(_on_device(group["skipped_steps"], finite))
                self._step_group(index, group, finite)
            elif finite:
                self._step_group(index, group, True)
            else:
                group["skipped_steps"] += 1
        return loss

    def _step_group(self, index: int, group: dict[str, Any], finite: bool | Tensor) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        # Where only the device knows whether a step is skipped, a skipped one takes its random bits all the same.
        group["rounding_seed"] += 1
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in params:
            self._init_state(param)
            by_device.setdefault(param.device, []).append(param)
        beta1, beta2 = group["betas"]
        for device, on_device in by_device.items():
            states = [self.state[param] for param in on_device]
            adamw_lp(
                on_device,
                [param.grad for param in on_device if param.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [state.get("dormant") for state in states],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                p_norm=group["p_norm"],
                lambda_p=group["lambda_p"],
                keep_zeros=group["keep_zeros"],
                maximize=group["maximize"],
                finite=finite,
                generator=_rounding_generator(on_device, device, index, group),
            )

    def _init_state(self, param: Tensor) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            _mark_dormant(param, state)
        elif state["step"].device != param.device:
            state["step"] = state["step"].to(param.device)


def adamw_lp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    dormants: list[Tensor | None],
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
    generator: torch.Generator | None = None,
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
        capturable: Whether all scalars stay on the device, so that the host never waits; by default everywhere but on a
            CPU, where there is nothing to wait for.
        generator: Random bits for the rounding of low-precision weights.
    """
    hyper = kernels.Hyperparameters(beta1, beta2, eps, weight_decay, p_norm, lambda_p, keep_zeros, maximize)
    for param, grad, exp_avg, exp_avg_sq, step, dormant in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, dormants, strict=True
    ):
        on_device = param.device.type != "cpu" if capturable is None else capturable
        ok = finite.to(param.device) if on_device and isinstance(finite, Tensor) else bool(finite)
        if ok is False:
            continue
        step += ok
        scalars = (kernels.device_scalars if on_device else kernels.host_scalars)(step, lr, hyper)
        awake: bool | Tensor = True
        if dormant is not None and (on_device or dormant):
            dormant.logical_and_(~param.any())
            awake = ~dormant if on_device else not dormant.item()
        kernels.step_tensor(
            param, grad, exp_avg, exp_avg_sq, scalars, hyper, awake=awake, finite=ok, generator=generator
        )


def _check_group(group: dict[str, Any]) -> None:
    """Check what may have changed since the group was added: the decay's settings, and the gradients."""
    check_p_norm(group["p_norm"])
    check_lambda_p(group["lambda_p"])
    for param in group["params"]:
        if param.grad is not None and param.grad.is_sparse:
            raise ValueError(
                "AdamWLp does not take sparse gradients: set sparse=False on the embedding, or give its parameters "
                "to torch.optim.SparseAdam."
            )


def _all_finite(grads: Iterable[Tensor | None]) -> bool | Tensor:
    """Whether all gradients are finite: a bool on a CPU, else a 0-dim tensor, for which the host does not wait."""
    present = [grad for grad in grads if grad is not None and grad.numel()]
    if all(grad.device.type == "cpu" for grad in present) and math.isfinite(sum(grad.sum().item() for grad in present)):
        # NaN and infinity come through a sum, and this one is the cheapest reduction there is. A sum that overflowed
        # by itself is looked at again below.
        return True
    finite = torch.nn.utils.get_total_norm(present, norm_type=math.inf).isfinite()
    return bool(finite) if finite.device.type == "cpu" else finite


def _on_device(value: int | Tensor, like: Tensor) -> int | Tensor:
    return value.to(like.device) if isinstance(value, Tensor) else value


def _mark_dormant(param: Tensor, state: dict[str, Any]) -> None:
    # The only look at the weights that waits for the device, once in a tensor's life.
    if param.numel() and not param.any():
        state["dormant"] = torch.ones((), dtype=torch.bool, device=param.device)


def _rounding_generator(
    params: list[Tensor], device: torch.device, index: int, group: dict[str, Any]
) -> torch.Generator | None:
    """Random bits that depend on the group and on how many steps it did, and on nothing else."""
    if group["lambda_p"] == 0 or not any(param.dtype in LOW_PRECISION for param in params):
        return None
    generator = torch.Generator(device=device)
    generator.manual_seed((group["rounding_seed"] << 12) + index)
    return generator
