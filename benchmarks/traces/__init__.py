"""How busy a device is, from traces of profilers: `python -m benchmarks.utilization`."""
