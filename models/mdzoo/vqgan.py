"""The VQGAN of taming-transformers (Esser et al. 2021, arXiv 2012.09841).

Source: repository CompVis/taming-transformers (MIT licence), ``taming/models/vqgan.py``. Modules
bear the published names: ``VQGAN.state_dict()`` has the keys of the published checkpoints.
"""

from collections.abc import Mapping

from torch import Tensor

from mdzoo.codec import ConvCodec, assemble
from mdzoo.conv import ConvConfig, Style

__all__ = ["VQGAN", "VQGANConfig", "load"]

VQGANConfig = ConvConfig  # the defaults are those of this family


class VQGAN(ConvCodec):
    """Images to tokens and back; pixels are in [-1, 1]."""


def load(state: Mapping[str, Tensor], *, source: str) -> VQGAN:
    """Build a VQGAN from published tensors.

    Args:
        state: tensors under their published names.
        source: where they come from, for messages.

    Raises:
        CheckpointError: another architecture, or damaged weights.
    """
    return assemble(VQGAN, state, Style(), source)
