"""Measures one GPU: `python -m benchmarks.gpu`."""
