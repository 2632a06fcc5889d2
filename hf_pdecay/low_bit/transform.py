"""Rounding to codes in training: the forward value is what codes stand for, and the gradient passes through.

The transform is that of "Robust Training of Neural Networks at Arbitrary Precision and Sparsity"
(https://huggingface.co/papers/2409.09245). A block x of n weights has the codes q = round((x - b) / t), with a step t
and an offset b that are constants of the block. They stand for w = s (q - c) + m, the ridge regression of x on q:

    linear:  s = mean(q x) / (mean(q²) + λ),      c = m = 0
    affine:  s = Cov(q, x) / (Var(q) + λ),        c = mean(q), m = mean(x)

The gradient of a code is 1 / t, as if it had not been rounded, and nothing of the regression is detached. With g the
gradient of w, d = Σ g (q - c), e = n (mean(q²) + λ) or n (Var(q) + λ), and bars for means (0 if linear), that of x is

    ḡ + (s / t) (g - ḡ) + (d / e) ((x - m) / t + (1 - 2 s / t) (q - c)).

A block whose weights are all alike has no scale: it stays as it is, and so does its gradient. The inputs of layers are
rounded in the same way.

What is written into the model is s q, or s (q - a) + o with a the least code of the block and o = m + s (a - c), where
s and o are rounded to bfloat16. So a product of a code and a scale is exact in float32, every device computes the same
weights, and a file can have them as codes, scales and offsets. The gradient does not see this rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compiled import is_able, round_compiled
from .grid import BLOCK, Grid


RIDGE = 0.01
"""λ of the regression, in units of squared codes."""

_MOST = torch.finfo(torch.float16).max
_LEAST = 1e-15  # of a range of weights: squares of smaller ones would underflow in float32


class Layout(NamedTuple):
    """How a tensor is seen as blocks: as ``(outer, inputs, inner)``, with blocks along the inputs."""

    outer: int
    inputs: int
    inner: int


class Fit(NamedTuple):
    """What a block's weights have in common; each of shape (outer, blocks, 1, inner), or None without an offset.

    Attributes:
        step: t.
        offset: b.
        scale: s.
        code: c, the mean of the codes.
        mean: m, the mean of the weights.
        energy: e.
    """

    step: Tensor
    offset: Tensor | None
    scale: Tensor
    code: Tensor | None
    mean: Tensor | None
    energy: Tensor
    alike: Tensor


def round_blocks(weight: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """Return what the codes of a tensor stand for, in its shape and dtype; the gradient passes through the rounding.

    Args:
        weight: A float tensor, of weights or of a layer's inputs. It is computed with in float32, or float64 if it is.
        layout: Where its inputs are; the last block of a row may be shorter than the others.
        grid: The codes.
    """
    rounded: Tensor = _Rounding.apply(weight, layout, grid)
    return rounded


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, layout: Layout, grid: Grid) -> Tensor:
        ctx.layout, ctx.grid = layout, grid
        ctx.compiled = is_able(weight)
        if ctx.compiled:
            ctx.save_for_backward(weight)
            return round_compiled(weight, None, layout, grid)
        result = torch.empty_like(weight, memory_format=torch.contiguous_format)
        fits: list[Tensor | None] = []
        for blocks, out in zip(_blocks(weight, layout), _blocks(result, layout), strict=True):
            wide = _wide(blocks)
            step, offset, alike = _steps(wide, grid)
            codes = _codes(wide, step, offset, grid)
            fit = _fit(wide, codes, step, offset, alike, grid)
            _decode(codes, fit, wide, out)
            fits += fit
        ctx.save_for_backward(weight, *fits)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, *saved = ctx.saved_tensors
        if ctx.compiled:
            return round_compiled(weight, grad, ctx.layout, ctx.grid), None, None
        result = torch.empty_like(weight, memory_format=torch.contiguous_format)
        grad = grad.contiguous()
        parts = zip(*(_blocks(each, ctx.layout) for each in (weight, grad, result)), strict=True)
        for number, (blocks, above, out) in enumerate(parts):
            fit = Fit(*saved[number * len(Fit._fields) : (number + 1) * len(Fit._fields)])
            wide, above = _wide(blocks), _wide(above)
            codes = _codes(wide, fit.step, fit.offset, ctx.grid)
            _pull_back(wide, codes, above, fit, out)
        return result, None, None


def _blocks(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """Views of a tensor as (outer, blocks, size, inner): of its whole blocks, and of the shorter last ones."""
    rows = tensor.reshape(layout)
    whole = layout.inputs // BLOCK * BLOCK
    views = []
    if whole:
        views.append(rows[:, :whole].unflatten(1, (-1, BLOCK)))
    if whole < layout.inputs:
        views.append(rows[:, whole:].unsqueeze(1))
    return views


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _steps(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return t and b, and whether the weights of a block are all alike."""
    if grid.affine:
        least, most = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
        alike = most - least < _LEAST
        if grid.step is None:
            step = (most - least) / (grid.high - grid.low)
            return torch.where(alike, 1.0, step), least - grid.low * step, alike
        mean = x.mean(2, keepdim=True)
        deviation = torch.linalg.vector_norm(x - mean, dim=2, keepdim=True) / x.shape[2] ** 0.5
        step = grid.step * deviation
        return torch.where(alike, 1.0, step), mean - grid.middle * step, alike
    largest = torch.linalg.vector_norm(x, torch.inf, dim=2, keepdim=True)
    alike = largest < _LEAST
    if grid.step is None:
        step = largest / grid.high
    else:
        count = (x != 0).sum(2, keepdim=True).clamp_(min=1).to(x.dtype)
        step = grid.step * torch.linalg.vector_norm(x, dim=2, keepdim=True) / count.sqrt()
    return torch.where(alike, 1.0, step), None, alike


