"""The sampler head in NumPy: from logits to drawn tokens and everything an order may rank by.

This is the specification; exported graphs hold the same arithmetic so that logits need not leave
the device, and a test holds the two together. All of it is float32.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "Controls", "Draws", "Logits", "draw", "draw_thinned", "guided", "invert_cdf"]

BLOCK = 128
"""Weights that are summed at a time where tokens are drawn."""

_BELOW_ONE = np.float32(1 - 2**-23)

Logits = NDArray[np.float32]  # (batch, m, codebook)
Array = NDArray[np.float32]


class Controls(NamedTuple):
    """The numbers of one pass that differ between samples, float32 (batch,) each."""

    guidance: Array  # weight w: (1 + w) conditional - w unconditional
    temperature: Array  # of the denoiser's conditional p = softmax(logits / temperature)
    beta: Array  # exponent of the moments: sum_x p(x)^beta
    token_beta: Array  # exponent of the tokens: drawn with probability proportional to p^token_beta

    def take(self, samples: NDArray[np.int64]) -> "Controls":
        """Return the controls of some samples of the batch."""
        return Controls(*(values[samples] for values in self))


class Draws(NamedTuple):
    """What a pass returns about the rows it computed, (batch, m) each."""

    sampled: NDArray[np.int32]  # token drawn by inverting the CDF of p^token_beta
    log_moment: Array  # log sum_x p(x)^beta
    log_prob: Array  # log p(sampled)
    entropy: Array  # of p, in nats
    top: Array  # largest p(x)
    margin: Array  # largest minus second largest p(x)
    log_normaliser: Array  # log sum_x exp(logit(x) / temperature): logits are log p plus it


def log_softmax(logits: Logits) -> Logits:
    """Return log-probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def guided(conditional: Logits, unconditional: Logits, weight: Array) -> Logits:
    """Return ``(1 + w) conditional - w unconditional`` (classifier-free guidance).

    Args:
        conditional: (batch, m, codebook).
        unconditional: the same shape.
        weight: w, (batch,); 0 is the conditional model.
    """
    return conditional + weight[:, None, None] * (conditional - unconditional)


def invert_cdf(weights: Logits, uniforms: Array) -> NDArray[np.int32]:
    """Draw one index per position with probability proportional to ``weights``.

    The index is the first whose cumulated weight exceeds ``uniform * total``; an index of
    weight zero is therefore never drawn. Sums run over blocks of ``BLOCK`` weights, then within one
    block: a running sum over a whole vocabulary would lose digits that decide between tokens.

    Args:
        weights: float32 (batch, m, codebook), not negative, not all zero.
        uniforms: float32 (batch, m) in [0, 1).
    """
    spare = -weights.shape[-1] % BLOCK
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, spare)])
    blocks = padded.reshape(*weights.shape[:-1], -1, BLOCK)
    sums = np.cumsum(blocks.sum(axis=-1, dtype=np.float32), axis=-1, dtype=np.float32)
    threshold = np.minimum(uniforms * sums[..., -1], sums[..., -1] * _BELOW_ONE)
    block = (sums <= threshold[..., None]).sum(axis=-1)
    before = np.where(block > 0, _at(sums, np.maximum(block - 1, 0)), np.float32(0))
    inside = np.cumsum(
        np.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :],
        axis=-1,
        dtype=np.float32,
    )
    rest = np.minimum(threshold - before, inside[..., -1] * _BELOW_ONE)
    index = block * BLOCK + (inside <= rest[..., None]).sum(axis=-1)
    return index.astype(np.int32)


def _at(values: Array, index: NDArray[np.int64]) -> Array:
    """Return one of the last axis' values at each position."""
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def draw(logits: Logits, controls: Controls, uniforms: Array) -> Draws:
    """Draw a token at every row and describe the row's distribution.

    Args:
        logits: float32 (batch, m, codebook), already guided.
        controls: (batch,) each; ``guidance`` is not used here.
        uniforms: float32 (batch, m) in [0, 1).
    """
    scaled = logits / controls.temperature[:, None, None]
    log_p = log_softmax(scaled)
    p = np.exp(log_p)
    token_weights = _powered(log_p, controls.token_beta)
    sampled = invert_cdf(token_weights, uniforms)
    two = np.partition(p, -2, axis=-1)[..., -2:]
    return Draws(
        sampled=sampled,
        log_moment=_log_moment(log_p, controls.beta),
        log_prob=np.take_along_axis(log_p, sampled[..., None], axis=-1)[..., 0],
        entropy=-(p * np.maximum(log_p, _LOWEST)).sum(axis=-1),
        top=two[..., 1],
        margin=two[..., 1] - two[..., 0],
        log_normaliser=scaled.max(axis=-1) - log_p.max(axis=-1),
    )


_LOWEST = np.float32(-1e30)  # times p = 0 it is 0, where minus infinity would be NaN
_LARGEST_EXPONENT = 700.0  # of a float64 that is still finite


def _powered(log_p: Logits, beta: Array) -> Logits:
    """Return p^beta, divided by its largest value so that nothing underflows that matters."""
    scaled = beta[:, None, None] * log_p
    return np.exp(scaled - scaled.max(axis=-1, keepdims=True))


def _log_moment(log_p: Logits, beta: Array) -> Array:
    """Return log sum_x p(x)^beta without ever forming p^beta, which underflows."""
    scaled = beta[:, None, None] * log_p
    largest = scaled.max(axis=-1, keepdims=True)
    return (largest + np.log(np.exp(scaled - largest).sum(axis=-1, keepdims=True)))[..., 0]


def draw_thinned(
    logits: Logits,
    temperature: Array,
    alpha: NDArray[np.float64],
    log_wait: NDArray[np.float64],
    uniforms: Array,
) -> NDArray[np.int32]:
    """Draw tokens with probability proportional to ``p^(1 + 1/alpha) exp(-p^(1/alpha) T)``.

    The second draw of MaskGIT's exact choose-then-sample form: given that a position was chosen
    with score s, T = exp(-s / alpha), its token follows this law.

    Args:
        logits: float32 (batch, m, codebook), already guided.
        temperature: of p = softmax(logits / temperature), (batch,).
        alpha: (batch,); where it is 0 the plain p is drawn from.
        log_wait: log T, (batch, m).
        uniforms: float32 (batch, m) in [0, 1).
    """
    log_p = log_softmax(logits / temperature[:, None, None]).astype(np.float64)
    thinned = (alpha > 0)[:, None, None]
    inverse = 1 / np.where(thinned, alpha[:, None, None], np.inf)
    log_hazard = inverse * np.maximum(log_p, _LOWEST) + log_wait[..., None]
    hazard = np.exp(np.minimum(log_hazard, _LARGEST_EXPONENT))
    exponent = (1 + inverse) * log_p - np.where(thinned, hazard, 0)
    weights = np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return invert_cdf(weights.astype(np.float32), uniforms)
