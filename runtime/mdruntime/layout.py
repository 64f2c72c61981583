"""Where the tokens of a canvas lie among the rows that the transformer sees."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mdruntime.manifest import DenoiserSpec

__all__ = ["Layout", "layout_of"]

Index = NDArray[np.int64]


class Layout:
    """The correspondence of tokens and rows of one canvas.

    Most models have a row for every token. Where ``spec.patch`` is larger, the tokens of a patch
    share a row, and stand side by side in the graph's inputs and outputs.
    """

    tokens_of_row: Index  # (token rows, slots), which tokens a row holds
    index_of_token: Index  # (length,), where a token stands when rows are written out
    canvas: int  # rows, context rows included

    def __init__(self, spec: DenoiserSpec, length: int) -> None:
        """Lay a canvas of ``length`` tokens out; it differs from the spec's for text only."""
        grid = spec.grid if length == spec.length else (length,)
        index = np.arange(length).reshape(grid)
        axes = [
            size
            for cells, part in zip(grid, spec.patch, strict=True)
            for size in (cells // part, part)
        ]
        count = len(grid)
        order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
        self.tokens_of_row = index.reshape(axes).transpose(order).reshape(-1, spec.slots)
        self.index_of_token = np.argsort(self.tokens_of_row.ravel())
        self.canvas = len(self.tokens_of_row) + len(spec.context)
        self._spec = spec

    def rows(self, positions: Index) -> Index:
        """Return the canvas rows that hold these tokens."""
        return self.index_of_token[positions] // self._spec.slots + self._spec.first

    def slots(self, positions: Index) -> Index:
        """Return which of its row's tokens each of these is."""
        return self.index_of_token[positions] % self._spec.slots

    def ids(self, tokens: NDArray[np.int32], labels: Index) -> NDArray[np.int32]:
        """Return the ids of all rows, int32 (batch, canvas, slots).

        Args:
            tokens: (batch, length).
            labels: class of each sample, -1 for none; decides the ids of context rows, which
                stand in their first slot.
        """
        spec = self._spec
        table = np.zeros((len(tokens), self.canvas, spec.slots), np.int32)
        inside = slice(spec.first, spec.first + len(self.tokens_of_row))
        table[:, inside] = tokens[:, self.tokens_of_row]
        for row in spec.context:
            labelled = (labels >= 0) & (row.offset >= 0)
            table[:, row.position, 0] = np.where(labelled, row.offset + labels, row.dropped)
        return table


@lru_cache(maxsize=16)
def layout_of(spec: DenoiserSpec, length: int) -> Layout:
    """Return the layout of a canvas; the same one for every pass over it."""
    return Layout(spec, length)
