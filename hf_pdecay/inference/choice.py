"""Swaps the linear layers of a model for sparse ones if these are faster, by a measurement on this machine.

On a CPU a sparse layer multiplies its non-zero weights, on a GPU those of a 2:4 pattern.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..checks import asked_percent, check_choice, is_number
from ..layers.matrices import Linear, is_plain_linear, is_transposed, make_linear
from ..terminal import get_logger
from .base import InferenceLinear
from .bitmask_linear import BitmaskLinear
from .cpu_linear import CpuLinear
from .experts import ExpertStack, expert_stacks, put_stack, set_experts
from .kernels import VALUES
from .result import Choice, Choices
from .semi_structured import SemiStructuredLinear
from .timing import Timer, least_sparsity, likely_form, model_seconds


logger = get_logger(__name__)

# Other layers' weights, if there are more, push a layer's out of the processor's caches.
_CACHE = 64 << 20  # bytes


@torch.no_grad()
def to_sparse_inference(
    model: nn.Module,
    *,
    rows: int = 16,
    min_sparsity: float | None = None,
    values: str | None = None,
    head: str | None = None,
) -> Choices:
    """Swap the linear layers of a model, in place, for sparse ones if these are faster on this machine.

    On a CPU any zeros count: a layer becomes a :class:`~hf_pdecay.BitmaskLinear` or a :class:`~hf_pdecay.SparseLinear`,
    whichever is faster. On an NVIDIA GPU only 2:4 weights in float16 or bfloat16 do (see ``group`` in ``lp_rules``).
    ``nn.Linear`` and HF's ``Conv1D`` are swapped; layers with shared weights or hooks stay dense. ``generate``,
    ``pipeline`` and ``save_pretrained`` keep working, and the last saves an ordinary dense model; call
    :func:`to_dense_inference` before training.

    Args:
        model: A model on a CPU or on one GPU.
        rows: Typical number of rows that a layer gets at a time, for the measurement: batch size × tokens; 1 for
            decoding one sequence.
        min_sparsity: Swap every layer with at least this fraction of zeros without measuring; None measures.
        values: The dtype in which weights that are not zero are held on a CPU: ``"float32"``, ``"bfloat16"``,
            ``"float16"`` or ``"int8"`` (with a scale for each 256 columns of a row); None for the layer's own, which
            changes no weight. Zeros stay zeros.
        head: The same for the output layer, which is dense, and swapped even if its weight is tied to the embeddings:
            these, and what is saved, keep theirs. None leaves a tied one as it is.

    Returns:
        A list with an entry for each linear layer; it prints as a table. If nothing was swapped, it says from which
        sparsity layers of each shape would be, and a warning does.

    Raises:
        ValueError: If an argument is out of its range, the model is itself a linear layer, or it is on several devices
            or on another one, or ``values`` or ``head`` is for a GPU or cannot hold the head's weights.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("out").eval()
        >>> print(to_sparse_inference(model, rows=1, values="int8", head="int8"))
        >>> model.generate(**inputs)
    """
    device = _check(model, rows, min_sparsity, {"values": values, "head": head})
    held_as, head_as = (None if name is None else VALUES[name] for name in (values, head))
    linear = sum(module.weight.nbytes for *_, module in linear_layers(model))
    others = torch.zeros(_CACHE // 4) if linear > _CACHE and device == "cpu" else None
    timer = Timer(rows, others)
    before = model_seconds(model, rows)
    choices = Choices(rows=rows, min_sparsity=min_sparsity)
    dense = swap_layers(model, choices, timer, held_as, head_as)
    if not choices.swapped:
        for shape, (module, sparsity) in dense.items():
            choices.swapped_from[shape] = (
                timer.break_even(module, sparsity, held_as) if min_sparsity is None else min_sparsity
            )
    elif before is not None and (after := model_seconds(model, rows)) is not None:
        choices.seconds = before, after
    logger.log(logging.INFO if choices.swapped else logging.WARNING, "%s", " ".join(choices.sentences()))
    return choices


def swap_layers(
    model: nn.Module, choices: Choices, timer: Timer, held_as: torch.dtype | None, head_as: torch.dtype | None
) -> dict[tuple[int, int], tuple[Linear, float]]:
    """Swap layers as :func:`to_sparse_inference` does, and add a choice for each to ``choices``.

    Returns:
        Of each shape a layer that stays dense and that more zeros might swap, and its sparsity.
    """
    owners = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    output = output_layer(model) if head_as is not None else None
    dense: dict[tuple[int, int], tuple[Linear, float]] = {}
    for parent, key, name, module in list(linear_layers(model)):
        shared = owners[id(module.weight)] > 1
        if module is output:
            choice, sparse = _head(name, module, shared, head_as)
        else:
            kept = kept_dense(module, shared)
            choice, sparse = _choose(name, module, choices.min_sparsity, held_as, kept, timer)
            if (
                sparse is None
                and kept is None
                and module.weight.is_cpu
                and BitmaskLinear.refusal(module.weight) is None
            ):
                dense[choice.shape] = module, max(choice.sparsity, dense.get(choice.shape, (module, 0.0))[1])
        choices.append(choice)
        if sparse is not None:
            put_layer(model, parent, key, sparse.train(module.training))
    if not any(param.is_cuda for param in model.parameters()):
        choices += _swap_experts(model, choices.min_sparsity, held_as, owners, timer)
    return dense


def put_layer(model: nn.Module, parent: nn.Module, key: str, layer: InferenceLinear) -> None:
    """Put a layer in the place of a dense one."""
    setattr(parent, key, layer)
    layer.changed = _without_fast_path(parent, model)


def check_settings(rows: int, min_sparsity: float | None, values: dict[str, str | None]) -> None:
    """Raise ValueError if a setting of :func:`to_sparse_inference` is out of its range."""
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"Invalid rows: rows={rows!r}; it must be a whole number of at least 1.")
    if min_sparsity is not None and not (is_number(min_sparsity) and 0 <= min_sparsity <= 1):
        raise ValueError(
            f"Invalid min_sparsity: min_sparsity={min_sparsity!r}; it must be in [0, 1]." + asked_percent(min_sparsity)
        )
    for name, value in values.items():
        if value is not None:
            check_choice(name, value, tuple(VALUES))


def _check(model: nn.Module, rows: int, min_sparsity: float | None, values: dict[str, str | None]) -> str:
    """Return the type of the model's device; ValueError if an argument is invalid."""
    check_settings(rows, min_sparsity, values)
    if is_plain_linear(model):
        raise ValueError(
            f"Invalid model: it is a {type(model).__name__}, and layers are swapped in the module around them; give "
            "that module, such as nn.Sequential(layer)."
        )
    devices = sorted({str(param.device) for param in model.parameters()}) or ["cpu"]
    if len(devices) > 1 or not devices[0].startswith(("cpu", "cuda")):
        raise ValueError(
            f"Invalid model: it is on {' and '.join(devices)}; sparse inference works on a CPU or on one GPU. Call "
            "model.cpu() or model.cuda() first."
        )
    device = devices[0].split(":")[0]
    for name, value in values.items():
        if value is not None and device == "cuda":
            raise ValueError(f"Invalid {name}: {name}={value!r} is for a CPU, and the model is on {devices[0]}.")
    return device


