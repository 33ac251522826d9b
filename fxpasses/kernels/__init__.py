"""Kernels of our own, compiled when they are first needed and measured against what torch has."""
