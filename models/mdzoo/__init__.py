"""Masked diffusion models in PyTorch, and loaders of their published checkpoints."""

from mdzoo.catalogue import CATALOGUE
from mdzoo.checkpoint import CheckpointError
from mdzoo.entry import Entry, Model, Sources
from mdzoo.hub import resolve
from mdzoo.loading import load, load_denoiser, load_direct, unused_tensors

__all__ = [
    "CATALOGUE",
    "CheckpointError",
    "Entry",
    "Model",
    "Sources",
    "load",
    "load_denoiser",
    "load_direct",
    "resolve",
    "unused_tensors",
]
