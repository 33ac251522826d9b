"""Weights: their memory formats, and what depends on them alone, done once and kept."""
