"""The kernels beside the step: cases that test_gpu_kernels.py runs in a process of their own.

They look at gradients, count zeros, and shrink what another optimizer has stepped.
"""

from __future__ import annotations

import pytest
import torch

from hf_pdecay.optim import decay_after_step as shrinking
from hf_pdecay.optim.gpu import count as gpu_count
from hf_pdecay.optim.gpu import decay as gpu_decay
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.tensor_step import Decay
from tests.helpers.gpu_steps import BF16, F16, F32, F64, SOME_PAIRS, hyper, made, needs_kernel, normal


@needs_kernel
class TestOthers:
    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_one_gradient_that_is_not_finite_is_seen(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        for size, place in ((1, 0), (1000, 999), (1025, 1024), (9000, 5000), (9000, 0)):
            for value in (float("nan"), float("inf"), -float("inf")):
                steps = [made(size, pair, seed=seed) for seed in range(3)]
                assert bool(gpu_step.Batch(steps).all_finite())
                steps[1].grad[place] = value
                assert not bool(gpu_step.Batch(steps).all_finite())
                assert not bool(gpu_step.Batch([steps[0], steps[1]._replace(hyper=hyper(lr=0.5))]).all_finite())

    def test_large_gradients_are_finite(self) -> None:
        for dtype in (F32, F64, BF16, F16):
            each = made(3000, (dtype, dtype))
            each.grad.fill_(torch.finfo(dtype).max)
            assert bool(gpu_step.Batch([each]).all_finite())

    @pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
    def test_counts(self, dtype: torch.dtype) -> None:
        tensors = []
        for size in (0, 1, 1023, 1024, 40_000):
            weights = normal(size, size).to(dtype)
            weights[::3] = 0
            weights[1::7] = 1e-15
            tensors.append(weights)
        tensors.append(normal(3001, 5).to(dtype)[1:])  # not aligned
        for threshold in (0.0, 1e-13, 1e-2):
            found = gpu_count.count_zeros(tensors, threshold)
            limit = torch.tensor(threshold, dtype=dtype)
            expected = [[int((each == 0).sum()), int((each.abs() < limit).sum())] for each in tensors]
            assert found.tolist() == expected
        assert all(gpu_count.countable(each) for each in tensors)
        assert not gpu_count.countable(normal(64, 0)[::2])

    @pytest.mark.parametrize("keep_zeros", [False, True])
    @pytest.mark.parametrize("p_norm", [0.5, 1.0, 1.9, 2.0, 3.0])
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    def test_shrinks_as_plain_operations_do(self, dtype: torch.dtype, p_norm: float, keep_zeros: bool) -> None:
        for strength in (0.1, torch.tensor(0.1), 1e-45, 0.0):
            for finite in (True, torch.tensor(True), torch.tensor(False)):
                ours, theirs = [], []
                for size in (1, 1024, 5000):
                    before = normal(size, size, 0.1).to(dtype)
                    before[::5] = 0
                    for some in (ours, theirs):
                        stepped = before.float() + normal(size, 3, 0.01) * finite  # where not, there was no step
                        weight = stepped.to(dtype)
                        some.append(shrinking.Stepped(weight, before, None, True, (2 << 20) + size))
                decay = Decay(p_norm, strength, keep_zeros, 7, finite)
                assert all(gpu_decay.takes(each) for each in ours)
                gpu_decay.decay_weights(ours, decay)
                for each in theirs:
                    shrinking._decay_batch([each], decay)
                for a, b in zip(ours, theirs, strict=True):
                    if dtype == F32:
                        torch.testing.assert_close(a.weight, b.weight, rtol=2e-5, atol=1e-9)
                    else:
                        assert float((a.weight != b.weight).double().mean()) < 2e-3 + 1.5 / a.weight.numel()
                    assert torch.equal(a.weight == 0, b.weight == 0)
