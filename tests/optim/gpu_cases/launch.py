"""How the Triton kernels are launched and compiled: cases that test_gpu_kernels.py runs in processes of their own.

In the last class they are compiled for GPUs that need not be there. In the others they run, in Triton's interpreter or
on a GPU.
"""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from hf_pdecay import AdamWLp
from hf_pdecay.optim.gpu import launch
from hf_pdecay.optim.gpu import step as gpu_step
from hf_pdecay.optim.tensor_step import Hyperparameters, TensorStep
from tests.helpers.gpu_steps import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    PAIRS,
    PLAIN,
    SIZES,
    SOME_PAIRS,
    WRITTEN,
    Launches,
    assert_like_foreach,
    cloned,
    hyper,
    made,
    needs_compiler,
    needs_kernel,
    normal,
)


@needs_kernel
class TestLaunches:
    def test_many_tensors_take_one_launch(self, launches: tuple[Launches, Launches]) -> None:
        prepare, update = launches
        steps = [made(size, seed=size) for size in SIZES]
        assert_like_foreach(steps)
        assert [grid for grid, *_ in prepare.calls] == [(1,)]
        assert [grid for grid, *_ in update.calls] == [(sum(-(-size // launch.CHUNK) for size in SIZES),)]

    def test_more_tensors_than_a_program_prepares(self, launches: tuple[Launches, Launches]) -> None:
        prepare, update = launches
        assert_like_foreach([made(seed % 2, seed=seed, steps=seed) for seed in range(140)])
        assert [grid for grid, *_ in prepare.calls] == [(2,)] and len(update.calls) == 1

    def test_a_launch_for_each_kind(self, launches: tuple[Launches, Launches]) -> None:
        other = hyper(p_norm=3.0)
        steps = [
            made(10),
            made(10, (BF16, BF16)),
            made(10, (BF16, F32)),
            made(10, settings=other),
            made(10, settings=other)._replace(awake=False),
        ]
        assert_like_foreach([*steps, *(cloned(each) for each in steps)])
        assert [len(kernel.calls) for kernel in launches] == [5, 5]

    def test_tensors_without_weights(self, launches: tuple[Launches, Launches]) -> None:
        empty, some = made(0), made(5)
        assert_like_foreach([empty, some, cloned(empty), cloned(some), cloned(empty), made(0)])
        assert len(launches[1].calls) == 1
        assert_like_foreach([cloned(empty)])
        assert len(launches[1].calls) == 1
        gpu_step.Batch([]).step()

    def test_any_address(self) -> None:
        for pair in ((F32, F32), (BF16, BF16), (F32, BF16), (F64, F64)):
            for shift in (1, 3):
                parts: dict[str, torch.Tensor] = {}
                each = made(3000, pair)
                for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
                    whole = torch.full((3009,), 7.0, dtype=getattr(each, name).dtype)
                    parts[name] = whole
                    whole[shift : shift + 3000] = getattr(each, name)
                inside = {name: whole[shift : shift + 3000] for name, whole in parts.items()}
                if shift == 3:  # only one of them is not aligned
                    inside = {**{name: getattr(each, name) for name in inside}, "exp_avg": inside["exp_avg"]}
                steps = [each._replace(**inside), made(10, pair)]
                words, _ = launch.rows_of_tensors(map(gpu_step._columns, steps))
                assert words[9 :: launch.COLUMNS.value].tolist() == [0, 1]
                assert_like_foreach(steps)
                for whole in parts.values():
                    assert bool((whole[:shift] == 7).all() and (whole[shift + 3000 :] == 7).all())

    @pytest.mark.parametrize("pair", SOME_PAIRS, ids=str)
    def test_finite_false_writes_nothing(self, pair: tuple[torch.dtype, torch.dtype]) -> None:
        steps = [made(size, pair, settings, size) for size in (3, 2000) for settings in (PLAIN, hyper(lambda_p=0.0))]
        before = [cloned(each) for each in steps]
        for finite in (torch.tensor(False), False):
            gpu_step.Batch(steps).step(finite)
        for a, b in zip(steps, before, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in WRITTEN)
        assert_like_foreach([each for each in steps if each.hyper is PLAIN], torch.tensor(True))

    @pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
    @pytest.mark.parametrize("capturing", [False, True])
    def test_the_host_never_waits(
        self, lr: float | torch.Tensor, capturing: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("prepare", "update"):  # the interpreter itself reads what the kernel reads
            monkeypatch.setattr(gpu_step, name, Launches(None, does=False))
        monkeypatch.setattr(launch, "_is_capturing", lambda device: capturing)
        names: set[str] = set()

        class OpLog(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.add(str(func))
                return func(*args, **(kwargs or {}))

        with OpLog():
            for settings in (hyper(lr=lr), hyper(lr=lr, keep_zeros=True), hyper(lr=lr, lambda_p=0.0)):
                steps = [made(50, pair, settings) for pair in PAIRS]
                names.clear()
                gpu_step.Batch([each._replace(awake=torch.tensor(True)) for each in steps]).step(torch.tensor(True))
                waits = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")
                assert names and not [name for name in names if any(wait in name for wait in waits)]

    def test_tables_are_kept_until_an_address_changes(self, launches: tuple[Launches, Launches]) -> None:
        _, update = launches
        steps = [made(10), made(20)]

        def table(settings: Hyperparameters = PLAIN) -> Any:
            gpu_step.Batch([each._replace(hyper=settings) for each in steps]).step()
            return update.calls[-1][1][0]

        first = table()
        assert table() is first
        assert table(hyper(lr=0.5, p_norm=3.0)) is first
        steps[1] = steps[1]._replace(grad=steps[1].grad.clone())
        second = table()
        assert second is not first and not torch.equal(second, first)
        assert table() is second
        steps[0] = steps[0]._replace(place=77)
        assert table() is not second
        assert launch._copied_table.cache_info().maxsize

    def test_a_gradient_that_moves_is_followed(self) -> None:
        each = made(100)
        for seed in range(4):
            each = each._replace(grad=normal(100, seed))
            assert_like_foreach([each])

    def test_tables_hold_no_tensor(self) -> None:
        import gc
        import weakref

        each = made(10)
        reference = weakref.ref(each.param)
        gpu_step.Batch([each]).step()
        del each
        gc.collect()
        assert reference() is None

    def test_a_table_filled_by_kernels_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = [made(size, seed=size) for size in (1, 7, 5000)]
        words, _ = launch.rows_of_tensors(map(gpu_step._columns, steps))
        device = torch.device(DEVICE)
        assert torch.equal(launch._filled_table(words, device), launch.table_of(words, device))
        large = array("q", [2**57 + 1, -3, 2**63 - 1, 0])
        assert launch._filled_table(large, device).tolist() == large.tolist()
        monkeypatch.setattr(launch, "_is_capturing", lambda device: True)
        kept = launch._copied_table.cache_info().currsize
        assert_like_foreach(steps)
        assert launch._copied_table.cache_info().currsize == kept

    def test_versions_are_bumped(self) -> None:
        each = made(10)
        version = each.param._version
        gpu_step.Batch([each]).step()
        assert each.param._version > version

    def test_refusals(self) -> None:
        each = made(4096)
        assert gpu_step.Batch.refusal(each) is None
        assert all(gpu_step.Batch.refusal(made(8, pair)) is None for pair in PAIRS)
        for refused, why in (
            (each._replace(exp_avg=each.exp_avg.double(), exp_avg_sq=each.exp_avg_sq.double()), "float64"),
            (each._replace(param=each.param.to("meta")), "meta"),
            (each._replace(grad=each.grad.half()), "dtype"),
            (each._replace(exp_avg_sq=each.exp_avg_sq.half()), "torch.float16"),
            (each._replace(grad=torch.zeros(2 * 4096)[::2]), "gaps"),
            (each._replace(step=each.step.double()), "float32"),
            (each._replace(step=torch.zeros(2)), "counter"),
            (each._replace(step=each.step.to("meta")), f"must be on {each.param.device}"),
            (each._replace(awake=torch.tensor(True, device="meta")), f"must be on {each.param.device}"),
            (each._replace(exp_avg=each.exp_avg[:-1]), "shape"),
            (each._replace(grad=torch._neg_view(each.grad)), "as they are in memory"),
        ):
            assert why in (gpu_step.Batch.refusal(refused) or "")
        subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
        eight = subclass_8bit.OptimState8bit.zeros((4096,), signed=True, block_size=256)
        assert "both moments in 8 bits" in (gpu_step.Batch.refusal(each._replace(exp_avg=eight)) or "")

    @pytest.mark.parametrize("moments", [None, "bfloat16"])
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_optimizer(self, moments: str | None, dtype: torch.dtype) -> None:
        models = []
        for backend in ("triton", "foreach"):
            parameters = [torch.nn.Parameter(normal(n, n).view(-1, 2).to(dtype)) for n in (6, 600, 3000)]
            parameters.append(torch.nn.Parameter(torch.zeros(50, dtype=dtype)))
            optimizer = AdamWLp(
                [{"params": parameters[:2], "p_norm": 1.0}, {"params": parameters[2:]}],
                lr=0.01,
                weight_decay=0.1,
                moments=moments,
                backend=backend,
            )
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
            for seed in range(3):
                for p in parameters:
                    p.grad = normal(p.numel(), seed).view_as(p).to(dtype)
                optimizer.step()
                schedule.step()
            models.append(parameters)
            assert optimizer.backends[DEVICE][0] == backend
        for ours, theirs in zip(*models, strict=True):
            close = (ours - theirs).abs() <= 2e-5 if dtype == F32 else ours == theirs
            assert float(close.double().mean()) >= (1.0 if dtype == F32 else 0.99)


# --- compiled for GPUs, without one

NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], target: Any) -> dict[str, Any]:
    """The assembly of a kernel for the arguments of a launch."""
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name.isupper()}
    signature = dict.fromkeys(constants, "constexpr")
    for param, value in zip(kernel.params, args, strict=False):
        if isinstance(value, torch.Tensor):
            signature[param.name] = "*" + {**NAMES, torch.int64: "i64", torch.bool: "i1"}[value.dtype]
        elif value is None:
            signature[param.name], constants[param.name] = "constexpr", None
        else:
            signature[param.name] = {"int32": "i32", "int64": "i64"}.get(param.annotation, param.annotation)
    signature = {param.name: signature[param.name] for param in kernel.params}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    settings = {name: value for name, value in options.items() if not name.isupper()}
    return triton.compile(source, target=target, options=settings).asm  # type: ignore[no-any-return]


def compiles_for_hip(step: TensorStep, launches: tuple[Launches, Launches]) -> None:
    """Check that both kernels of a step compile for an AMD GPU."""
    from triton.backends.compiler import GPUTarget

    gpu_step.Batch([step]).step(torch.tensor(True))
    for kernel in launches:
        for _, *arguments in kernel.calls:
            try:
                assembly = compiled(kernel.kernel, *arguments, GPUTarget("hip", "gfx942", 64))
            except Exception as error:
                if "ld.lld" not in str(error):
                    raise
                pytest.skip("older releases of triton bring no linker for AMD's GPUs")
            assert "amdgcn" in assembly


@needs_compiler
class TestCompiled:
    def test_works_on_gpus_only(self) -> None:
        assert "not on cpu" in (gpu_step.Batch.refusal(made(5)) or "")
        with pytest.raises(ValueError, match="backend='triton' cannot do the step.*GPU, not on cpu"):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            AdamWLp([p], backend="triton").step()

    @pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F64, F64)], ids=str)
    def test_compiles_for_cuda(
        self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]
    ) -> None:
        from triton.backends.compiler import GPUTarget

        gpu_step.Batch([made(5, pair)]).step()
        gpu_step.Batch([made(5, pair, hyper(lambda_p=0.0))]).step()
        for _, *arguments in launches[1].calls:
            assembly = compiled(gpu_step.update.kernel, *arguments, GPUTarget("cuda", 80, 32))
            ptx = assembly["ptx"]
            # Of whole blocks a thread loads its eight elements by 16 bytes.
            wide = ".v2.b64" if pair[0] == F64 else ".v4.b32"
            loads = sum(2 * {F64: 4, F32: 2}.get(dtype, 1) for dtype in pair)
            assert ptx.count(f"ld.global{wide}") == loads
            assert ptx.count(f"st.global{wide}") >= 3
            # These take denormal numbers for 0, and nothing else may.
            flushing = {word for word in ptx.split() if ".ftz." in word and word.endswith(".f32")}
            assert pair[0] == F64 or flushing <= {"ex2.approx.ftz.f32", "sqrt.approx.ftz.f32"}, flushing

    @pytest.mark.parametrize("pair", [(F32, F32), (F16, F16), (F64, F64)], ids=str)
    def test_what_tensors_share_compiles_for_cuda(
        self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]
    ) -> None:
        from triton.backends.compiler import GPUTarget

        if pair == (F32, F32):
            gpu_step.Batch([made(5, pair)]).step()
        else:
            gpu_step.Batch([made(5, pair, hyper(lr=torch.tensor(0.1)))]).step(torch.tensor(True))
        for _, *arguments in launches[0].calls:
            assert "ptx" in compiled(gpu_step.prepare.kernel, *arguments, GPUTarget("cuda", 80, 32))

    @pytest.mark.parametrize("pair", [(F32, BF16)], ids=str)
    def test_compiles_for_hip(self, pair: tuple[torch.dtype, torch.dtype], launches: tuple[Launches, Launches]) -> None:
        compiles_for_hip(made(5, pair), launches)

    def test_nothing_that_changes_is_a_constant(self) -> None:
        constants = {"PARAM", "MOMENT", "DECAY", "TO_BASE", "NEAREST", "CHUNK", "BLOCK", "ROWS"}
        for kernel in (gpu_step.prepare, gpu_step.update):
            for param in kernel.params:
                assert param.is_constexpr == (param.name in constants), param.name
                if not param.is_constexpr and param.name not in ("table", "shared"):
                    assert param.do_not_specialize, param.name
                if param.name not in (*constants, "table", "shared", "encoding", "units", "finite", "rate"):
                    assert param.annotation_type in ("i32", "i64"), param.name

    def test_nothing_is_compiled_again(self, launches: tuple[Launches, Launches]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime import jit

        bind = getattr(jit, "create_function_from_signature", None)
        if bind is None:
            pytest.skip("this release of triton finds its compiled kernels another way")
        backend = make_backend(GPUTarget("cuda", 80, 32))
        for settings in (
            PLAIN,
            hyper(lr=0.0, weight_decay=0.0, eps=1.0),
            hyper(lr=5e-324, p_norm=1.0, lambda_p=16.0),
            hyper(lr=1.0, p_norm=16.0, beta1=0.0, beta2=0.5, maximize=True),
            hyper(keep_zeros=True, maximize=True),
        ):
            for count in (1, 2, 16):
                gpu_step.Batch([made(count * 16, settings=settings, steps=count) for _ in range(count)]).step()
        for kernel in launches:
            binder = bind(kernel.kernel.signature, kernel.kernel.params, backend)
            keys = {str(binder(*args, **options)[1:]) for _, args, options in kernel.calls}
            assert len(keys) == 1, keys
