"""What `python -m benchmarks.readme` makes of result files: means, tables and the chart."""
