"""The sparse layers beside products in float64, on every set of instructions that this machine runs."""

from __future__ import annotations

import copy
import ctypes
import itertools
import pickle
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay.inference import bitmask_linear, kernels, sparse_linear
from hf_pdecay.inference.bitmask_linear import BitmaskLinear
from hf_pdecay.inference.cpu_linear import CpuLinear
from hf_pdecay.inference.sparse_linear import SparseLinear


BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
INT8 = 1 / 32767  # of the greatest activation: half of a step of 16 bits for each, and float32's sums
FORMS = [SparseLinear, BitmaskLinear]
VALUES = [None, torch.float32, torch.bfloat16, torch.float16, torch.int8]
# Flags of the compiler for each set of instructions, and what Linux calls it.
PATHS = {
    "AVX-512 without VBMI2": ("-march=skylake-avx512", "avx512bw"),
    "AVX2": ("-mavx2 -mfma -mf16c", "avx2"),
    "plain": ("", ""),
}


def sparse_weight(out: int, size: int, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator)
    return weight * (torch.rand(out, size, generator=generator) >= zeros)


def use(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sparse_linear, bitmask_linear):
        monkeypatch.setattr(module, "library", lambda: library)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The products for sets of instructions that this machine has."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    folder = tmp_path_factory.mktemp("products")
    source = folder / "products.cpp"
    source.write_text("\n".join(path.read_text() for path in kernels.SOURCES))
    libraries = {}
    for name, (flags, needed) in PATHS.items():
        if "x86" in cpu or needed in cpu:
            if not shutil.which("g++"):
                break
            target = folder / f"{name.replace(' ', '_')}.so"
            options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-uninitialized"]
            command = ["g++", *options, "-Wno-maybe-uninitialized", *flags.split(), str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
            libraries[name] = kernels.declared(ctypes.CDLL(str(target)))
    return libraries


@pytest.fixture(params=["compiled", "torch", *PATHS])
def path(request: pytest.FixtureRequest, built: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> str:
    """By the C++ function, as where no compiler is, and on other processors."""
    if request.param == "torch":
        use(None, monkeypatch)
    elif request.param == "compiled":
        assert kernels.library() is not None
    elif request.param not in built:
        pytest.skip("this machine has neither g++ nor these instructions")
    else:
        use(built[request.param], monkeypatch)
    return str(request.param)


def with_threads(threads: int, layer: CpuLinear, x: Tensor) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return layer(x)  # type: ignore[no-any-return]
    finally:
        torch.set_num_threads(before)


def check(layer: CpuLinear, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Compare a result with the product in float64 of what the layer holds."""
    weight = layer.dense_weight().double()
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ weight.abs().t() + 1 + (0 if bias is None else bias.double().abs())
    bound = BOUNDS[layer.dtype] * sizes
    if layer._held_as == torch.int8 and x.numel():
        bound = bound + INT8 * x.double().abs().amax(-1, keepdim=True) * weight.abs().sum(1)
    if layer._held_as != layer.dtype:  # the weight that is computed with is not rounded to the layer's dtype
        bound = bound + BOUNDS[layer.dtype] * sizes
    assert y.dtype == layer.dtype and y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound).all())


@settings(deadline=None, max_examples=250)
@given(
    st.sampled_from(FORMS),
    st.sampled_from(VALUES),
    st.integers(1, 80),
    st.integers(1, 300),
    st.integers(0, 140),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(list(BOUNDS)),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_equals_the_product_in_float64(
    form: type[CpuLinear],
    values: torch.dtype | None,
    out: int,
    size: int,
    rows: int,
    zeros: float,
    dtype: torch.dtype,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    weight = sparse_weight(out, size, zeros, seed).to(dtype)
    x, bias = torch.randn(rows, size).to(dtype), torch.randn(out).to(dtype) if biased else None
    layer = form(weight, bias, values=form.values_of(values))
    check(layer, x, bias, with_threads(threads, layer, x))
    assert layer.sparsity == pytest.approx(float((weight == 0).double().mean()))


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_path_gives_the_product(
    path: str, form: type[CpuLinear], dtype: torch.dtype, values: torch.dtype | None
) -> None:
    for shape in ((37, 130), (64, 576)):
        for zeros in (0.0, 0.6, 1.0):
            weight, bias = sparse_weight(*shape, zeros).to(dtype), torch.randn(shape[0]).to(dtype)
            layer = form(weight, bias, values=form.values_of(values))
            for rows in (1, 2, 3, 6, 7, 65, 130):
                x = torch.randn(rows, shape[1]).to(dtype)
                check(layer, x, bias, layer(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 40, 601])  # of the last a thread takes whole blocks
@pytest.mark.parametrize("shape", [(700, 300), (64, 2500)])
@pytest.mark.parametrize("form", FORMS)
def test_large_products(form: type[CpuLinear], path: str, shape: tuple[int, int], rows: int, threads: int) -> None:
    weight, x, bias = sparse_weight(*shape, 0.95), torch.randn(2, rows, shape[1]), torch.randn(shape[0])
    y = with_threads(threads, form(weight, bias), x)
    torch.testing.assert_close(y, (x.double() @ weight.double().t() + bias.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_views_and_transposed_activations_are_read_as_they_are(form: type[CpuLinear]) -> None:
    layer, dense = form(weight := sparse_weight(20, 30, 0.8)), weight.double()
    for x in (torch.randn(30, 17).t(), torch.randn(30, 70).t(), torch.randn(5, 60)[:, ::2]):
        torch.testing.assert_close(layer(x).double(), x.double() @ dense.t(), rtol=1e-4, atol=1e-4)
    assert layer(torch.randn(30)).shape == (20,)


@pytest.mark.parametrize("form", FORMS)
def test_wrong_activations_and_weights_are_named(form: type[CpuLinear]) -> None:
    layer = form(sparse_weight(4, 6, 0.5))
    with pytest.raises(RuntimeError, match=r"x of shape \(3, 5\) for a layer of in_features=6"):
        layer(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match=r"x of torch.float64 for a layer of torch.float32"):
        layer(torch.randn(3, 6).double())
    with pytest.raises(ValueError, match="3 dimensions, not 2"):
        form(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="beyond 65504, which float16 cannot hold"):
        form(torch.full((2, 2), 1e5), values=torch.float16)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite weights, which int8 cannot hold"):
            BitmaskLinear(torch.full((2, 2), bad), values=torch.int8)


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_are_dense_and_load_and_dtypes_move(form: type[CpuLinear], values: torch.dtype | None) -> None:
    weight, bias = sparse_weight(6, 300, 0.7), torch.randn(6)
    layer = form(weight, bias, values=form.values_of(values))
    held = layer.dense_weight()
    assert torch.equal(held, weight) or values not in (None, torch.float32)
    assert bool(((held != 0) <= (weight != 0)).all())
    state = layer.state_dict()
    assert set(state) == {"weight", "bias"} and torch.equal(state["weight"], held)
    assert torch.equal(layer.weight.to_dense(), held)
    other = form(torch.zeros(6, 300), torch.zeros(6), values=form.values_of(values))
    other.load_state_dict(state)
    torch.testing.assert_close(other.dense_weight(), held, rtol=1e-6, atol=0)
    assert torch.equal(other.bias, bias) and other._held_as == layer._held_as
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict({"weight": torch.zeros(5, 5), "bias": bias})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"bias": bias})
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(moved.dense_weight(), held.bfloat16())
    check(moved, x := torch.randn(3, 300).bfloat16(), moved.bias, moved(x))
    back = pickle.loads(pickle.dumps(moved)).float()
    rounded = form.values_of(values) != torch.int8  # floats round with the layer; integers and their scales do not
    assert torch.equal(back.dense_weight(), held.bfloat16().float() if rounded else held)
    assert torch.equal(layer.dense_weight(), held)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_gives_its_dtype(form: type[CpuLinear]) -> None:
    for rows in (3, 100):
        layer, x = form(sparse_weight(6, 5, 0.7)), torch.randn(rows, 5)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(("out", "size"), [(3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("shape", [(), (2,), (2, 0), (0, 2)])
@pytest.mark.parametrize("values", [None, torch.int8])
@pytest.mark.parametrize("form", FORMS)
def test_layers_without_weights(
    form: type[CpuLinear], values: torch.dtype | None, out: int, size: int, shape: tuple[int, ...], path: str
) -> None:
    layer = form(torch.zeros(out, size), torch.arange(out).float(), values=form.values_of(values))
    y = layer(torch.randn(*shape, size))
    assert torch.equal(y, torch.arange(out).float().expand(*shape, out))


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("values", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_comes_out_as_from_a_dense_layer(
    dtype: torch.dtype, values: torch.dtype | None, bad: float, rows: int, path: str
) -> None:
    """A NaN or infinity of one row of x stays in that row."""
    weight = (sparse_weight(20, 70, 0.5).abs() + 0.1 * torch.eye(20, 70)).to(dtype)
    layer, x = BitmaskLinear(weight, values=values), torch.randn(rows, 70).to(dtype)
    clean = layer(x)
    x[-1, 3] = bad
    y = layer(x)
    assert not bool(y[-1].isfinite().any())
    tolerance = 1e-2 if dtype == torch.float32 else 1e-1  # the sums may be those of another product
    torch.testing.assert_close(y[:-1], clean[:-1], rtol=1e-2, atol=tolerance)


def test_int8_has_a_scale_for_each_block_and_its_rows_of_zeros_stay(path: str) -> None:
    weight = sparse_weight(5, 600, 0.5)
    weight[:, 256:512] *= 1e-4
    weight[2] = 0
    weight[3, 512:] = 0
    layer = BitmaskLinear(weight, values=torch.int8)
    for first, last in ((0, 256), (256, 512), (512, 600)):
        block = weight[:, first:last]
        off = (layer.dense_weight()[:, first:last] - block).abs()
        assert bool((off <= block.abs().amax(1, keepdim=True) / 254 * 1.001).all())
    assert not layer.dense_weight()[2].any() and layer(torch.randn(4, 600))[:, 2].abs().max() < 1e-6
    few_zeros = BitmaskLinear(sparse_weight(5, 600, 0.05), values=torch.int8)
    assert few_zeros.masks is None and few_zeros.form == "dense" and layer.form == "bitmask"
    assert layer.stored_bytes < 5 * 600 * (1 / 8 + 1)


def test_tiny_and_huge_activations(path: str) -> None:
    """The scale of 16-bit activations neither overflows nor vanishes."""
    weight = sparse_weight(8, 100, 0.5)
    layer = BitmaskLinear(weight, values=torch.int8)
    for size, rows in itertools.product((1e-44, 1e-38, 1e-30, 1e30), (2, 40)):
        x = torch.full((rows, 100), size)
        expected = x.double() @ layer.dense_weight().double().t()
        assert bool(((layer(x).double() - expected).abs() <= 1e-3 * expected.abs().max() + 1e-44).all())
    assert not layer(torch.zeros(2, 100)).abs().max() > 0


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_many_rows_meet_lists_of_the_values(dtype: torch.dtype, values: torch.dtype | None, path: str) -> None:
    """Rows, columns and rows of W that fill no block, beside those that do, of any values for any activations."""
    compiled = bitmask_linear.library()
    for zeros in (0.0, 0.4, 0.9, 0.999):
        for out, size, rows in ((1, 1, 25), (40, 256, 32), (33, 515, 95), (150, 770, 64), (17, 64, 100)):
            weight, bias = sparse_weight(out, size, zeros).to(dtype), torch.randn(out).to(dtype)
            layer, x = BitmaskLinear(weight, bias, values=values), torch.randn(rows, size).to(dtype)
            by_lists = layer._by_lists(compiled, x, dtype) if compiled else None
            assert (by_lists is None) == (path in ("torch", "plain"))
            for threads in (1, 2):
                y = with_threads(threads, layer, x)
                check(layer, x, bias, y)
                if by_lists is not None and (values == torch.int8 or layer.sparsity >= 0.48 or rows <= 64):
                    assert torch.equal(y, by_lists.to(dtype))
                elif by_lists is not None:
                    check(layer, x, bias, by_lists.to(dtype))


def test_the_greatest_sums_of_16_bits_do_not_overflow(path: str) -> None:
    """256 products of the greatest numbers, of either sign."""
    layer = BitmaskLinear(torch.tensor([[1.0], [-1.0]]).expand(2, 512), values=torch.int8)
    for rows in (1, 4, 6, 40):
        for size in (3.0, -3.0):
            y = layer(torch.full((rows, 512), size))
            torch.testing.assert_close(y, torch.tensor([512.0, -512.0]).mul(size).expand(rows, 2), rtol=1e-4, atol=0)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="large pages are asked for on Linux only")
@pytest.mark.parametrize("form", FORMS)
def test_large_weights_lie_in_large_pages(form: type[CpuLinear]) -> None:
    """Linux says for which memory it was asked for them: whole pages of the values, and nothing around them."""
    layer = form(sparse_weight(2048, 2048, 0.4))
    values = layer.values
    assert values.is_contiguous() and values.data_ptr() % (2 << 20) == 0
    maps = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)*?VmFlags:(.*)$", Path("/proc/self/smaps").read_text(), re.M)
    flags = {int(first, 16): (int(last, 16), text.split()) for first, last, text in maps}
    last, given = flags[values.data_ptr()]
    assert "hg" in given and last - values.data_ptr() == values.nbytes // (2 << 20) * (2 << 20)
    small = form(sparse_weight(64, 64, 0.4))
    assert len(pickle.dumps(layer)) < layer.stored_bytes + 20000 and small.values.nbytes < 1 << 20
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.values, values) and torch.equal(layer.dense_weight(), sparse_weight(2048, 2048, 0.4))


def test_columns_take_two_bytes_where_they_fit() -> None:
    for size, dtype in ((65536, torch.int16), (65537, torch.int32)):
        weight = torch.zeros(2, size)
        weight[:, -1] = weight[1, 7] = 1.5
        layer = SparseLinear(weight)
        assert layer.columns.dtype == dtype and torch.equal(layer.dense_weight(), weight)
        x = torch.randn(3, size)
        torch.testing.assert_close(layer(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def on_arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a program for 64-bit ARM that multiplies what a file holds."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("no compiler or no emulator for 64-bit ARM (apt install g++-aarch64-linux-gnu qemu-user-static)")
    folder = tmp_path_factory.mktemp("arm")
    source, program = folder / "harness.cpp", folder / "harness"
    parts = [*kernels.SOURCES, Path(__file__).with_name("harness.cpp")]
    source.write_text("\n".join(path.read_text() for path in parts))
    command = [compiler, "-std=c++17", "-O2", "-static", "-fopenmp", "-Wall", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning: unused" not in done.stderr, done.stderr
    return [emulator, str(program)]


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_arm_gives_the_product(on_arm: list[str], values: torch.dtype | None, tmp_path: Path) -> None:
    for zeros in (0.05, 0.6):
        for rows in (1, 3, 7):
            weight, bias, x = sparse_weight(37, 130, zeros), torch.randn(37), torch.randn(rows, 130)
            layer = BitmaskLinear(weight, bias, values=values)
            head = torch.tensor([kernels.kind_of(layer.values), 37, 130, rows, layer._block])
            none = torch.empty(0)
            masks = none if layer.masks is None else layer.masks
            arrays = [
                *((head, 8), (masks, 8), (layer.starts, 8), (layer.values, 1)),
                *((layer.scales, 4), (layer.shifts, 4), (bias, 4), (x, 4)),
            ]
            with open(tmp_path / "in", "wb") as file:
                for array, size in arrays:
                    content = (none if array is None else array).contiguous().view(torch.uint8).numpy().tobytes()
                    file.write(struct.pack("<q", len(content) // size) + content)
            subprocess.run([*on_arm, str(tmp_path / "in"), str(tmp_path / "out")], check=True)
            found = torch.from_numpy(np.fromfile(tmp_path / "out", dtype=np.float32))
            check(layer, x, bias, found[: rows * 37].view(rows, 37))
            torch.testing.assert_close(found[rows * 37 :].view(37, 130), layer.dense_weight(), rtol=1e-6, atol=0)