@torch.no_grad()
def to_dense_inference(model: nn.Module) -> nn.Module:
    """Swap the sparse layers of a model back, in place, and return it; it can be trained again."""
    implementation = None
    for parent in list(model.modules()):
        for key, module in list(parent.named_children()):
            if isinstance(module, InferenceLinear):
                setattr(parent, key, _dense(module))
                for other, name, value in module.changed:
                    setattr(other, name, value)
            elif isinstance(module, ExpertStack):
                setattr(parent, key, nn.Parameter(module.dense(), requires_grad=module.trained))
                implementation = module.implementation or implementation
    if implementation is not None:
        set_experts(model, implementation)
    return model


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Linear]]:
    """The layers that are linear and nothing more: parent module, key in the parent, name and layer."""
    for path, parent in model.named_modules():
        for key, module in parent.named_children():
            if is_plain_linear(module):
                yield parent, key, f"{path}.{key}" if path else key, module


def _swap_experts(
    model: nn.Module,
    min_sparsity: float | None,
    held_as: torch.dtype | None,
    owners: Mapping[int, int],
    timer: Timer,
) -> list[Choice]:
    """Swap the matrices of fused experts, all of a parameter in one form."""
    choices = []
    implementation = None
    for module, key, name, stack in list(expert_stacks(model)):
        matrices = [matrix.t() if stack.transposed else matrix for matrix in stack.weight.detach()]
        kept = "its weight is shared with another module" if owners[id(stack.weight)] > 1 else None
        kept = kept or next(filter(None, (BitmaskLinear.refusal(matrix, held_as) for matrix in matrices)), None)
        out, size = matrices[0].shape
        first = nn.Linear(size, out, bias=False, device="meta")
        first.weight = nn.Parameter(matrices[0], requires_grad=stack.weight.requires_grad)
        sparsity = 1 - int(stack.weight.count_nonzero()) / max(stack.weight.numel(), 1)
        choice, form = _form(f"{name} ({len(matrices)} experts)", first, sparsity, min_sparsity, held_as, kept, timer)
        choices.append(choice)
        if form is not None:
            if not any(isinstance(each, ExpertStack) for each in model.modules()):
                implementation = set_experts(model, "eager")
            values = form.values_of(held_as)
            layers = [
                cast("CpuLinear", form(matrix, transposed=bool(stack.transposed), values=values)) for matrix in matrices
            ]
            trained = stack.weight.requires_grad
            put_stack(module, key, ExpertStack(layers, trained=trained, implementation=implementation))
    return choices


