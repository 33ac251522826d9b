"""The parts of `benchmarks.kernel_time`: what each layer of a model takes in several runtimes."""
