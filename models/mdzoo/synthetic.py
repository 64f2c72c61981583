"""Weights and tokens that follow from a rule, to compare a port with published reference values.

Whoever fills the original model and a port by these rules must get the same numbers out of both:
that checks all of the arithmetic, and needs no checkpoint.
"""

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["golden_weights", "toks"]

SCALE = 0.05  # standard deviation of the weights


def golden_weights(module: nn.Module) -> None:
    """Replace every parameter by normal numbers seeded with the parameter's name.

    Scales of normalisation layers (one axis, a name that ends with ``.weight``) are centred on
    one, all other parameters on zero. Tied parameters follow their first name; buffers stay.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(_normal(name, tuple(parameter.shape))))


def _normal(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    # The legacy generator, because the reference values were computed with it.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    centre = 1.0 if len(shape) == 1 and name.endswith(".weight") else 0.0
    return (random.standard_normal(shape) * SCALE + centre).astype(np.float32)


def toks(n: int, codebook: int, mask: int | None = None) -> Tensor:
    """Return ``n`` tokens, int64 (n,), that step through the codebook by seven.

    Args:
        n: how many.
        codebook: tokens are below it.
        mask: if given, it stands at every third position from the first on.
    """
    tokens = (7 * torch.arange(n) + 3) % codebook
    if mask is not None:
        tokens[::3] = mask
    return tokens