def output_layer(model: nn.Module) -> Linear:
    """The linear layer whose results are the model's; ValueError if there is none."""
    own: Any = model
    layer = own.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        layer = next((module for *_, module in linear_layers(model) if id(module.weight) in embeddings), None)
    if not isinstance(layer, nn.Module) or not is_plain_linear(layer):
        raise ValueError(
            f"Invalid head: {type(model).__name__} has no linear output layer that is its own; leave it out."
        )
    return layer


def _head(
    name: str, module: Linear, shared: bool, held_as: torch.dtype | None
) -> tuple[Choice, InferenceLinear | None]:
    weight = module.weight.t() if is_transposed(module) else module.weight
    reason = "it carries hooks" if _has_hooks(module) else BitmaskLinear.refusal(weight, held_as)
    if reason is not None:
        raise ValueError(f"Invalid head: {name} cannot be swapped: {reason}; leave it out.")
    layer = _made(BitmaskLinear, module, held_as)
    if shared:
        layer.tied = (cast("nn.Parameter", module.weight),)
    sparsity = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    return Choice(name, (weight.shape[0], weight.shape[1]), sparsity, None, True, form=layer.form), layer


def _without_fast_path(parent: nn.Module, model: nn.Module) -> tuple[tuple[nn.Module, str, Any], ...]:
    """Have torch's encoder layers call their linear layers, and return what that changed.

    In evaluation they hand all their weights to one operation, and ``nn.TransformerEncoder`` hands them nested tensors,
    which only that operation takes.
    """
    if not isinstance(parent, nn.TransformerEncoderLayer) or not parent.activation_relu_or_gelu:
        return ()
    changes: list[tuple[nn.Module, str, Any]] = [(parent, "activation_relu_or_gelu", parent.activation_relu_or_gelu)]
    parent.activation_relu_or_gelu = 0  # as of an activation that the operation does not know
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        if any(layer is parent for layer in encoder.layers) and encoder.use_nested_tensor:
            changes.append((encoder, "use_nested_tensor", True))
            encoder.use_nested_tensor = False
    return tuple(changes)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def kept_dense(module: Linear, shared: bool) -> str | None:
    """Why a layer stays dense whatever its weights are, or None."""
    if shared:
        return "its weight is shared with another module"
    if _has_hooks(module):
        return "it carries hooks"
    return None


def _choose(
    name: str,
    module: Linear,
    min_sparsity: float | None,
    held_as: torch.dtype | None,
    kept: str | None,
    timer: Timer,
) -> tuple[Choice, InferenceLinear | None]:
    weight = module.weight.t() if is_transposed(module) else module.weight
    if kept is None:
        kept = (SemiStructuredLinear if weight.is_cuda else BitmaskLinear).refusal(weight, held_as)
    sparsity = 0.0 if kept else 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    choice, form = _form(name, module, sparsity, min_sparsity, held_as, kept, timer)
    if form is None:
        return choice, None
    layer = _made(form, module, held_as)
    return replace(choice, form=layer.form), layer


def _form(
    name: str,
    module: Linear,
    sparsity: float,
    min_sparsity: float | None,
    held_as: torch.dtype | None,
    kept: str | None,
    timer: Timer,
) -> tuple[Choice, type[InferenceLinear] | None]:
    """What becomes of a layer: None for the form if it stays dense."""
    weight = module.weight.t() if is_transposed(module) else module.weight
    out, size = weight.shape[0], weight.shape[-1]
    if kept is not None:
        return Choice(name, (out, size), sparsity, None, False, kept), None
    least = least_sparsity(weight, held_as) if min_sparsity is None else min_sparsity
    if sparsity < least:
        return Choice(name, (out, size), sparsity, None, False, f"fewer than {least:.0%} of its weights are zero"), None
    if min_sparsity is not None:
        form = likely_form(weight, sparsity, held_as, timer.rows)
        return Choice(name, (out, size), sparsity, None, True, form=form.form), form
    form, speedup = timer.fastest(module, weight, sparsity, held_as)
    if speedup <= 1:
        return Choice(name, (out, size), sparsity, speedup, False, "the dense layer is faster"), None
    return Choice(name, (out, size), sparsity, speedup, True, form=form.form), form


def _made(form: type[InferenceLinear], module: Linear, held_as: torch.dtype | None) -> InferenceLinear:
    transposed = is_transposed(module)
    weight = module.weight.t() if transposed else module.weight
    layer = form(weight, module.bias, transposed=transposed, values=form.values_of(held_as))
    layer.trained = module.weight.requires_grad, module.bias is not None and module.bias.requires_grad
    return layer


def _dense(sparse: InferenceLinear) -> nn.Module:
    module = make_linear(
        sparse.in_features, sparse.out_features, bias=sparse.bias is not None, transposed=sparse.transposed
    )
    of_weight, of_bias = sparse.trained
    if sparse.tied:
        module.weight = sparse.tied[0]
    else:
        module.weight = nn.Parameter(sparse.dense_weight(), requires_grad=of_weight)
    if sparse.bias is not None:
        module.bias = nn.Parameter(sparse.bias.detach(), requires_grad=of_bias)
    return module.train(sparse.training)
