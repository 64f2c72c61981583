"""Rows, slots and ids of canvases, against the pictures that the specs describe."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mdruntime.layout import Layout
from mdruntime.manifest import ContextRow, DenoiserSpec


def spec(grid: tuple[int, ...], patch: tuple[int, ...], first: int = 0) -> DenoiserSpec:
    """A canvas with a class row behind the tokens, and a register before them if they start at 1.

    Class c has the id 100 + c, no class 199; the register has 77.
    """
    rows = int(np.prod(grid)) // int(np.prod(patch))
    register = (ContextRow(0, -1, 77),) * first
    return DenoiserSpec(
        length=int(np.prod(grid)),
        canvas=rows + 1 + first,
        first=first,
        grid=grid,
        patch=patch,
        codebook=50,
        mask_token=50,
        classes=9,
        layers=1,
        context=(*register, ContextRow(rows + first, 100, 199)),
        flexible=len(grid) == 1,
    )


SHAPES = [
    ((12,), (1,)),
    ((3, 4), (1, 1)),
    ((3, 4), (1, 2)),
    ((4, 6), (2, 2)),
    ((4, 6), (2, 3)),
    ((4, 6), (4, 1)),
]


def drawn(shape: tuple[int, ...], patch: tuple[int, ...]) -> NDArray[np.int64]:
    """The rows of a canvas's tokens, cut out of its picture patch by patch."""
    picture = np.arange(int(np.prod(shape))).reshape(shape)
    if len(shape) == 1:
        return picture[:, None]
    height, width = patch
    return np.stack(
        [
            picture[y : y + height, x : x + width].ravel()
            for y in range(0, shape[0], height)
            for x in range(0, shape[1], width)
        ]
    )


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("grid", "patch"), SHAPES, ids=str)
def test_a_row_holds_the_tokens_of_its_patch_side_by_side(
    grid: tuple[int, ...], patch: tuple[int, ...], first: int
) -> None:
    layout = Layout(spec(grid, patch, first), int(np.prod(grid)))
    expected = drawn(grid, patch)
    assert np.array_equal(layout.tokens_of_row, expected)
    assert layout.canvas == len(expected) + 1 + first
    for row, tokens in enumerate(expected):
        assert (layout.rows(tokens) == row + first).all()
        assert layout.slots(tokens).tolist() == list(range(expected.shape[1]))


@pytest.mark.parametrize(("grid", "patch"), SHAPES, ids=str)
def test_what_is_written_out_row_by_row_finds_its_place_again(
    grid: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    layout = Layout(spec(grid, patch), int(np.prod(grid)))
    tokens = np.random.default_rng(0).integers(0, 50, (3, int(np.prod(grid))), np.int32)
    ids = layout.ids(tokens, np.zeros(3, np.int64))
    written = ids[:, :-1].reshape(3, -1)
    assert np.array_equal(written[:, layout.index_of_token], tokens)
    everywhere = np.arange(tokens.shape[1])
    assert np.array_equal(ids[:, layout.rows(everywhere), layout.slots(everywhere)], tokens)


def test_context_rows_hold_the_class_the_dropped_class_or_what_never_changes() -> None:
    layout = Layout(spec((2, 4), (1, 2), first=1), 8)
    ids = layout.ids(np.zeros((3, 8), np.int32), np.array([0, 8, -1]))
    assert ids.dtype == np.int32
    assert ids[:, -1, 0].tolist() == [100, 108, 199]
    assert ids[:, 0, 0].tolist() == [77, 77, 77]  # whatever the class
    assert not ids[:, [0, -1], 1].any()  # of their other slots nothing is used


def test_a_shorter_text_has_fewer_rows() -> None:
    layout = Layout(spec((12,), (1,), first=1), 5)
    assert layout.canvas == 7
    assert layout.rows(np.arange(5)).tolist() == [1, 2, 3, 4, 5]
