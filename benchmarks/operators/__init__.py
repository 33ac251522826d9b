"""Single operators on recorded inputs: `python -m benchmarks.operatorbench`, and their inputs."""
