"""Passes of a denoiser against caches, for the tests of every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mdruntime.layout import Layout

WholePass = Callable[..., Tensor]


@pytest.fixture(scope="session")
def whole_pass() -> WholePass:
    """Return a function (model, tokens, labels) to the logits of a pass over all rows.

    The rows come in a random order, the tokens of every row side by side; the result is
    (batch, length, codebook) in the order of the canvas.
    """

    def run(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        spec = model.spec
        layout = Layout(spec, tokens.shape[1])
        table = torch.from_numpy(layout.ids(tokens.int().numpy(), labels_of(labels)))
        batch, canvas = table.shape[0], table.shape[1]
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(canvas, generator=generator).repeat(batch, 1)
        ids = table.gather(1, order[..., None].expand_as(table)).flatten(1)
        wanted = order.argsort(1)[:, spec.first : spec.first + tokens.shape[1] // spec.slots]
        extras = model.condition(labels)
        if spec.visible:
            extras["visible"] = visible_columns(table[..., 0], order, spec)
        with torch.no_grad():
            caches = list(model.empty_caches(batch, canvas).values())
            logits, refreshed = model.step(ids, order, wanted, caches, extras)
        assert [cache.shape for cache in refreshed] == [cache.shape for cache in caches]
        back = torch.from_numpy(layout.index_of_token)
        return logits[:, back]

    return run


def labels_of(labels: Tensor) -> Any:
    """Return class labels for the context rows; prompts do not enter them."""
    return (labels if labels.ndim == 1 else torch.full((len(labels),), -1)).numpy()


def visible_columns(ids: Tensor, order: Tensor, spec: Any) -> Tensor:
    """Return the columns of rows that hold no hidden token, padded by the first of each."""
    shown = [
        torch.nonzero(row[places] != spec.mask_token)[:, 0]
        for row, places in zip(ids, order, strict=True)
    ]
    width = max(map(len, shown))
    return torch.stack([torch.cat([c, c[:1].repeat(width - len(c))]) for c in shown]).int()
