"""The compiled functions beside numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from hf_pdecay.storage import bits


SHAPES = ((1, 1), (1, 200), (7, 9), (64, 64), (65, 127), (130, 72), (300, 3), (3, 300), (9, 1000), (2, 70_000))


def places_of(marks: np.ndarray, width: int) -> np.ndarray | None:  # type: ignore[type-arg]
    """The section of a payload with the places of values, or None if gaps are wider."""
    if width == 0:
        return np.packbits(marks, bitorder="little")
    gaps = np.diff(np.flatnonzero(marks), prepend=-1) - 1
    return None if gaps.max(initial=0) >= 1 << 8 * width else gaps.astype(f"<u{width}").view(np.uint8)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_and_by_rows(way: str, shape: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside numpy's own indexing of the dense matrix and of its transpose."""
    monkeypatch.setattr(bits, "_CHUNK", 1 << 10)  # so that there are several
    numbers = np.random.default_rng(0)
    for density in (0, 0.001, 0.1, 0.5, 1):
        marks = numbers.random(shape) < density
        dense = numbers.integers(1, 255, shape).astype(f"<u{size}") << 8 * (size - 1)  # the sign bit too
        dense *= marks
        # As in a file, the values may not be aligned.
        room = np.zeros(1 + dense[marks].nbytes, dtype=np.uint8)
        room[1:] = dense[marks].view(np.uint8)
        values = room[1:].view(dense.dtype)
        for width in (0, 1, 2, 4):
            places = places_of(marks, width)
            if places is None:
                continue
            found = np.zeros(marks.size, dense.dtype)
            bits.expand(width, places, values, found)
            assert np.array_equal(found.reshape(shape), dense)
            for rows, wanted, kept in (
                (bits.rows_of(width, places, values, shape), dense, marks),
                (bits.columns_of(width, places, values, shape), dense.T, marks.T),
            ):
                assert rows.starts.tolist() == [0, *np.cumsum(kept.sum(1))]
                assert np.array_equal(rows.columns, np.nonzero(kept)[1])
                assert rows.columns.itemsize == (4 if kept.shape[1] > 65536 else 2)
                assert np.array_equal(rows.values, wanted[kept])
                masks = bits.masks_of(rows, -(-kept.shape[1] // 64) * 8)
                assert np.array_equal(np.unpackbits(masks, axis=1, count=kept.shape[1], bitorder="little"), kept)
                assert bits.ones(masks) == kept.sum()
        turned = bits.turned(np.packbits(marks, bitorder="little"), values, shape, 64)
        assert (turned is None) == (way == "numpy")
        if turned is not None:
            masks, held = turned
            upright = np.unpackbits(masks, axis=1, bitorder="little")
            assert np.array_equal(upright[:, : shape[0]], marks.T) and not upright[:, shape[0] :].any()
            assert np.array_equal(held[: values.size], dense.T[marks.T]) and not held[values.size :].any()


def test_places_that_changed_after_their_check_write_nothing_elsewhere(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may change while it is read: no place beyond the matrix, and no value beyond the given ones."""
    if way == "numpy":
        pytest.skip("numpy raises")
    values = np.arange(1, 11, dtype=np.uint16)
    for width, places in ((0, np.full(8, 255, np.uint8)), (1, np.full(10, 9, np.uint8))):
        room = np.zeros(164, dtype=np.uint16)
        bits.expand(width, places, values, room[50:114])
        assert not room[:50].any() and not room[114:].any() and room[50:114].any()
        for find in (bits.rows_of, bits.columns_of):
            assert find(width, places, values, (8, 8)).starts[-1] >= 0


def test_loading_compiles_nothing_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("hf_pdecay.optim.cpu.native.load", lambda *args, **options: asked.append(options) or (None, ""))
    monkeypatch.setattr(bits, "_compiling", False)
    assert bits.library() is None
    bits.compile_functions()
    assert asked == [{"compiling": False}, {"compiling": True}]
