"""Inference of float32 models in a lower precision, on request (`Options.precision`)."""
