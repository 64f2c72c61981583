"""Placeholder until the catalogue is written."""
