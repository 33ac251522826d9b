"""What the benchmarks of all topics share: statistics, timing in turns, the machine, settings in text."""