def _codes(x: Tensor, step: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    if grid.odd:
        size = (x.abs() / (2 * step)).floor_().mul_(2).add_(1).clamp_(max=grid.high)
        return size.mul_(x.sign())
    steps = x / step if offset is None else (x - offset).div_(step)
    codes = steps.round_().clamp_(grid.low, grid.high)
    return codes.add_(x.sign().mul_(codes == 0)) if grid.nonzero else codes


def _fit(x: Tensor, codes: Tensor, step: Tensor, offset: Tensor | None, alike: Tensor, grid: Grid) -> Fit:
    size = x.shape[2]
    if offset is None:
        energy = codes.square().sum(2, keepdim=True).add_(RIDGE * size)
        scale = (codes * x).sum(2, keepdim=True).div_(energy)
        return Fit(step, None, scale, None, None, energy, alike)
    code, mean = codes.mean(2, keepdim=True), x.mean(2, keepdim=True)
    centred = codes - code
    energy = centred.square().sum(2, keepdim=True).add_(RIDGE * size)
    scale = (centred * (x - mean)).sum(2, keepdim=True).div_(energy)
    return Fit(step, offset, scale, code, mean, energy, alike)


def _decode(codes: Tensor, fit: Fit, x: Tensor, out: Tensor) -> None:
    scale = _narrow(fit.scale)
    if fit.code is None or fit.mean is None:
        fitted = (codes * scale).add_(0.0)  # no zero is negative
    else:
        least = codes.amin(2, keepdim=True)
        base = _clamped(_narrow(fit.mean + scale * (least - fit.code)), out.dtype).to(out.dtype).to(x.dtype)
        fitted = torch.where(fit.alike, x, (codes - least) * scale + base)
    out.copy_(_clamped(fitted, out.dtype))


def _narrow(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def _clamped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that the dtype has: the last code may stand for a little more than the largest number of float16."""
    return values.clamp(-_MOST, _MOST) if dtype == torch.float16 else values


def _pull_back(x: Tensor, codes: Tensor, above: Tensor, fit: Fit, out: Tensor) -> None:
    if fit.code is not None and fit.mean is not None:
        codes, x = codes - fit.code, x - fit.mean
        base = above.mean(2, keepdim=True)
        centred = above - base
    else:
        base, centred = None, above
    ratio = fit.scale / fit.step
    pull = (above * codes).sum(2, keepdim=True) / fit.energy
    result = centred * ratio
    if base is not None:
        result += base
    result.addcmul_(x, pull / fit.step).addcmul_(codes, pull * (1 - 2 * ratio))
    out.copy_(torch.where(fit.alike, above, result))
