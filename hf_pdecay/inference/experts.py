"""The matrices of fused experts in sparse forms, in place of the parameter of three dimensions that held them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.matrices import Matrix, matrices_of
from .cpu_linear import CpuLinear, DenseWhenUsed


_INSIDE = "stack"
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class ExpertStack(nn.Module):
    """Stands in for a parameter of shape (experts, …, …) that a module indexes by an expert and multiplies by.

    What an index gives multiplies as its sparse layer does in ``torch.nn.functional.linear`` and ``@``, and becomes
    dense in other operations. In a state dict it is the one dense tensor.

    Args:
        layers: One for each expert.
        trained: Whether the parameter is trained.
        implementation: How the model's experts multiplied before, as transformers names it; None if it does not say.
    """

    def __init__(self, layers: Sequence[CpuLinear], *, trained: bool, implementation: str | None) -> None:
        super().__init__()
        self.layers = tuple(layers)  # which hides them from nn.Module: they have no names of their own
        self.trained, self.implementation = trained, implementation

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense parameter."""
        weight: Tensor = self.layers[0].weight
        return torch.Size((len(self.layers), *weight.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense parameter."""
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the dense parameter."""
        weight: Tensor = self.layers[0].weight
        return weight.device

    def dense(self) -> Tensor:
        """Return the dense parameter."""
        return torch.stack([layer.dense_weight() for layer in self.layers])

    def __getitem__(self, index: Any) -> Tensor:
        """Return the matrix of an expert; of other indices, that part of the dense parameter."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool):
            return _ExpertMatrix(self.layers[int(index)])
        return self.dense()[index]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertStack:
        super()._apply(fn, recurse)
        for layer in self.layers:
            layer._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.dense()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        name = prefix.removesuffix(".")
        weight = state_dict.pop(f"{prefix}{_INSIDE}", None)
        if weight is None:
            missing.append(name)
        elif weight.shape != self.shape:
            errors.append(f"size mismatch for {name}: {tuple(weight.shape)} is given, {tuple(self.shape)} is here.")
        else:
            for layer, matrix in zip(self.layers, weight, strict=True):
                layer.load_state_dict({"weight": matrix})

    def extra_repr(self) -> str:
        """Return the text between the parentheses."""
        return f"{len(self.layers)} × {self.layers[0]}"


class _LoadsStack:
    """Before a module loads a state dict, names the tensor of its stack as one inside of it, so that it gets it."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        name = f"{prefix}{self.key}"
        if isinstance(getattr(module, self.key, None), ExpertStack) and name in state_dict:
            state_dict[f"{name}.{_INSIDE}"] = state_dict.pop(name)


def put_stack(module: nn.Module, key: str, stack: ExpertStack) -> None:
    """Put a stack in the place of a module's parameter."""
    delattr(module, key)
    setattr(module, key, stack)
    module.register_load_state_dict_pre_hook(_LoadsStack(key))  # which does nothing once the stack has gone


class _ExpertMatrix(DenseWhenUsed):
    """The matrix of one expert."""

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Multiply as the sparse layer does."""
        given = dict(kwargs or {})
        weight = args[1] if len(args) > 1 else given.get("weight")
        if isinstance(weight, cls) and not isinstance(args[0] if args else None, cls):
            if func is functional.linear and not weight.layer.transposed:
                bias = args[2] if len(args) > 2 else given.get("bias")
                y = weight.layer(args[0] if args else given["input"])
                return y if bias is None else y + bias
            if func in _MATMULS and weight.layer.transposed and args[0].dim() < 3:
                return weight.layer(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)


def expert_stacks(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Matrix]]:
    """Yield each stack of fused experts: the module that has it, its key there, its name and the parameter."""
    for path, module in model.named_modules():
        held = {id(param): key for key, param in module.named_parameters(recurse=False)}
        for matrix in matrices_of(module):
            if matrix.stacked and matrix.transposed is not None and id(matrix.weight) in held:
                key = held[id(matrix.weight)]
                yield module, key, f"{path}.{key}" if path else key, matrix


def set_experts(model: nn.Module, implementation: str) -> str | None:
    """Set how the experts of a model of transformers multiply; return how they did, or None if it does not say."""
    owner: Any = next((each for each in model.modules() if hasattr(each, "set_experts_implementation")), None)
    before = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    if before is None or before == implementation:
        return None
    owner.set_experts_implementation(implementation)
    return str(before)
