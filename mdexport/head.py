"""The sampler head in PyTorch, to be traced into the graph.

The specification is ``mdruntime.head``; the arithmetic here is the same, in operators that ONNX
Runtime and TensorRT both have, and all of it in float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mdruntime.head import BLOCK

__all__ = ["OUTPUTS", "draw", "guided"]

OUTPUTS = ("sampled", "log_moment", "log_prob", "entropy", "top", "margin", "log_normaliser")

_BELOW_ONE = 1 - 2**-23
_LOWEST = -1e30  # times p = 0 it is 0, where minus infinity would be NaN


def guided(logits: Tensor, conditional: Tensor, unconditional: Tensor, weight: Tensor) -> Tensor:
    """Return ``(1 + w) conditional - w unconditional``.

    Args:
        logits: float32 (rows, m, codebook).
        conditional: int32 (batch,), the row that carries a sample's label.
        unconditional: int32 (batch,), the row that does not; equal without guidance.
        weight: w, float32 (batch,).
    """
    with_label = torch.index_select(logits, 0, conditional)
    without = torch.index_select(logits, 0, unconditional)
    return with_label + weight[:, None, None] * (with_label - without)


def draw(logits: Tensor, controls: Mapping[str, Tensor], uniforms: Tensor) -> dict[str, Tensor]:
    """Draw a token at every row and describe the row's distribution.

    Args:
        logits: float32 (batch, m, codebook), already guided.
        controls: ``temperature``, ``beta`` and ``token_beta``, float32 (batch,).
        uniforms: float32 (batch, m) in [0, 1).

    Returns:
        ``OUTPUTS``, (batch, m) each; ``sampled`` is int32, the others float32.
    """
    scaled = logits / controls["temperature"][:, None, None]
    log_p = torch.log_softmax(scaled, dim=-1)
    p = log_p.exp()
    sampled = _invert_cdf(_powered(log_p, controls["token_beta"]), uniforms)
    two = torch.topk(p, 2, dim=-1).values
    return {
        "sampled": sampled.int(),
        "log_moment": _log_moment(log_p, controls["beta"]),
        "log_prob": log_p.gather(-1, sampled.long()[..., None])[..., 0],
        "entropy": -(p * log_p.clamp(min=_LOWEST)).sum(-1),
        "top": two[..., 0],
        "margin": two[..., 0] - two[..., 1],
        # By which the logit of any token, here the largest, exceeds its log-probability.
        "log_normaliser": scaled.amax(-1) - log_p.amax(-1),
    }


def _invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    spare = -weights.shape[-1] % BLOCK
    blocks = torch.nn.functional.pad(weights, (0, spare)).reshape(*weights.shape[:-1], -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1)
    total = sums[..., -1]
    threshold = torch.minimum(uniforms * total, total * _BELOW_ONE)
    # Counted in float32 (exact up to 2**24): integer sums are where compilers differ.
    block = (sums <= threshold[..., None]).float().sum(-1, keepdim=True)
    first = (block - 1).clamp(min=0).long()
    before = torch.where(block > 0, sums.gather(-1, first), 0.0)[..., 0]
    wanted = block.long()[..., None].expand(*block.shape, BLOCK)
    inside = blocks.gather(-2, wanted)[..., 0, :].cumsum(-1)
    rest = torch.minimum(threshold - before, inside[..., -1] * _BELOW_ONE)
    return block[..., 0] * BLOCK + (inside <= rest[..., None]).float().sum(-1)


def _powered(log_p: Tensor, beta: Tensor) -> Tensor:
    scaled = beta[:, None, None] * log_p
    return (scaled - scaled.amax(-1, keepdim=True)).exp()


def _log_moment(log_p: Tensor, beta: Tensor) -> Tensor:
    # Spelled out: the compilers' own ReduceLogSumExp need not subtract the maximum.
    scaled = beta[:, None, None] * log_p
    largest = scaled.amax(-1, keepdim=True)
    return (largest + (scaled - largest).exp().sum(-1, keepdim=True).log())[..., 0]
