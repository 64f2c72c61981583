"""Placeholder until the public surface is written."""

__version__ = "0.1.0"
