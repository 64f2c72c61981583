"""Engines of TensorRT: built, checked and driven on the device, without PyTorch."""
