"""Masked diffusion models in PyTorch, and loaders of their published checkpoints."""

from mdzoo.catalogue import CATALOGUE, Entry, Model, Sources, load, load_denoiser
from mdzoo.checkpoint import CheckpointError

__all__ = [
    "CATALOGUE",
    "CheckpointError",
    "Entry",
    "Model",
    "Sources",
    "load",
    "load_denoiser",
]
