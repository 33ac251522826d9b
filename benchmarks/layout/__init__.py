"""Convolutions and their like in both memory layouts: `python -m benchmarks.tensor_layout`."""
