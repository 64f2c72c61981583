"""What exporting adds to a graph for nothing: updates of caches, expanded to the size they have.

``Tensor.index_put`` lets values be smaller than the places they go to, so PyTorch's exporter puts
an Expand before every ScatterND. Keys and values have their places' size already; each would be
copied for nothing, 1 % of a full pass and up to 3 % of a short one on a CPU.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["drop_expansions"]

_Dims = list[str]


def drop_expansions(model: ir.Model) -> int:
    """Let caches be updated without an Expand where the sizes agree, in place.

    Returns:
        How many expansions were taken out.
    """
    dropped = 0
    for node in model.graph:
        if node.op_type != "ScatterND":
            continue
        cache, places, updates = node.inputs
        expand = None if updates is None else updates.producer()
        if expand is None or expand.op_type != "Expand":
            continue
        new, wanted = expand.inputs[0], _updated(cache, places)
        if new is not None and wanted is not None and _dims(new) == wanted:
            node.replace_input_with(2, new)
            dropped += 1
    if dropped:
        RemoveUnusedNodesPass()(model)
    return dropped


def _updated(cache: ir.Value | None, places: ir.Value | None) -> _Dims | None:
    """Return the size of what goes to places in a cache; None if the graph does not tell.

    Places are indices of the cache's first axes, each expanded to the size of all of them.
    """
    concat = None if places is None else places.producer()
    if cache is None or concat is None or concat.op_type != "Concat":
        return None
    indices = [_source(value, "Unsqueeze", "Expand") for value in concat.inputs]
    sizes = [None if index is None else _dims(index) for index in indices]
    common, inner = _broadcast(sizes), _dims(cache)
    return None if common is None or inner is None else common + inner[len(sizes) :]


def _source(value: ir.Value | None, *operators: str) -> ir.Value | None:
    """Return what a value was made of by these operators, the last one first."""
    for operator in operators:
        node = None if value is None else value.producer()
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    return value


def _broadcast(sizes: list[_Dims | None]) -> _Dims | None:
    """Return the size that arrays of equal rank have together; None if that is not sure."""
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or len({len(size) for size in known}) != 1:
        return None
    common = []
    for axis in zip(*known, strict=True):
        longer = set(axis) - {"1"} or {"1"}
        if len(longer) > 1:
            return None
        common.append(longer.pop())
    return common


def _dims(value: ir.Value) -> _Dims | None:
    """Return the sizes of a value, free ones by name; None if one has no name."""
    if value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else [str(size) for size in sizes]
