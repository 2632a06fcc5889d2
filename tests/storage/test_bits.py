"""The compiled functions beside numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from hf_pdecay.storage import bits, packed


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(bits, "library", lambda: None)
    else:
        monkeypatch.setattr(bits, "_compiling", True)
        if bits.library() is None:
            pytest.skip("needs a C++ compiler")
    return str(request.param)


SHAPES = ((1, 1), (1, 200), (7, 9), (64, 64), (65, 127), (130, 72), (300, 3), (3, 300))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_and_transposed(way: str, shape: tuple[int, int], size: int) -> None:
    numbers = np.random.default_rng(0)
    for density in (0, 0.1, 0.5, 1):
        marks = numbers.random(shape) < density
        dense = numbers.integers(1, 255, shape).astype(f"<u{size}") << 8 * (size - 1)  # the sign bit too
        dense *= marks
        flat = np.packbits(marks, bitorder="little")
        # As in a file, the values may not be aligned.
        room = np.zeros(1 + dense[marks].nbytes, dtype=np.uint8)
        room[1:] = dense[marks].view(np.uint8)
        values = room[1:].view(dense.dtype)
        found = np.zeros(marks.size, dense.dtype)
        bits.expand(flat, values, found)
        assert np.array_equal(found.reshape(shape), dense)
        masks, held = packed._padded_rows(flat, *shape), np.zeros(len(values), dense.dtype)
        upright = packed._transpose(masks, values, held, shape)
        assert np.array_equal(held, dense.T[marks.T])
        assert np.array_equal(np.unpackbits(upright, axis=1, count=shape[0], bitorder="little"), marks.T)


def test_loading_compiles_nothing_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("hf_pdecay.optim.cpu.native.load", lambda *args, **options: asked.append(options) or (None, ""))
    monkeypatch.setattr(bits, "_compiling", False)
    assert bits.library() is None
    bits.compile_functions()
    assert asked == [{"compiling": False}, {"compiling": True}]
